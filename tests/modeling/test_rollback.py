"""`crop`: a cache from which the last tokens were removed is the cache of the tokens before them."""

import pytest
import torch

from subquad.modeling.rollback import RECORDED_TOKENS
from tests.helpers.architectures import build_teacher
from tests.helpers.students import MIXERS, all_close, make_student

WINDOW = {"mixer": "attention", "window": [3, 5], "sinks": 2}
LAYER_TYPES = {
    **{name: {"default": name} for name in MIXERS},
    "hybrid": {"default": "gla", "1": "attention"},
    "window": {"default": WINDOW},
    "one window": {"default": {**WINDOW, "window": 4}},
    "near_far": {"default": {"mixer": "gated_deltanet", "window": [3, 5], "sinks": 2}},
    "near_far denominator": {
        "default": {"mixer": "retnet", "window": 4, "sinks": 1, "merge": "denominator", "qk_activation": "relu"}
    },
    "near_far all": {"default": {"mixer": "mamba2", "window": 4, "memory": "all"}},
}
CASES = [("llama", kind) for kind in LAYER_TYPES]
CASES += [(name, kind) for name in ("gpt2", "gemma3_text", "gpt_neo") for kind in ("hybrid", "one window")]
PROMPT, CALLS = 9, (1, 1, 5, 1)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def student(request):
    name, kind = request.param
    return make_student(build_teacher(name), layer_types=LAYER_TYPES[kind]).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def run_calls(student, ids, calls, mask=None, record_after=0):
    """A cache of the tokens of `calls`, the first of which is not recorded unless `record_after` is 0."""
    cache, start = student.new_cache(), 0
    for index, count in enumerate(calls):
        if index == record_after:
            cache.activate_past_recording()
        stop = start + count
        given = {} if mask is None else {"attention_mask": mask[:, :stop]}
        student(ids[:, start:stop], past_key_values=cache, **given)
        start = stop
    return cache


@torch.no_grad()
def next_logits(student, ids, cache, start, mask=None):
    given = {} if mask is None else {"attention_mask": mask[:, : start + 6]}
    return student(ids[:, start : start + 6], past_key_values=cache, **given).logits


def tensors(cache):
    """All tensors that are not empty, with their layer."""
    layers = [(i, layer) for i, layer in enumerate(cache.layers) if hasattr(layer, "tensors")]
    return [(i, x) for i, layer in layers for x in layer.tensors() if x.numel()]


@pytest.mark.parametrize("removed", range(sum(CALLS) + 1))
def test_removed_tokens_leave_no_trace(student, ids, removed):
    cache = run_calls(student, ids, (PROMPT, *CALLS), record_after=1)
    cache.crop(-removed)
    length = PROMPT + sum(CALLS) - removed
    assert cache.get_seq_length() == length
    expected = run_calls(student, ids, (length,))
    for (_, found), (layer, wanted) in zip(tensors(cache), tensors(expected), strict=True):
        assert all_close(found, wanted, 1e-5), layer
    changed = ids.flip(0)  # other tokens than the removed ones follow
    found = next_logits(student, changed, cache, length)
    assert all_close(found, next_logits(student, changed, expected, length), 1e-5)


def test_a_prompt_within_reach_and_a_target_length(student, ids):
    """The first call can be cropped too, and a positive number is the length that stays."""
    for removed, given in ((3, -3), (6, PROMPT - 6), (0, PROMPT + 2), (PROMPT, -PROMPT)):
        cache = run_calls(student, ids, (PROMPT,))
        cache.crop(given)
        length = PROMPT - removed
        assert cache.get_seq_length() == length
        expected = run_calls(student, ids, (length,)) if length else student.new_cache()
        found = next_logits(student, ids, cache, length)
        assert all_close(found, next_logits(student, ids, expected, length), 1e-5), given


@pytest.mark.parametrize("side", ["left", "middle", "last tokens"])
def test_padding(student, ids, side):
    mask = torch.ones_like(ids)
    first = {"left": 0, "middle": 3, "last tokens": PROMPT + 3}[side]
    mask[0, first : first + 3] = 0
    for removed in (1, 3, 6):
        cache = run_calls(student, ids, (PROMPT, *CALLS), mask, record_after=1)
        cache.crop(-removed)
        length = PROMPT + sum(CALLS) - removed
        expected = run_calls(student, ids, (length,), mask)
        found, wanted = (next_logits(student, ids, c, length, mask) for c in (cache, expected))
        real = mask[:, length : length + 6].bool()
        assert all_close(found[real], wanted[real], 1e-5), removed


