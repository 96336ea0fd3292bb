"""Budgets of the fuzz tests. `SUBQUAD_FUZZ=N` runs N times as many inputs, drawn anew (`--hypothesis-seed` fixes them);
without it the inputs are the same in each run."""

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("SUBQUAD_FUZZ", "1"))
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
for name, examples in (("cheap", 200), ("model", 15)):
    settings.register_profile(
        name,
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=CHECKS,
    )
