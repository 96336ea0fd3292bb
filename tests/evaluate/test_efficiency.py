"""Costs of known sizes: caches that grow or not, peaks that are there, lengths that are left out."""

import time

import pytest
import torch

import subquad
from subquad.evaluate.baselines import int8_teacher, windowed_teacher
from subquad.evaluate.efficiency import cache_bytes, efficiency_results, prefill, timed, with_peak
from subquad.evaluate.results import one, select
from subquad.modeling.cache import CACHE_ARGUMENT


def test_rows_of_a_teacher_and_its_student(make_teacher):
    teacher = make_teacher()
    models = {"teacher": teacher, "gla": subquad.linearize(teacher, "gla").eval()}
    rows = efficiency_results(models, [16, 64], batches=(1, 2), repeats=2)
    held = {
        name: [one(found, metric="cache_bytes", length=n, batch=1).value for n in (16, 64)]
        for name, found in rows.items()
    }
    heads, layers, head_dim = 2, 2, 8
    assert held["teacher"] == [2 * heads * layers * head_dim * n * 4 for n in (16, 64)]
    assert held["gla"][0] == held["gla"][1] == layers * 4 * head_dim * head_dim * 4
    for found in rows.values():
        assert len(found) == 2 * 2 * 4
        for metric in ("prefill_seconds", "seconds_per_token"):
            for row in select(found, metric=metric):
                assert row.n == 2
                assert 0 < row.low <= row.value <= row.high
    assert not teacher.training


def test_a_length_that_would_take_too_long_is_left_out(make_teacher, caplog):
    caplog.set_level("INFO", logger="subquad")
    rows = efficiency_results({"teacher": make_teacher()}, [8, 64], repeats=1, seconds=0.0)
    assert {row.length for row in rows["teacher"]} == {8}
    assert "leaving out 64 tokens" in caplog.text


def test_peaks_and_times():
    def call():
        x = torch.ones(32, 2**20)  # 128 MiB
        time.sleep(0.01)
        return x.sum()

    result, peak = with_peak(call, torch.device("cpu"))
    assert result == 2**25
    assert peak is None or 100 * 2**20 < peak < 200 * 2**20
    assert timed(call, torch.device("cpu"))[1] >= 0.01


def test_prefill_keeps_the_last_logits(make_teacher):
    teacher = make_teacher()
    ids = torch.randint(3, 61, (2, 9))
    out = prefill(teacher, ids)
    assert torch.allclose(out.logits[:, -1], teacher(ids).logits[:, -1], atol=1e-5)
    assert out.logits.shape[1] == 1
    assert cache_bytes(out[CACHE_ARGUMENT]) > 0


def test_the_windowed_teacher_is_the_teacher_within_its_window(make_teacher):
    teacher = make_teacher()
    ids = torch.randint(3, 61, (2, 24))
    windowed = windowed_teacher(teacher, window=8, sinks=2)
    with torch.no_grad():
        whole, cut = teacher(ids).logits, windowed(ids).logits
    assert torch.allclose(whole[:, :8], cut[:, :8], atol=1e-5)
    assert not torch.allclose(whole[:, 16:], cut[:, 16:], atol=1e-2)


@pytest.mark.parametrize("name", ["plain", "wide-biased-tied"])
def test_the_teacher_in_int8_is_near_and_the_teacher_untouched(make_teacher, name):
    pytest.importorskip("torchao", reason="the teacher in int8 needs torchao (extra: eval)")
    # weights of whole rows: quantized in groups of a row
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