def test_crops_follow_each_other(student, ids):
    """As in speculative decoding: drafts of several calls, each partly rejected."""
    cache = run_calls(student, ids, (PROMPT,))
    length = PROMPT
    for drafted, rejected in ((4, 3), (5, 0), (3, 2), (6, 5)):
        for _ in range(drafted - 2):
            next_tokens = ids[:, length : length + 1]
            student(next_tokens, past_key_values=cache)
            length += 1
        student(ids[:, length : length + 2], past_key_values=cache)
        length += 2 - rejected
        cache.crop(-rejected)
    expected = next_logits(student, ids, run_calls(student, ids, (length,)), length)
    assert all_close(next_logits(student, ids, cache, length), expected, 1e-5)


def test_tokens_that_were_not_recorded(student, ids):
    cache = run_calls(student, ids, (PROMPT, 2), record_after=2)
    if all(layer.is_croppable and not hasattr(layer, "record") for layer in cache.layers):
        pytest.skip("every layer keeps all tokens")
    before = [x.clone() for _, x in tensors(cache)]
    with pytest.raises(RuntimeError, match=r"crop: got 1 tokens to remove, expected at most 0"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match=r"crop: got 12 tokens to remove, expected at most 11"):
        cache.crop(-12)
    cache.crop(0)
    assert cache.get_seq_length() == PROMPT + 2
    assert all(torch.equal(x, y) for x, (_, y) in zip(before, tensors(cache), strict=True))


@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2", "window", "near_far", "hybrid"])
@torch.no_grad()
def test_long_calls_keep_the_inputs_of_their_last_tokens_only(kind):
    student = make_student(build_teacher("llama"), layer_types=LAYER_TYPES[kind]).eval()
    ids = torch.randint(3, 61, (1, 2 * RECORDED_TOKENS + 50), generator=torch.Generator().manual_seed(6))
    T = ids.shape[1] - 6
    plain = student(ids[:, :T], use_cache=False).logits
    cache = student.new_cache()
    cache.activate_past_recording()
    assert all_close(student(ids[:, :T], past_key_values=cache).logits, plain, 1e-5)
    records = [layer.record for layer in cache.layers if hasattr(layer, "record")]
    assert {record.num_tokens for record in records} == {RECORDED_TOKENS}
    cache.crop(-100)
    expected = run_calls(student, ids, (T - 100,))
    assert all_close(next_logits(student, ids, cache, T - 100), next_logits(student, ids, expected, T - 100), 1e-5)
    for i in range(3 * RECORDED_TOKENS):  # without crop: no more than is needed is kept
        student(ids[:, i % T : i % T + 1], past_key_values=cache)
    assert {record.num_tokens for record in records} == {RECORDED_TOKENS}


def test_packed_rows_cannot_be_cut_within_a_call(ids):
    student = make_student(build_teacher("llama"), layer_types=LAYER_TYPES["gla"]).eval()
    cache = student.new_cache()
    cache.activate_past_recording()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    with torch.no_grad():
        student(ids[:, :9], position_ids=positions, past_key_values=cache)
    with pytest.raises(RuntimeError, match="several documents a row"):
        cache.crop(-2)
    assert cache.get_seq_length() == 9


def test_what_a_beam_search_reorders_is_not_taken_back(ids):
    student = make_student(build_teacher("llama"), layer_types=LAYER_TYPES["gla"]).eval()
    cache = run_calls(student, ids, (PROMPT, 2))
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(RuntimeError, match="expected at most 0"):
        cache.crop(-1)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["gla", "window", "near_far"])
def test_crop_runs_in_the_mode_of_the_call(kind, without_gradients, ids):
    """Outside of that mode the states would hold a graph, or could not be computed from inference tensors."""
    student = make_student(build_teacher("llama"), layer_types=LAYER_TYPES[kind]).eval()
    with without_gradients():
        cache = run_calls(student, ids, (PROMPT, 5))
    cache.crop(-2)
    assert not any(x.requires_grad for _, x in tensors(cache))
    expected = run_calls(student, ids, (PROMPT + 3,))
    assert all_close(next_logits(student, ids, cache, 12), next_logits(student, ids, expected, 12), 1e-5)
