"""How often a forward pass reads the values of tensors, for which an accelerator has to finish all its work."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import subquad
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.ops import checks
from tests.helpers.architectures import build_teacher
from tests.helpers.students import MIXERS, SCALE_IDS
from tests.helpers.teachers import tiny_teacher

READS = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
HYBRID = {"default": "gla", "1": "attention", "2": {"mixer": "attention", "window": 4}, "3": "xlstm"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(student, **inputs):
    """The reads of a forward pass, its searches for nonzero numbers, and its result."""
    with torch.no_grad(), Operations() as operations, Functions() as functions:
        out = student(**inputs)
    reads = sum(operations.counts[name] for name in READS) + functions.counts["tolist"]
    return reads, operations.counts["nonzero"], out


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch):
    """Where ops do not read the values of their arguments."""
    monkeypatch.setattr(checks, "can_read_values", lambda x: False)


@pytest.fixture(scope="module", params=["gla", "hybrid", "gpt2"])
def student(request):
    if request.param == "gpt2":
        return subquad.linearize(build_teacher("gpt2"), "gla", scale_ids=SCALE_IDS)
    teacher = tiny_teacher(num_hidden_layers=4)
    options = {"layer_types": HYBRID} if request.param == "hybrid" else {"mixer": request.param}
    return subquad.linearize(teacher, scale_ids=SCALE_IDS, **options)


IDS = torch.arange(3, 27).view(2, 12)
PADDED = torch.ones_like(IDS).index_fill(1, torch.arange(3), 0)


def test_without_a_mask_nothing_is_read(student):
    reads, nonzero, out = count(student, input_ids=IDS, use_cache=True)
    assert (reads, nonzero) == (0, 0)
    cache = {"past_key_values": out[CACHE_ARGUMENT]}
    assert count(student, input_ids=IDS[:, :1], use_cache=True, **cache)[:2] == (0, 0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_of_a_mixer_reads_nothing_on_a_cpu_either(mixer, monkeypatch):
    student = subquad.linearize(tiny_teacher(), mixer, scale_ids=SCALE_IDS)
    cache = {"past_key_values": count(student, input_ids=IDS, use_cache=True)[-1][CACHE_ARGUMENT]}
    monkeypatch.setattr(checks, "can_read_values", lambda x: True)
    assert count(student, input_ids=IDS[:, :1], use_cache=True, **cache)[:2] == (0, 0)


def test_a_mask_is_read_once(student):
    reads, nonzero, out = count(student, input_ids=IDS, attention_mask=PADDED, use_cache=True)
    assert (reads, nonzero) == (1, 0)
    cache = {"past_key_values": out[CACHE_ARGUMENT]}
    mask = F.pad(PADDED, (0, 1), value=1)
    assert count(student, input_ids=IDS[:, :1], attention_mask=mask, use_cache=True, **cache)[:2] == (1, 0)


def test_documents_are_located_once_for_all_layers():
    students = [
        subquad.linearize(tiny_teacher(num_hidden_layers=layers), "retnet", scale_ids=SCALE_IDS, short_conv=0)
        for layers in (2, 5)
    ]
    inputs = {"input_ids": IDS, "position_ids": torch.arange(6).repeat(2, 2), "use_cache": False}
    assert count(students[0], **inputs)[1] == count(students[1], **inputs)[1] == 2
    for student in students:
        with torch.no_grad(), Operations() as operations:
            student(**inputs)
        assert sum(operations.counts[name] for name in READS) == 0  # the one list is not counted here


def test_generation_without_padding_reads_the_mask_once(student):
    reads = []
    forward = student.forward

    def spy(**inputs):
        found = count(forward, **inputs)
        reads.append(found[0])
        return found[2]

    student.forward = spy
    try:
        with_mask = student.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    finally:
        del student.forward
    assert reads[1:] == [0, 0, 0, 0]
    assert reads[0] <= 1
    assert torch.equal(with_mask, student.generate(IDS, max_new_tokens=5, do_sample=False))
