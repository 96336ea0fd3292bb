"""Budgets that may be spent on memories: measured errors against students with them, what is chosen and stored."""

import pytest
import torch

import subquad
from subquad.modeling.attention.activations import capture_activations, layer_path
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.budget import allocate_budget, memory_windows
from subquad.modeling.linearize import build_student
from subquad.modeling.memory_errors import MemoryCandidates, set_memory
from subquad.modeling.summary import cache_sizes, meta_model
from subquad.modeling.window_errors import octave_weights, window_errors
from subquad.utils import UserError
from tests.helpers.architectures import build_teacher
from tests.helpers.students import SCALE_IDS, all_close, logits, reloaded
from tests.helpers.teachers import tiny_teacher

SINKS = 4


def tokens(rows, length, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def measured(teacher, mixer, windows, ids):
    layers = discover_attention(teacher)
    candidates = MemoryCandidates(mixer, layers, windows, SINKS)
    window_errors(teacher, layers, ids, windows, SINKS, visit=candidates.visitor(len(ids)))
    return layers, candidates


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "xlstm", "metala"])
def test_errors_are_those_of_a_student_with_the_fitted_memory(mixer):
    """|d|^2 / |h|^2 of one head of the first layer, whose inputs are the teacher's."""
    teacher, ids = tiny_teacher(vocab_size=61), tokens(2, 40)
    layers, candidates = measured(teacher, mixer, [4, 9], ids)
    for place, window in enumerate([4, 9]):
        for head in range(2):
            own = [window if g == head else "full" for g in range(2)]
            specs = [candidates.layer_spec(own, [head]), {"mixer": "attention"}]
            student = build_student(teacher, specs, layers, None).eval()
            fitted = candidates.fitted[0, window]
            set_memory(student.mixer_layers[0], [fitted if g == head else None for g in range(2)])
            outputs = []
            for model, module in ((teacher, layers[0].module), (student.base, student.mixer_layers[0])):
                found = {}
                block = model.get_submodule(layer_path(layers[0].path))
                with capture_activations([(module, None), (block, None)], found.__setitem__):
                    model(input_ids=ids[:1], use_cache=False)
                outputs.append((found[0].output[0], found[1].hidden_states[0]))
            (full, h), (with_memory, _) = outputs
            expected = (with_memory - full).square().sum(-1) / h.square().sum(-1)
            assert expected[20:].min() > 0
            assert all_close(candidates.errors[0][0, head, place], expected, 1e-4)


def test_fitted_memories_are_better_than_windows_alone():
    """On the row on which they were measured, which is not that of the fit."""
    teacher, tokenizer = subquad.load_teacher("nano")
    text = "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n        self.x = x\n" * 40
    ids = torch.tensor(tokenizer(text).input_ids)[:1024].view(2, 512)
    layers = discover_attention(teacher)
    candidates = MemoryCandidates("gated_deltanet", layers, [16], SINKS)
    window_errors(teacher, layers, ids, [16], SINKS, visit=candidates.visitor(2))
    weights = octave_weights(512)
    with_memory = sum(float((errors[0].double() @ weights).sum()) for errors in candidates.errors)
    for fitted in candidates.fitted.values():  # a share of zero
        fitted.merge["m_proj.bias"].fill_(-1e4)
        fitted.merge["m_proj.weight"].zero_()
        fitted.merge["lse_weight"].zero_()
    candidates.errors, candidates.fit = [], lambda *_: None
    window_errors(teacher, layers, ids, [16], SINKS, visit=candidates.visitor(2))
    without = sum(float((errors[0].double() @ weights).sum()) for errors in candidates.errors)
    assert with_memory < 0.8 * without


