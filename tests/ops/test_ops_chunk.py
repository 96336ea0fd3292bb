"""`chunk` and `step` against the definition, `step` in float64."""

import itertools

import pytest
import torch

from subquad import ops
from subquad.ops.engine import segments
from tests.helpers.ops import (
    VARIANT_IDS,
    VARIANTS,
    assert_close,
    definition,
    differentiate,
    draw,
    error,
    flatten,
    ungrouped,
)

TOLERANCE = 1e-6
variants = pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
grouped = pytest.mark.parametrize("queries", [1, 3])
"""Query heads for each state."""
decaying = pytest.mark.parametrize("variant", VARIANTS[2:], ids=VARIANT_IDS[2:])


def assert_matches_step(case, **kwargs):
    """In outputs, states and gradients."""
    assert_close(differentiate(ops.chunk, case, torch.float32, **kwargs), definition(case), TOLERANCE)


@variants
@pytest.mark.parametrize(("K", "V"), [(16, 16), (64, 64), (60, 96)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 257])
def test_chunk_matches_step_in_outputs_states_and_gradients(variant, T, K, V):
    assert_matches_step(draw(variant, T=T, H=3, K=K, V=V))


@variants
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V", "queries"),
    [
        (1, 1000, 2, 60, 96, 1),
        (3, 70, 1, 16, 24, 1),
        (2, 70, 12, 8, 8, 1),
        (1, 70, 1, 128, 128, 1),
        (1, 70, 1, 256, 256, 1),
        (1, 1, 2, 16, 16, 3),
        (2, 63, 3, 16, 24, 3),
        (1, 257, 2, 60, 96, 2),
        (2, 70, 1, 64, 64, 7),
    ],
    ids=str,
)
def test_lengths_batch_sizes_head_counts_and_head_sizes(variant, B, T, H, K, V, queries):
    assert_matches_step(draw(variant, B=B, T=T, H=H, K=K, V=V, queries=queries))


@variants
@grouped
def test_repeated_keys(variant, queries):
    case = draw(variant, T=131, queries=queries, repeat_keys=True)
    assert_close(differentiate(ops.chunk, case), definition(case), 1e-11)
    if variant[0] != "fixed":  # of which one underflows
        assert_matches_step(case)


@variants
@grouped
def test_large_batch_is_split(variant, queries):
    case = draw(variant, B=50, T=40, H=7, K=8, V=8, queries=queries)
    assert case["k"].shape[0] * case["k"].shape[2] > 2 * segments.MAX_MATRICES
    assert_matches_step(case)


@decaying
@grouped
@pytest.mark.parametrize("log_decay", [-1e-6, -1.0, -20.0])
def test_uniform_decays_and_their_gradients(variant, log_decay, queries):
    """At -20 per token the gradient of the decay is 1e-9 of the others."""
    assert_matches_step(draw(variant, T=100, log_decay=log_decay, queries=queries))


@decaying
@grouped
@pytest.mark.parametrize("log_decay", [-200.0, -1e4, -torch.inf])
def test_decays_that_underflow(variant, log_decay, queries):
    """Below the smallest float32, gradients of earlier tokens are zero, not NaN."""
    case = draw(variant, T=100, log_decay=log_decay, queries=queries)
    got, want = differentiate(ops.chunk, case, torch.float32), definition(case)
    assert not got.pop("dinitial_state").any()
    assert got.pop("dlog_decay").abs().max() < 1e-30
    assert_close(got, {n: want[n] for n in got}, TOLERANCE)


@variants
@grouped
def test_float64_is_exact_and_stays_float64(variant, queries):
    case = draw(variant, T=77, queries=queries)
    got = differentiate(ops.chunk, case, torch.float64)
    assert got["out1"].dtype == torch.float64
    assert_close(got, definition(case), 1e-13)


@variants
@grouped
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_computed_in_float32(variant, dtype, queries):
    halves = ("q", "k", "v", "beta")
    case = draw(variant, T=100, queries=queries)
    case = {n: x.to(dtype).double() if n in halves and x is not None else x for n, x in case.items()}

    def in_half(**args):
        o, state = ops.chunk(**{n: x.to(dtype) if n in halves and x is not None else x for n, x in args.items()})
        assert o.dtype == dtype
        assert state.dtype == torch.float32
        return o.float(), state

    got, want = differentiate(in_half, case, torch.float32), definition(case)
    assert_close(got, want, 1e-2)
    assert error(got["out1"], want["out1"]) < 1e-6


@variants
def test_gradients_have_the_dtype_of_their_argument(variant):
    args = {n: x if x is None else x.bfloat16() for n, x in draw(variant, T=20, state=False, queries=2).items()}
    given = [x.requires_grad_() for x in args.values() if x is not None]
    ops.chunk(**args)[0].float().sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in given)


@variants
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 128])
def test_result_does_not_depend_on_chunk_size(variant, chunk_size):
    assert_matches_step(draw(variant, T=130, H=1), chunk_size=chunk_size)


@variants
@grouped
@pytest.mark.parametrize("cut", [1, 31, 32, 65, 99])
def test_two_calls_equal_one(variant, cut, queries):
    case = draw(variant, T=100, H=1, queries=queries)

    def two_calls(q, k, v, log_decay, beta, initial_state):
        first, second = [], []
        for x in (q, k, v, log_decay, beta):
            timeless = x is None or x.dim() == 1
            first.append(x if timeless else x[:, :cut])
            second.append(x if timeless else x[:, cut:])
        o1, state = ops.chunk(*first, initial_state=initial_state)
        o2, state = ops.chunk(*second, initial_state=state)
        return torch.cat([o1, o2], 1), state

    assert_close(differentiate(two_calls, case, torch.float32), definition(case), TOLERANCE)


