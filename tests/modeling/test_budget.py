"""Budgets: the errors of windows against students with these windows, what is spent, and what is refused."""

import copy
import itertools

import pytest
import torch

import subquad
from subquad.analysis.layer_access import run_on
from subquad.evaluate.perplexity import compare
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.budget import Choice, allocate_budget, budget_bytes, spend
from subquad.modeling.layers import AttentionLayer
from subquad.modeling.window_errors import (
    mean_ratio,
    octave_weights,
    record_layers,
    squared_changes,
    window_errors,
    windowed_outputs,
)
from subquad.utils import UserError
from tests.helpers.architectures import ARCHITECTURES, build_teacher, cached_teacher
from tests.helpers.students import SCALE_IDS, all_close, logits
from tests.helpers.teachers import tiny_teacher

SINKS = 4


def tokens(rows, length, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("first", [0, 5, 15])
def test_outputs_of_all_windows_equal_masked_attention(first):
    """Also with a learned sink, which takes a tenth of the probability."""
    generator = torch.Generator().manual_seed(first)
    T, windows = 70, [1, 2, 6, 12, 16, 32, 48, 64]
    scores = torch.randn(2, 3, T, T, generator=generator).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -1e30)
    P, values = 0.9 * scores.softmax(-1), torch.randn(2, T, 5, generator=generator)
    queries = torch.arange(T)[first::16]
    distance = queries[:, None] - torch.arange(T)
    outputs = windowed_outputs(P[:, :, queries], values, queries, windows, SINKS)
    for window, found in zip(windows, outputs, strict=True):
        seen = P[:, :, queries] * ((distance < window) | (torch.arange(T) < SINKS))
        expected = seen @ values[:, None] / (seen.sum(-1, keepdim=True) + 0.1)
        assert all_close(found, expected, 1e-5), window


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_changes_equal_those_of_a_layer_with_that_window(model_type):
    """|d|^2 / |h|^2 and (g . d)^2 of one head's window, from running the layer with it."""
    teacher, ids = build_teacher(model_type), tokens(1, 37)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(3.0)  # a share of the probability that float32 can represent
    layers = discover_attention(teacher)
    recorded = record_layers(teacher, layers, ids, torch.Generator().manual_seed(0))
    for info, (activations, layer_input, gradient) in zip(layers, recorded, strict=True):
        found = squared_changes(info, activations, layer_input, gradient, slice(3, None, 16), [4, 16], SINKS).sqrt()
        g, size = gradient[0, 3::16], layer_input[0, 3::16].norm(dim=-1)
        rounding = 3e-6 * torch.stack((torch.ones_like(size), g.norm(dim=-1) * size))
        with torch.no_grad():
            whole = run_on(AttentionLayer(info.module, info.spec, info.index), activations)
            for head, index in itertools.product(range(info.spec.num_kv_heads), range(2)):
                windows = ["full"] * info.spec.num_kv_heads
                windows[head] = (4, 16)[index]
                layer = AttentionLayer(info.module, info.spec, info.index, windows, SINKS)
                d = (run_on(layer, activations) - whole)[0, 3::16]
                expected = torch.stack((d.norm(dim=-1) / size, (d * g).sum(-1).abs()))
                limit = 1e-2 * expected.amax(-1, keepdim=True) + rounding
                assert ((found[:, head, index] - expected).abs() <= limit).all()


def test_half_the_squared_slope_is_the_divergence():
    """Of the last layer, whose change at a token reaches the prediction there only; the estimate leaves sinks at their
    true distance, so there are none."""
    teacher = tiny_teacher(vocab_size=61)
    attention = discover_attention(teacher)[-1]
    with torch.no_grad():
        attention.module.o_proj.weight.mul_(0.05)
    ids, predicted = tokens(1, 33), []
    narrow = subquad.linearize(
        teacher,
        layer_types={"default": "attention", "1": {"mixer": "attention", "window": [2, "full"], "sinks": 0}},
        scale_ids=SCALE_IDS,
    )
    log_p, log_q = (logits(model, ids)[0].double().log_softmax(-1) for model in (teacher, narrow))
    actual = (log_p.exp() * (log_p - log_q)).sum(-1)[::16]
    for seed in range(400):
        layers = record_layers(teacher, discover_attention(teacher), ids, torch.Generator().manual_seed(seed))
        predicted.append(squared_changes(attention, *layers[-1], slice(0, None, 16), [2], 0)[1, 0, 0] / 2)
    mean, error = torch.stack(predicted).mean(0), torch.stack(predicted).std(0) / 20
    assert actual[1:].min() > 0
    assert ((mean - actual).abs() <= 4 * error + 0.1 * actual).all()