def spend_on_memories(monkeypatch, teacher, budget, heads, mixer):
    """A student and its allocation, where memories seem to make no error for `heads` (layer, head)."""

    def head_errors(self):
        found = []
        for index, info in enumerate(self.layers):
            chosen = [[0.0 if (index, g) in heads else 1e9] for g in range(info.spec.num_kv_heads)]
            found.append(torch.tensor(chosen).expand(-1, len(self.windows)))
        return found

    monkeypatch.setattr(MemoryCandidates, "head_errors", head_errors)
    ids = tokens(2, 64)
    allocation = allocate_budget(teacher, budget, ids, memory=mixer)
    student = subquad.linearize(teacher, budget=budget, calibration_ids=ids, budget_memory=mixer)
    return allocation, student.eval()


@pytest.mark.parametrize(
    ("model_type", "budget", "mixer"),
    [
        ("llama", 24, "gated_deltanet"),
        ("qwen3", 24, "mamba2"),
        ("llama", 8, "gla"),
        ("gemma4_text", 96, "gated_deltanet"),
    ],
)
def test_memories_are_paid_for_and_saved(monkeypatch, tmp_path, model_type, budget, mixer):
    """Not in layers with the teacher's own window."""
    teacher = build_teacher(model_type)
    layers = discover_attention(teacher)
    heads = {(i, (i + 1) % info.spec.num_kv_heads) for i, info in enumerate(layers)}
    allocation, student = spend_on_memories(monkeypatch, teacher, budget, heads, mixer)
    limited = [info.spec.window is not None for info in layers]
    expected = [[g for i, g in sorted(heads) if i == index and not limited[index]] for index in range(len(limited))]
    assert allocation.memory_heads == expected
    assert any(expected)
    assert allocation.layer_types == {str(i): spec for i, spec in enumerate(student.config.layer_specs)}
    cache = student.new_cache()
    with torch.no_grad():
        student(tokens(1, 80), use_cache=True, past_key_values=cache)
    assert cache.nbytes() <= allocation.budget_bytes
    assert cache.nbytes() == allocation.cache_bytes == cache_sizes(meta_model(student.config), 4096)[0]
    ids = tokens(2, 50)
    assert torch.equal(logits(reloaded(student, tmp_path), ids), logits(student, ids))
    for index, own in enumerate(expected):
        for head in own:
            fitted = allocation.memories.fitted[index, allocation.windows[index][head]]
            rows = slice(2 * head, 2 * head + 2)  # two query heads for each key/value head
            assert torch.equal(
                student.mixer_layers[index].merge.m_proj.weight[rows], fitted.merge["m_proj.weight"][rows]
            )
            assert all_close(student.mixer_layers[index].mixer.o_norm[rows], fitted.scale[rows], 1e-6)
    short = tokens(1, 1 + SINKS)  # every window has a token at least
    assert all_close(logits(student, short), logits(teacher, short), 1e-5)


def test_memories_too_dear_are_not_chosen(monkeypatch):
    teacher = build_teacher("llama")
    heads = {(0, 0), (0, 1), (1, 0), (1, 1)}
    allocation, student = spend_on_memories(monkeypatch, teacher, 1, heads, "gated_deltanet")
    assert not any(allocation.memory_heads)
    assert {spec["mixer"] for spec in student.config.layer_specs} == {"attention"}


def test_tried_windows():
    assert memory_windows("gated_deltanet", [1, 2, 4, 8, 16, 32, 64, 96, 128], 100) == [32, 96]
    assert memory_windows("mamba2", [1, 2, 4, 8, 16, 32, 64, 96, 128], 100) == [16, 32, 96, 128]
    assert memory_windows("gla", [1, 2, 4], 2) == [1, 2, 4]


def test_what_is_refused():
    teacher = tiny_teacher()
    with pytest.raises(UserError, match="budget_memory: got gla without a budget"):
        subquad.linearize(teacher, "gla", budget_memory="gla", scale_ids=SCALE_IDS)
    with pytest.raises(UserError, match="unknown mixer 'glas'; did you mean 'gla'"):
        subquad.linearize(teacher, budget="8", budget_memory="glas", calibration_ids=tokens(2, 32))