@variants
@grouped
@pytest.mark.parametrize("state", [True, False], ids=["state", "zero"])
def test_packed_documents_match_separate_documents(variant, state, queries):
    bounds = [0, 0, 1, 40, 40, 104, 137, 137]
    case = draw(variant, T=137, state=False, queries=queries)
    if state:
        gen = torch.Generator().manual_seed(3)
        case["initial_state"] = torch.randn(len(bounds) - 1, 2, 16, 16, generator=gen).double()

    def separate(q, k, v, log_decay, beta, initial_state):
        outputs, states = [], []
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            parts = [x if x is None or x.dim() == 1 else x[:, start:end] for x in (q, k, v, log_decay, beta)]
            o, s = ops.step(*parts, initial_state=None if initial_state is None else initial_state[n : n + 1])
            outputs.append(o)
            states.append(s)
        return torch.cat(outputs, 1), torch.cat(states)

    got = differentiate(ops.chunk, case, torch.float32, cu_seqlens=torch.tensor(bounds))
    assert_close(got, differentiate(ungrouped(separate), case), TOLERANCE)


@variants
@grouped
def test_empty_sequence_returns_its_state(variant, queries):
    case = draw(variant, T=3, queries=queries)
    case = {n: x if x is None else x.float() for n, x in case.items()}
    empty = {n: x if x is None or n == "initial_state" or x.dim() == 1 else x[:, :0] for n, x in case.items()}
    for op in (ops.chunk, ops.step):
        o, state = op(**empty)
        assert o.shape == (1, 0, 2 * queries, 16)
        assert torch.equal(state, empty["initial_state"])


@variants
@grouped
def test_step_in_float32_and_token_by_token(variant, queries):
    case = draw(variant, T=20, queries=queries)
    assert_close(differentiate(ops.step, case, torch.float32), definition(case), 1e-5)
    single = {n: None if x is None else x.float() for n, x in case.items()}
    state, outputs = single.pop("initial_state"), []
    for t in range(20):
        token = {n: x if x is None or x.dim() == 1 else x[:, t : t + 1] for n, x in single.items()}
        o, state = ops.step(**token, initial_state=state)
        outputs.append(o)
    want = flatten(ops.step(**case))
    assert error(torch.cat(outputs, 1), want[0]) < 1e-6
    assert error(state, want[1]) < 1e-6


@variants
def test_noncontiguous_inputs_give_the_same_and_are_not_modified(variant):
    case = {n: None if x is None else x.float() for n, x in draw(variant, T=40, B=2, queries=2).items()}
    strided = dict(case)
    for name, x in case.items():
        if x is not None and x.dim() == 4:  # as of a split projection
            strided[name] = torch.cat([x, x], -1).chunk(2, -1)[0]
        elif x is not None and x.dim() == 3:
            strided[name] = x.transpose(0, 1).contiguous().transpose(0, 1)
    before = {n: None if x is None else x.clone() for n, x in strided.items()}
    for x, y in zip(flatten(ops.chunk(**strided)), flatten(ops.chunk(**case)), strict=True):
        assert torch.equal(x, y)
    for name, x in strided.items():
        assert x is None or torch.equal(x, before[name])


def test_scale_defaults_to_the_inverse_square_root_of_the_key_size():
    case = draw(("scalar", True), T=10, K=16)
    o, _ = ops.chunk(**case)
    assert error(ops.chunk(**case, scale=0.25)[0], o) < 1e-14
    assert error(ops.chunk(**case, scale=1.0)[0], 4 * o) < 1e-14
    assert error(ops.step(**case, scale=1.0)[0], 4 * o) < 1e-14


@variants
def test_step_inplace_writes_into_the_initial_state(variant):
    case = {n: None if x is None else x.float() for n, x in draw(variant, T=5, B=2, queries=2).items()}
    o, state = ops.step(**case)
    before = case["initial_state"].clone()
    with_gradients = ops.step(**{n: None if x is None else x.requires_grad_() for n, x in case.items()})
    assert error(o, with_gradients[0].detach()) < 1e-6
    assert error(state, with_gradients[1].detach()) < 1e-6
    assert torch.equal(case["initial_state"], before), "initial_state was modified without inplace=True"
    with torch.no_grad():
        o2, state2 = ops.step(**case, inplace=True)
    assert state2 is case["initial_state"]
    assert torch.equal(o2, o)
    assert torch.equal(state2, state)


@pytest.mark.parametrize("bounds", [[0, 1, 3], [0, 2, 5], [0, 3, 8], [0, 1, 2, 20]])
@pytest.mark.parametrize("chunk_size", [None, 1, 16])
def test_documents_shorter_than_a_chunk(bounds, chunk_size):
    """Padding lengthens the sequence; the chunk size must not depend on whether it is applied before or after."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, bounds[-1], 2, 4, generator=gen) for _ in range(3))
    o, _ = ops.chunk(q, k, v, cu_seqlens=torch.tensor(bounds), chunk_size=chunk_size)
    separate = [ops.step(q[:, a:b], k[:, a:b], v[:, a:b])[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(o, torch.cat(separate, 1), rtol=1e-5, atol=1e-5)