def test_octaves_of_the_context_have_equal_weights():
    weights = octave_weights(2048)
    for end in (2048, 1024, 512, 256, 128, 64):
        assert float(weights[end // 2 : end].sum()) == pytest.approx(1, abs=0.02)
    assert weights[:30].sum() == 0
    assert octave_weights(5).isfinite().all()


def test_mean_ratio_leaves_out_windows_that_change_nothing():
    ratio = mean_ratio(torch.tensor([[8.0, 2.0, 0.0, 1.0]]), torch.tensor([[2.0, 2.0, 5.0, 1e-9]]))
    assert float(ratio) == pytest.approx(2)
    assert float(mean_ratio(torch.zeros(1, 3), torch.zeros(1, 3))) == 1


def test_teacher_is_left_as_it_was():
    teacher = build_teacher("llama").train()
    before = copy.deepcopy(teacher.state_dict())
    teacher.model.embed_tokens.weight.requires_grad_(False)
    window_errors(teacher, discover_attention(teacher), tokens(2, 40), [1, 16], SINKS)
    assert teacher.training
    assert [p.requires_grad for p in teacher.parameters()] == [False] + [True] * (len(list(teacher.parameters())) - 1)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.model.embed_tokens._forward_hooks


# ---------------------------------------------------------------------- spending


def test_each_step_takes_the_largest_gain_per_byte():
    first = [Choice(1, 10, 4.0), Choice(2, 20, 3.0), Choice(4, 40, 0.0)]
    second = [Choice(1, 10, 1.0), Choice(8, 25, 0.5)]
    assert [c.window for c in spend([first, second], 20)] == [1, 1]
    assert [c.window for c in spend([first, second], 30)] == [2, 1]
    assert [c.window for c in spend([first, second], 50)] == [4, 1]
    assert [c.window for c in spend([first, second], 1000)] == [4, 8]
    with pytest.raises(UserError, match="budget: got 19 bytes, expected at least 20"):
        spend([first, second], 19)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma4_text", "falcon"])
@pytest.mark.parametrize("budget", ["8", "3kB"])
def test_cache_takes_at_most_the_budget(model_type, budget):
    teacher = build_teacher(model_type, sliding_window=11)
    ids = tokens(2, 64)
    layers = discover_attention(teacher)
    allocation = allocate_budget(teacher, budget, ids)
    total = budget_bytes(budget, layers, torch.float32)
    if budget == "8":
        assert total == 12 * sum(i.spec.num_kv_heads * (i.spec.head_dim + i.spec.value_dim) * 4 for i in layers)
    student = subquad.linearize(teacher, budget=budget, calibration_ids=ids)
    assert [list(layer.windows) for layer in student.mixer_layers] == allocation.windows
    cache = student.new_cache()
    logits(student, tokens(1, 60), past_key_values=cache)
    size = cache.nbytes()
    logits(student, tokens(1, 4), past_key_values=cache)
    counts = 8 * len(cache.layers) if model_type == "falcon" else 0  # its layers count tokens in a tensor
    assert cache.nbytes() == size == allocation.cache_bytes + counts
    assert 0.8 * total < allocation.cache_bytes <= total
    if model_type == "mistral":
        assert max(w for windows in allocation.windows for w in windows) <= 11


def test_head_that_looks_far_gets_the_larger_window():
    """The other head's output projection is zero: its window costs nothing. A head also pays for a rotation."""
    teacher = build_teacher("llama")
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[:, 16:] = 0
    allocation = allocate_budget(teacher, "8", tokens(2, 64))
    for far, near in allocation.windows:
        assert near == 1
        assert far >= 12
    assert allocation.uniform_error > sum(map(sum, allocation.errors))
    context = allocate_budget(teacher, "30", tokens(2, 64), budget_context=40)
    assert context.windows == [[None, 1]] * 2
    kept = allocate_budget(teacher, "8", tokens(2, 64), keep_groups=[(1, 1)])
    assert kept.windows[1][1] is None
    assert kept.windows[1][0] >= 6


def test_budgeted_student_is_closer_than_the_uniform_window():
    teacher, tokenizer = subquad.load_teacher("nano")
    text = "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n        self.x = x\n" * 40
    ids = torch.tensor(tokenizer(text).input_ids)
    calibration, rows = ids[:512].view(2, 256), ids[512:1024].view(2, 256)
    uniform = {"default": {"mixer": "attention", "window": 12, "sinks": 4}}
    kl = [
        compare(student.eval(), teacher, [rows])["kl"]
        for student in (
            subquad.linearize(teacher, budget="12", calibration_ids=calibration),
            subquad.linearize(teacher, layer_types=uniform),
        )
    ]
    assert kl[0] < 0.9 * kl[1]


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize("budget", ["", "x", "-4", "96.5", "4 PB", True, "4 kb/s"])
def test_invalid_budgets_are_refused(budget):
    with pytest.raises(UserError, match=r"budget: got .*expected a number of tokens such as '96'"):
        subquad.linearize(cached_teacher("llama"), budget=budget, calibration_ids=tokens(1, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "8"}, "budget: got no calibration_ids"),
        ({"budget_context": 8}, "budget_context: got 8 without a budget"),
        (
            {"budget": "8", "layer_types": {"default": "gla"}, "calibration_ids": SCALE_IDS},
            "budget: got layer_types too",
        ),
        ({"budget": "8", "half_life": 3.0, "calibration_ids": SCALE_IDS}, "budget: got half_life too"),
        ({"budget": "100B", "calibration_ids": tokens(1, 32)}, "budget: got 100 bytes, expected at least"),
        ({"keep_groups": [(0, 0)]}, "keep_groups: layer 0 is gated_deltanet, expected attention"),
        ({"keep_groups": [(0, 2)], "layer_types": {"default": "attention"}}, "keep_groups: got layer 0 and head 2"),
        ({"keep_groups": [(2, 0)], "layer_types": {"default": "attention"}}, "keep_groups: got layer 2 and head 0"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        subquad.linearize(cached_teacher("llama"), **arguments)


def test_kept_groups_see_all_tokens():
    types = {"default": {"mixer": "attention", "window": 5, "sinks": 1}, "1": {"mixer": "attention", "window": [3, 4]}}
    student = subquad.linearize(cached_teacher("llama"), layer_types=types, keep_groups=[(0, 1), (1, 0)])
    assert [layer.windows for layer in student.mixer_layers] == [(5, None), (None, 4)]
    assert student.config.layer_specs[0]["window"] == [5, "full"]
