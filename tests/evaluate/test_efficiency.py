"""Cache sizes, peak memory and times, and the baselines."""

import time

import pytest
import torch

import subquad
from subquad.evaluate import suites
from subquad.evaluate.baselines import int8_teacher, windowed_teacher
from subquad.evaluate.efficiency import efficiency_results, peak_memory, prefill, timed
from subquad.evaluate.results import select
from subquad.evaluate.runner import EvalModel, Evaluation
from subquad.modeling.cache import CACHE_ARGUMENT, cache_bytes
from subquad.utils import run_info
from tests.helpers.results import select_one


def test_results_of_teacher_and_student(make_teacher):
    teacher = make_teacher()
    models = {"teacher": teacher, "gla": subquad.linearize(teacher, "gla").eval()}
    results = efficiency_results(models, [16, 64], batches=(1, 2), repeats=2)
    sizes = {
        name: [select_one(found, metric="cache_bytes", length=n, batch=1).value for n in (16, 64)]
        for name, found in results.items()
    }
    heads, layers, head_dim = 2, 2, 8
    assert sizes["teacher"] == [2 * heads * layers * head_dim * n * 4 for n in (16, 64)]
    assert sizes["gla"][0] == sizes["gla"][1] == layers * 4 * head_dim * head_dim * 4
    for found in results.values():
        assert len(found) == 2 * 2 * 4
        for metric in ("prefill_seconds", "seconds_per_token"):
            for result in select(found, metric=metric):
                assert result.n == 2
                assert 0 < result.low <= result.value <= result.high
    assert not teacher.training


def test_slow_lengths_are_skipped(make_teacher, caplog):
    caplog.set_level("INFO", logger="subquad")
    results = efficiency_results({"teacher": make_teacher()}, [8, 64], repeats=1, max_prefill_seconds=0.0)
    assert {result.length for result in results["teacher"]} == {8}
    assert "skipped 64 tokens" in caplog.text


def test_peak_memory_and_time_of_a_call():
    def call():
        x = torch.ones(32, 2**20)  # 128 MiB
        time.sleep(0.01)
        return x.sum()

    result, peak = peak_memory(call, torch.device("cpu"))
    assert result == 2**25
    assert peak is None or 100 * 2**20 < peak < 200 * 2**20
    assert timed(call, torch.device("cpu"))[1] >= 0.01


def test_prefill_returns_the_last_logits(make_teacher):
    teacher = make_teacher()
    ids = torch.randint(3, 61, (2, 9))
    out = prefill(teacher, ids)
    assert torch.allclose(out.logits[:, -1], teacher(ids).logits[:, -1], atol=1e-5)
    assert out.logits.shape[1] == 1
    assert cache_bytes(out[CACHE_ARGUMENT]) > 0


def test_windowed_teacher_equals_teacher_within_the_window(make_teacher):
    teacher = make_teacher()
    ids = torch.randint(3, 61, (2, 24))
    windowed = windowed_teacher(teacher, window=8)
    with torch.no_grad():
        full, limited = teacher(ids).logits, windowed(ids).logits
    assert torch.allclose(full[:, :12], limited[:, :12], atol=1e-5)
    assert not torch.allclose(full[:, 16:], limited[:, 16:], atol=1e-2)
    assert {id(p) for p in windowed.parameters()} == {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("name", ["plain", "wide-biased-tied"])
def test_int8_teacher_is_close_and_a_copy(make_teacher, name):
    pytest.importorskip("torchao", reason="the teacher in int8 needs torchao (extra: eval)")
    # sizes that int8 rows need
    teacher = make_teacher(name, hidden_size=64, intermediate_size=96)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    quantized = int8_teacher(teacher)
    ids = torch.randint(3, 61, (2, 12))
    with torch.no_grad():
        exact, near = teacher(ids).logits, quantized(ids).logits
    error = (near - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.05
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert quantized.get_output_embeddings().weight.dtype != torch.float32 or "Int8" in str(
        type(quantized.get_output_embeddings().weight)
    )


def test_times_of_one_device_are_not_those_of_another(make_teacher, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(suites, "efficiency_results", lambda models, *options: measured.append(1) or {"teacher": []})
    model = EvalModel("teacher", make_teacher(), None, ("teacher",))
    for device, count in (("cpu", 1), ("cpu", 1), ("some GPU", 2)):
        monkeypatch.setattr(suites, "device_name", lambda _, device=device: device)
        suites.efficiency_suite(Evaluation([model], None, suites.Settings(), tmp_path), model)
        assert len(measured) == count, device


def test_the_header_names_the_device_of_the_models(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    assert run_info()["device"] == run_info(torch.device("cuda", 0))["device"] == "some GPU"
    assert run_info(torch.device("cpu"))["device"].startswith("cpu, ")
