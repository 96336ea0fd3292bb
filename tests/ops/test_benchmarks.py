"""The benchmarks: what they measure, their options, and their output."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import common, decode_step, gpu, ops, ops_timing
from subquad import cli
from subquad.cli.measurements import BENCHMARKS
from tests.helpers.ops import error


def test_every_variant_is_timed():
    results, missing = ops_timing.measure(
        ops_timing.Size(64, 1, 2, 16, 16), [*ops_timing.variants(), "sdpa"], seconds=1
    )
    assert {r.name for r in results} == {*ops_timing.variants(), "sdpa"}
    assert all(r.milliseconds > 0 and r.samples >= 3 for r in results)
    assert all((r.share_of_matmul_rate is not None) == (r.name != "sdpa") for r in results)
    assert "fla" in missing or torch.cuda.is_available()
    json.dumps([asdict(r) for r in results])
    assert len(ops.timing_table(results).splitlines()) == len(results) + 1


def test_interleaved_times_belong_to_their_calls():
    times = common.time_interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, samples=3)
    assert min(times["slow"]) >= 20 > max(times["fast"])


@pytest.mark.parametrize(
    ("variant", "baseline"),
    [("gated_delta", "transformers gated_delta"), ("kda", "transformers kda"), ("scalar", "transformers mamba2")],
    ids=str,
)
def test_baselines_compute_the_same(variant, baseline):
    found, missing = ops_timing.baselines()
    if baseline in missing:
        pytest.skip(missing[baseline])
    a = ops_timing.arguments(ops_timing.Size(128, 1, 2, 16, 16))
    op = ops_timing.variants()[variant]
    got, want = op(a)[0], found[baseline](a)
    if variant == "scalar":  # Mamba-2 has no scale and writes dt x, with dt = -log decay
        got = op(a | {"v": -a["v"] * a["scalar"].unsqueeze(-1)})[0] * 4
    assert error(got, want.double()) < 1e-5


def test_decoding_is_timed():
    timings = ops_timing.measure_decode(ops_timing.Size(1, 1, 2, 16, 16), context=64)
    assert [t.name for t in timings] == ["none", "scalar", "channel", "gated_delta", "kda", "sdpa over 64"]
    assert all(t.microseconds > 0 and t.speedup > 0 for t in timings)
    assert all((t.launches is None) == t.name.startswith("sdpa") for t in timings)


def test_peak_memory_includes_output_and_gradients():
    size = ops_timing.Size(8192, 1, 9, 64, 64)
    output_and_three_gradients = 4 * 8192 * 9 * 64 * 4
    assert ops_timing.peak_memory("scalar", size) > output_and_three_gradients / 2


def test_bench_ops_writes_tables_json_and_markdown(capsys, tmp_path):
    path, markdown = tmp_path / "ops.json", tmp_path / "RESULTS.md"
    argv = ["bench", "ops", "--sizes", "16,32,16x2", "--only", "scalar,sdpa", "--seconds", "0.2", "--no-memory"]
    assert cli.main([*argv, "--json", str(path), "--results", str(markdown)]) == 0
    out = capsys.readouterr().out
    for text in ("T = 16, B = 2", "Microseconds per token", "One decoded token", "of which launches", "x SDPA"):
        assert text in out
    report = json.loads(path.read_text())
    assert {r["name"] for r in report["results"]} == {"scalar", "sdpa"}
    assert len(report["results"]) == 6
    assert report["machine"]["torch"] == torch.__version__
    assert markdown.read_text().startswith("# Operator benchmarks")
    assert "## Forward and backward, T = 16, B = 1" in markdown.read_text()


def test_table_by_length_has_a_column_per_length():
    text = ops.table_by_length({"scalar": {512: 4.0, 2048: 2.0, 8192: 3.0}, "kda": {512: 1.0}})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["scalar", "4.00", "(", "2.00)", "2.00", "(", "1.00)", "3.00", "(", "1.50)"],
        ["kda"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ops", "--sizes", "2048,many"], "--sizes: got 'many'"),
        (["ops", "--sizes", "0"], "--sizes: got '0'"),
        (["ops", "--sizes", "8x"], "--sizes: got '8x'"),
        (["ops", "--only", "scalar,sdp"], "--only: got 'sdp', expected names among none, scalar,"),
        (["ops", "--seconds", "0"], "--seconds: got 0.0"),
        (["ops", "--json", "nowhere/at/all.json"], "--json: the directory of 'nowhere/at/all.json'"),
        (["mqar", "--json", "nowhere/at/all.json"], "--json: the directory of 'nowhere/at/all.json'"),
        (["mqar", "--only", "glaa"], "glaa"),
    ],
    ids=" ".join,
)
def test_invalid_options_are_reported_in_one_line(capsys, options, message):
    assert cli.main(["bench", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_kernels_are_operators_that_compute():
    with torch.no_grad():
        x, y = torch.randn(2, 1, 256), torch.randn(256, 256)
        milliseconds, operations = decode_step.profiled(lambda: (x @ y).view(-1).unsqueeze(0))
    assert milliseconds > 0
    assert operations >= 4
    names = ("aten::mm", "aten::mul", "aten::copy_", "aten::addcmul_", "aten::view", "aten::unsqueeze", "aten::matmul")
    assert [decode_step.is_kernel(name) for name in names] == [True] * 4 + [False] * 3


@pytest.mark.parametrize("name", [*BENCHMARKS, "parallel"])
def test_every_benchmark_has_help(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert exit_info.value.code == 0
    assert f"benchmarks.{name}" in capsys.readouterr().out


def test_bench_mqar_prints_and_writes_results(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("subquad.analysis.mqar.train_model", lambda model, setting: model)
    path = tmp_path / "mqar.json"
    assert cli.main(["bench", "mqar", "--only", "gla", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert {r["model"] for r in results} == {"gla"}
    assert [r["metric"] for r in results] == ["acc", "lr"] * 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(f" at lr {r['value']:g}" in line for line, r in zip(lines, results[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.sample
def test_bench_draft_counts_accepted_tokens(capsys, tmp_path):
    """A model that drafts for itself: all drafted tokens are kept, and the text is the teacher's."""
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    argv = ["bench", "draft", "nano", "--student", "itself=nano", "--text", str(text), "--contexts", "64"]
    argv += ["--drafted", "3", "--prompts", "1", "--tokens", "16", "--json", str(tmp_path / "draft.json")]
    assert cli.main(argv) == 0
    assert "texts that differ: 0" in capsys.readouterr().out
    teacher, itself = json.loads((tmp_path / "draft.json").read_text())["results"]
    assert (teacher["accepted"], teacher["speed"], teacher["differ"]) == (0, 1, 0)
    assert itself["accepted"] == 3
    assert itself["speed"] > 0


def test_gpu_check_takes_the_same_path_on_a_cpu(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
    command = [script, tmp_path, "--device", "cpu", "--seconds", "1"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["failed"] == {}
    assert set(results["parts"]) == set(gpu.PARTS)
    assert results["parts"]["distillation"][-1]["perplexity"] > 1
