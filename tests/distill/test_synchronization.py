"""Students run and train without waiting for the device, which the meta device stands for: its tensors have no values,
so that reading one raises."""

import contextlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments, masking_utils
from transformers.models.llama.modeling_llama import LlamaAttention

from subquad.config import Recipe
from subquad.distill.trainer import StageTrainer
from subquad.modeling.attention import scores
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.registry import STAGES
from tests.helpers.students import KINDS, MIXERS, make_student
from tests.helpers.teachers import tiny_teacher

META = torch.device("meta")


class NoCopiesOfValues(TorchDispatchMode):
    """Refuses operations that copy values from the host to the device, which waits for it: `.to`, and indices on the
    host. Single numbers are arguments of kernels."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.dim()]
        assert len({x.device for x in tensors}) <= 1, f"{function} copies values to the device"
        return out


class NoTensorsOfLists(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = torch.device((kwargs or {}).get("device") or "cpu")
        new = function in (torch.tensor, torch.as_tensor) and args[0] != []
        assert device.type == "cpu" or not new, "torch.tensor copies values to the device"
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting():
    with NoTensorsOfLists(), NoCopiesOfValues():
        yield


def ids(T=40):
    return torch.empty(3, T, dtype=torch.long, device=META)


def run(student):
    student(input_ids=ids()).logits.sum().backward()
    with torch.no_grad():
        out = student(input_ids=ids(), use_cache=True)
        for _ in range(2):
            out = student(input_ids=ids(1), use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.any()),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0, 2.0], device=x.device) + x,
        lambda x: torch.ones(2).to(x.device),
        lambda x: x[torch.tensor([1, 0])],
    ],
)
def test_what_waits_for_the_device_raises(read):
    with no_waiting(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        read(torch.empty(2, device=META))


@pytest.mark.parametrize("layers", [*KINDS.values(), *({"default": mixer} for mixer in MIXERS)], ids=str)
def test_forward_backward_and_decoding(layers):
    student = make_student(tiny_teacher(head_dim=16), layer_types=layers).to(META)
    run(student)  # tensors that are kept, such as the indices of a group of heads
    with no_waiting():
        run(student)


STUDENTS = {name: KINDS[name] for name in ("pure", "window", "near_far")}


@pytest.fixture
def on_meta(monkeypatch):
    """Lets the Trainer and AdamW take meta tensors, and skips two reads of values: `transformers` reads the teacher's
    positions once a batch, and the eager attention of a class is tried once."""
    monkeypatch.setitem(scores._row_slicing, LlamaAttention, True)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    monkeypatch.setattr(TrainingArguments, "device", META)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda parameter: None)


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.usefixtures("on_meta")
def test_a_step_of_training(name, kind, tmp_path):
    teacher = tiny_teacher(head_dim=16)
    student = make_student(teacher, layer_types=STUDENTS[kind]).to(META)
    stage = {"tokens": 640, "lr": 1e-3, "batch_size": 4, "micro_batch_size": 2}
    if (name, kind) == ("hidden", "near_far"):
        stage["far_weight"] = 1.0
    data = {"source": "python-stdlib", "seq_len": 40}
    layers = {"layer_types": STUDENTS[kind]}
    recipe = Recipe.model_validate({"teacher": "nano", "data": data, "student": layers, "stages": {name: stage}})
    attention = {"attention_layers": discover_attention(teacher)}
    objective = STAGES[name](teacher.to(META), getattr(recipe.stages, name), scale_ids=ids(), **attention)
    trainer = StageTrainer(recipe, objective, student, [], [], tmp_path)
    optimizer = trainer.create_optimizer()

    def step():
        batches, _ = trainer.get_batch_samples(iter([{"input_ids": ids()} for _ in range(2)]), 2, META)
        trainer.current_gradient_accumulation_steps = 2
        losses = [trainer.training_step(student, batch) for batch in batches]
        trainer.accelerator.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        student.zero_grad()
        return losses

    step()  # allocates the optimizer's state
    with no_waiting():
        losses = step()
    assert all(loss.is_meta for loss in losses)
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.check_steps()
