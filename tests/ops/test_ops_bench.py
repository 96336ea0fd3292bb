"""The measuring code measures what it says."""

import json
import time
from dataclasses import asdict

import pytest
import torch
from ops_cases import error

from benchmarks import ops as script
from benchmarks import ops_report as report
from benchmarks import ops_timing as bench
from subquad.cli import main


def test_every_kind_is_measured_and_counted():
    rows, missing = bench.measure(bench.Size(64, 1, 2, 16, 16), [*bench.variants(), "sdpa"], seconds=1)
    assert {row.name for row in rows} == {*bench.variants(), "sdpa"}
    assert all(row.milliseconds > 0 and row.samples >= 3 for row in rows)
    assert all((row.share_of_matmul_rate is not None) == (row.name != "sdpa") for row in rows)
    assert "fla" in missing or torch.cuda.is_available()
    json.dumps([asdict(row) for row in rows])
    assert len(bench.table(rows).splitlines()) == len(rows) + 1


def test_interleaving_tells_slow_from_fast():
    times = bench.time_interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, samples=3)
    assert min(times["slow"]) >= 20 > max(times["fast"])


@pytest.mark.parametrize(
    "pair",
    [("gated_delta", "transformers gated_delta"), ("kda", "transformers kda"), ("scalar", "transformers mamba2")],
    ids=str,
)
def test_peers_compute_the_same(pair):
    ours, peer = pair
    found, missing = bench.baselines()
    if peer in missing:
        pytest.skip(missing[peer])
    size = bench.Size(128, 1, 2, 16, 16)
    a = bench.arguments(size)
    got, want = bench.variants()[ours](a)[0], found[peer](a)
    if ours == "scalar":  # Mamba-2 has no scale and writes dt x, with dt = -log decay
        got = bench.variants()[ours](a | {"v": -a["v"] * a["scalar"].unsqueeze(-1)})[0] * 4
    assert error(got, want.double()) < 1e-5


def test_decoding_is_measured():
    tokens = bench.measure_decode(bench.Size(1, 1, 2, 16, 16), context=64)
    assert [t.name for t in tokens] == ["none", "scalar", "channel", "gated_delta", "kda", "sdpa over 64"]
    assert all(t.microseconds > 0 and t.ratio > 0 for t in tokens)
    assert all((t.launches is None) == t.name.startswith("sdpa") for t in tokens)


def test_memory_is_measured_in_a_fresh_process():
    size = bench.Size(8192, 1, 9, 64, 64)
    o_and_three_gradients = 4 * 8192 * 9 * 64 * 4
    assert bench.peak_memory("scalar", size) > o_and_three_gradients / 2


def test_the_command_reports(capsys, tmp_path):
    path = tmp_path / "ops.json"
    argv = ["bench", "ops", "--sizes", "16,32,16x2", "--only", "scalar,sdpa", "--seconds", "0.2", "--no-memory"]
    assert main([*argv, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    for text in ("T = 16, B = 2", "Microseconds a token", "One decoded token", "of which launches", "x SDPA"):
        assert text in out
    figures = json.loads(path.read_text())
    assert {row["name"] for row in figures["rows"]} == {"scalar", "sdpa"}
    assert len(figures["rows"]) == 6
    assert figures["machine"]["torch"] == torch.__version__


def test_lengths_stand_side_by_side():
    text = report.by_length({"scalar": {512: 4.0, 2048: 2.0, 8192: 3.0}, "kda": {512: 1.0}})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["scalar", "4.00", "(", "2.00)", "2.00", "(", "1.00)", "3.00", "(", "1.50)"],
        ["kda"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sizes", "2048,many"], "--sizes: got 'many', expected tokens, or tokens x batch, such as 2048,512x8"),
        (["--sizes", "0"], "--sizes: got '0'"),
        (["--sizes", "8x"], "--sizes: got '8x'"),
        (["--only", "scalar,sdp"], "--only: got 'sdp', expected names among none, scalar,"),
        (["--seconds", "0"], "--seconds: got 0.0, expected more than 0"),
        (["--json", "nowhere/at/all.json"], "--json: the directory of 'nowhere/at/all.json' does not exist"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_mistakes_take_one_line(capsys, change, message):
    assert main(["bench", "ops", *change]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_script_writes_results(monkeypatch, tmp_path):
    path = tmp_path / "RESULTS.md"
    argv = ["ops", "--sizes", "16", "--only", "scalar", "--seconds", "0.2", "--no-memory", "--results", str(path)]
    monkeypatch.setattr("sys.argv", argv)
    script.main()
    text = path.read_text()
    assert text.startswith("# The ops beside their peers")
    assert "## Forward and backward, T = 16, B = 1" in text
