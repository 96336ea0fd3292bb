"""The measuring code measures what it says."""

import json
import time

import pytest
import torch
from ops_cases import error

from subquad.ops import bench


def test_every_kind_is_measured_and_counted():
    rows, missing = bench.measure(bench.Size(64, 1, 2, 16, 16), [*bench.kinds(), "sdpa"], seconds=1)
    assert {row.name for row in rows} == {*bench.kinds(), "sdpa"}
    assert all(row.milliseconds > 0 and row.samples >= 3 for row in rows)
    assert all((row.share_of_matmul_rate is not None) == (row.name != "sdpa") for row in rows)
    assert "fla" in missing or torch.cuda.is_available()
    json.dumps([row.as_dict() for row in rows])
    assert len(bench.table(rows).splitlines()) == len(rows) + 1


def test_interleaving_tells_slow_from_fast():
    times = bench.interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, samples=3)
    assert min(times["slow"]) >= 20 > max(times["fast"])


@pytest.mark.parametrize(
    "pair",
    [("gated_delta", "transformers gated_delta"), ("kda", "transformers kda"), ("scalar", "transformers mamba2")],
    ids=str,
)
def test_peers_compute_the_same(pair):
    ours, peer = pair
    found, missing = bench.peers()
    if peer in missing:
        pytest.skip(missing[peer])
    size = bench.Size(128, 1, 2, 16, 16)
    a = bench.arguments(size)
    got, want = bench.kinds()[ours](a)[0], found[peer](a)
    if ours == "scalar":  # Mamba-2 has no scale and writes dt x, with dt = -log decay
        got = bench.kinds()[ours](a | {"v": -a["v"] * a["scalar"].unsqueeze(-1)})[0] * 4
    assert error(got, want.double()) < 1e-5


def test_decoding_is_measured():
    times = bench.measure_decode(bench.Size(1, 1, 2, 16, 16), context=64)
    assert set(times) == {"none", "scalar", "channel", "gated_delta", "kda", "sdpa over 64"}
