"""Diagnostics of teachers and students of every architecture that `linearize` supports."""

import pytest
import torch

from subquad.analysis.ablations import ablation_results
from subquad.analysis.diagnostics import diagnostics_results
from subquad.evaluate.results import select, select_one
from tests.helpers.architectures import ARCHITECTURES, cached_student, cached_teacher

FEW = ("gemma2", "gpt_neox", "gpt2", "falcon", "gpt_oss", "glm")
ROWS = torch.randint(3, 61, (1, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "model_type", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
def test_diagnostics_of_every_architecture(model_type):
    teacher, hybrid = cached_teacher(model_type), cached_student(model_type, "hybrid")
    same_model = diagnostics_results(teacher, ROWS, teacher, top=4)
    assert {result.value for result in select(same_model, metric="topk_mass_overlap")} == {1}
    assert {result.value for result in select(same_model, metric="cka")} == {1}
    for metric in ("mixer_error", "layer_error", "swap_kl"):
        assert select_one(same_model, metric=metric, layer=None).value == pytest.approx(0, abs=1e-6)
    found = diagnostics_results(hybrid, ROWS, teacher, top=4)
    assert select_one(found, metric="topk_mass_overlap", layer=1, head=None).value == 1  # its attention is kept
    assert select_one(found, metric="topk_mass_overlap", layer=0, head=None).value < 1
    assert abs(select_one(found, metric="swap_kl", layer=1).value) < 1e-6
    assert select_one(found, metric="swap_kl", layer=0).value > 1e-4
    assert select_one(found, metric="mixer_error", layer=0).value > 1e-2
    ablations = {result.task for result in ablation_results(hybrid, ROWS, window=8)}
    assert {"without_mixers", "without_attention", "frozen_gate", "frozen_decay"} <= ablations
