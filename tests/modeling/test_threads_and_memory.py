"""Teachers are linearized in several threads at once; a lack of memory is reported as such and remembered nowhere."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import subquad
from subquad.modeling.attention import discovery, scores
from subquad.modeling.attention.activations import capture_activations
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.attention.scores import AttentionProbabilities
from subquad.utils import UserError
from tests.helpers.students import SCALE_IDS, checksum
from tests.helpers.teachers import tiny_teacher


def in_two_threads(work):
    """Runs `work(0)` and `work(1)` at once; raises what one of them raises."""
    start = threading.Barrier(2)

    def run(n):
        start.wait()
        work(n)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))


def test_two_threads_linearize_two_teachers_at_once():
    teachers = [tiny_teacher("plain"), tiny_teacher("qwen3", num_hidden_layers=3)]

    def student(n):
        return subquad.linearize(teachers[n], ("gla", "xlstm")[n], copy_qkv=False, scale_ids=SCALE_IDS)

    expected = [checksum(student(n)) for n in range(2)]

    def work(n):
        for _ in range(6):
            assert len(discover_attention(teachers[n])) == n + 2
            assert checksum(student(n)) == expected[n]

    in_two_threads(work)


def attention_call(teacher):
    """The attention of a teacher's first layer, and the arguments with which the teacher calls it."""
    found = {}
    attention = teacher.model.layers[0].self_attn
    with torch.no_grad(), capture_activations([(attention, None)], found.__setitem__):
        teacher(input_ids=torch.arange(3, 23)[None], use_cache=False)
    return attention, found[0].args, found[0].kwargs


def test_two_threads_ask_for_rows_of_two_teachers_at_once():
    calls = [attention_call(tiny_teacher(seed=n, vocab_size=61 + n)) for n in range(2)]
    rows = [slice(2, 5), slice(7, 15)]

    def some_rows(n):
        attention, args, kwargs = calls[n]
        with torch.no_grad():
            return AttentionProbabilities(attention, None, 0, args, kwargs)(rows[n])

    expected = [some_rows(n) for n in range(2)]

    def work(n):
        for _ in range(100):
            assert torch.equal(some_rows(n), expected[n])

    in_two_threads(work)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory"),
]
UNEXPECTED = [*OUT_OF_MEMORY, RuntimeError("an internal assertion failed")]


@pytest.mark.parametrize("error", UNEXPECTED)
def test_errors_of_row_slicing_are_raised_and_not_remembered(error, monkeypatch):
    attention, args, kwargs = attention_call(tiny_teacher())
    monkeypatch.setattr(scores, "_row_slicing", {})
    module = sys.modules[type(attention).__module__]
    eager = module.eager_attention_forward

    def fails_for_some_rows(attention, query, key, *args, **kwargs):
        if query.shape[2] < key.shape[2]:
            raise error
        return eager(attention, query, key, *args, **kwargs)

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(module, "eager_attention_forward", fails_for_some_rows)
            with pytest.raises(RuntimeError, match=str(error)[-20:]):
                AttentionProbabilities(attention, None, 0, args, kwargs)(slice(2, 4))
        assert not scores._row_slicing
        AttentionProbabilities(attention, None, 0, args, kwargs)(slice(2, 4))
    assert scores._row_slicing == {type(attention): True}


@pytest.mark.parametrize("error", UNEXPECTED)
def test_errors_of_the_rotary_probe_are_raised(error, monkeypatch):
    def fails(*args):
        raise error

    monkeypatch.setattr(discovery, "apply_rotary", fails)
    with pytest.raises(RuntimeError, match=str(error)[-20:]):
        discover_attention(tiny_teacher())


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_teacher_without_memory_is_not_called_unsupported(error, monkeypatch):
    teacher = tiny_teacher()

    def fails(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(teacher.model.layers[1].mlp, "forward", fails)
        with pytest.raises(RuntimeError) as raised:
            discover_attention(teacher)
    assert not isinstance(raised.value, UserError)
    with monkeypatch.context() as patch:
        patch.setattr(subquad.modeling.linearize.SubquadForCausalLM, "forward", fails)
        with pytest.raises(RuntimeError, match=str(error)[-20:]):
            subquad.linearize(teacher, scale_ids=SCALE_IDS)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
        with pytest.raises(RuntimeError, match=str(error)[-20:]):
            subquad.load_teacher("nano")
