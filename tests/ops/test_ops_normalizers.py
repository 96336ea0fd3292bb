"""`mlstm` and `normalized`: the recurrences with a normalizer."""

import itertools

import pytest
import torch

from subquad import ops
from subquad.ops import fla
from subquad.ops.engine.scalar_decay import INITIAL_STABILIZER
from tests.helpers.ops import (
    assert_close,
    definition,
    differentiate,
    draw,
    draw_mlstm,
    error,
    errors,
    flatten,
    rounded,
    run_mlstm,
    ungrouped,
)


def unstabilized(q, k, v, input_gate, forget_gate, scale):
    """The definition of mLSTM without its stabilizer; float64 represents exp(40)."""
    B, T, H, K = q.shape
    S, n, outputs = q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K), []
    for t in range(T):
        forget, write = torch.sigmoid(forget_gate[:, t]), torch.exp(input_gate[:, t])
        S = forget[..., None, None] * S + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = forget[..., None] * n + write[..., None] * k[:, t]
        denominator = (scale * (q[:, t] * n).sum(-1)).abs().clamp_min(1.0)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S) / denominator[..., None])
    return torch.stack(outputs, 1)


@pytest.fixture
def _kernels_are_chunk(monkeypatch):
    """What is given to the kernels of `fla` for a decay per head is computed by `chunk` in float64."""

    def run_chunk(backend, op, inputs, scale, cu_seqlens):
        if backend == "torch":
            return None
        as_double = (None if x is None else x.double() for x in inputs[:6])
        o, state = ops.chunk(*as_double, scale=scale, cu_seqlens=cu_seqlens, backend="torch")
        return o, state.to(inputs.initial_state)

    monkeypatch.setattr(fla, "use_fla", lambda backend, q: backend != "torch")
    monkeypatch.setattr(fla, "run", run_chunk)


@pytest.mark.usefixtures("_kernels_are_chunk")
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("high", [3.0, 20.0])
def test_mlstm_as_a_recurrence_with_a_decay_per_head(T, high):
    case = draw_mlstm(T, state=True, queries=2, low=-high, high=high)
    case["q"], case["k"], case["n"] = (case[name].abs() for name in ("q", "k", "n"))
    assert_close(
        differentiate(run_mlstm("chunk"), case, torch.float32), differentiate(ungrouped(run_mlstm("step")), case), 1e-6
    )


@pytest.mark.usefixtures("_kernels_are_chunk")
def test_mlstm_documents_and_input_gates_of_minus_infinity_with_a_decay_per_head():
    case = {n: x.float() for n, x in draw_mlstm(40).items()}
    case["input_gate"][:, :12] = case["input_gate"][:, 30] = -torch.inf
    args = {n: x.requires_grad_() for n, x in case.items()}
    o, states = ops.mlstm(**args, cu_seqlens=torch.tensor([0, 10, 10, 40]))
    sum(x.square().sum() for x in (o, *states[:2])).backward()
    assert all(x.grad.isfinite().all() for x in args.values())
    expected, states_alone = ops.mlstm(**{n: x[:, 10:] for n, x in case.items()}, form="step")
    assert not o[:, :12].any()
    assert error(o[:, 10:], expected) < 1e-5  # a normalizer near zero
    for state, alone in zip(states, states_alone, strict=True):
        assert error(state[2:], alone) < 1e-5  # m, to which states are relative, is float32
    assert (states[2][:2] == INITIAL_STABILIZER).all()


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("form", ["step", "chunk"])
def test_mlstm_matches_the_unstabilized_definition(form, T):
    case = draw_mlstm(T)
    reference = unstabilized(*case.values(), scale=0.25)
    o, _ = ops.mlstm(**case, form=form)
    assert error(o, reference) < 1e-11
    if T == 1:
        return  # o is proportional to v: most gradients are exactly zero
    args = {n: x.clone().requires_grad_() for n, x in case.items()}
    got = torch.autograd.grad(ops.mlstm(**args, form=form)[0].square().sum(), args.values())
    want = torch.autograd.grad(unstabilized(*args.values(), scale=0.25).square().sum(), args.values())
    for x, y in zip(got, want, strict=True):
        assert error(x, y) < 1e-9


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 257, 1000])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (60, 96)], ids=str)
def test_mlstm_chunk_is_as_accurate_as_step_in_float32(T, K, V):
    case = draw_mlstm(T, K=K, V=V)

    def outputs_only(form):
        return lambda **args: run_mlstm(form)(**args)[0]

    reference = differentiate(outputs_only("step"), case)
    worst = dict.fromkeys(reference, 0.0)
    for seed in range(8):
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
        shuffled = case | {n: case[n][..., order] for n in "qk"}
        got = differentiate(outputs_only("step"), shuffled, torch.float32)
        got = got | {n: got[n][..., order.argsort()] for n in ("dq", "dk")}
        worst = {n: max(worst[n], e) for n, e in errors(got, reference).items()}
    got = errors(differentiate(outputs_only("chunk"), case, torch.float32), reference)
    bad = {n: (got[n], worst[n]) for n in got if got[n] > max(1e-6, 2 * worst[n])}
    assert not bad, f"(chunk, float32 step): {bad}"


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("T", [1, 64, 257])
def test_mlstm_states_with_moderate_gates(T, queries):
    case = draw_mlstm(T, H=3, state=True, low=-2.0, high=2.0, queries=queries)
    case["q"], case["k"] = case["q"].abs(), case["k"].abs()  # keeps the normalizer away from zero
    case["n"] = case["n"].abs()
    reference = differentiate(ungrouped(run_mlstm("step")), case)
    assert_close(differentiate(run_mlstm("chunk"), case, torch.float32), reference, 1e-6)
    assert_close(differentiate(run_mlstm("chunk"), case, torch.float64), reference, 1e-12)
    assert_close(differentiate(run_mlstm("step"), case), reference, 1e-12)


@pytest.mark.parametrize(
    ("sizes", "chunk_size"),
    [
        ({"T": 40, "B": 50, "H": 7, "K": 8, "V": 8}, None),
        *(({"T": 130}, size) for size in (1, 2, 7, 16, 64, 128)),
        ({"T": 40, "B": 50, "H": 7, "K": 8, "V": 8, "queries": 2}, None),
        ({"T": 130, "queries": 3}, None),
    ],
    ids=str,
)
def test_mlstm_does_not_depend_on_chunk_size_and_on_splitting_a_large_batch(sizes, chunk_size):
    case = draw_mlstm(**sizes, state=True)
    got = differentiate(run_mlstm("chunk", chunk_size=chunk_size), case)
    assert_close(got, differentiate(ungrouped(run_mlstm("step")), case), 1e-10)


@pytest.mark.parametrize("cut", [1, 31, 32, 65, 99])
@pytest.mark.parametrize("forms", [("chunk", "chunk"), ("chunk", "step"), ("step", "chunk")], ids="-".join)
def test_mlstm_two_calls_equal_one(cut, forms):
    case = draw_mlstm(100)

    def two_calls(q, k, v, input_gate, forget_gate):
        parts = [(x[:, :cut], x[:, cut:]) for x in (q, k, v, input_gate, forget_gate)]
        o1, state = ops.mlstm(*(p[0] for p in parts), form=forms[0])
        o2, state = ops.mlstm(*(p[1] for p in parts), state, form=forms[1])
        return torch.cat([o1, o2], 1), state[:2]

    reference = differentiate(run_mlstm("step"), case)
    assert_close(differentiate(two_calls, case), reference, 1e-11)
    if forms == ("chunk", "chunk"):
        whole = errors(differentiate(run_mlstm("chunk"), case, torch.float32), reference)
        pieces = errors(differentiate(two_calls, case, torch.float32), reference)
        assert all(pieces[n] < max(1e-6, 3 * whole[n]) for n in whole), (pieces, whole)


def test_mlstm_final_state_is_relative_to_its_rounded_stabilizer():
    """With open input gates m is in the hundreds, where float32 is coarse: S must be relative to the rounded m."""
    T = 600
    case = draw_mlstm(T, low=300.0, high=400.0)
    case["forget_gate"] = case["forget_gate"].abs() + 5
    _reference, (S, n, m) = ops.mlstm(**case, form="step")
    single = {name: x.float() for name, x in case.items()}
    for form in ("chunk", "step"):
        _, (S1, n1, m1) = ops.mlstm(**{name: x[:, : T // 2] for name, x in single.items()}, form=form)
        _, (S2, n2, m2) = ops.mlstm(
            **{name: x[:, T // 2 :] for name, x in single.items()}, initial_state=(S1, n1, m1), form=form
        )
        true = S * (m - m2.double()).exp()[..., None, None]
        assert error(S2, true) < 2e-6
        assert error(n2, n * (m - m2.double()).exp()[..., None]) < 2e-6


@pytest.mark.parametrize("queries", [1, 3])
def test_mlstm_packed_documents_match_separate_documents(queries):
    bounds = [0, 0, 1, 40, 40, 104, 137]
    case = draw_mlstm(137, low=-5.0, high=5.0, queries=queries)
    gen = torch.Generator().manual_seed(3)
    case["S"] = rounded(torch.randn(6, 2, 16, 16, generator=gen).double())
    case["n"] = rounded(torch.randn(6, 2, 16, generator=gen).double())
    case["m"] = torch.randn(6, 2, generator=gen).double()

    def packed(*, S, n, m, **args):
        return ops.mlstm(**args, initial_state=(S, n, m), cu_seqlens=torch.tensor(bounds))

    def separate(q, k, v, input_gate, forget_gate, S, n, m):
        results = []
        for d, (start, end) in enumerate(itertools.pairwise(bounds)):
            parts = (x[:, start:end] for x in (q, k, v, input_gate, forget_gate))
            results.append(flatten(ops.mlstm(*parts, (S[d : d + 1], n[d : d + 1], m[d : d + 1]), form="step")))
        o, S, n, m_ = zip(*results, strict=True)
        return torch.cat(o, 1), (torch.cat(S), torch.cat(n), torch.cat(m_))

    assert_close(differentiate(packed, case), differentiate(ungrouped(separate), case), 1e-12)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("form", ["step", "chunk"])
def test_mlstm_input_gates_of_minus_infinity_write_nothing(form, queries):
    """Padding before the first token leaves the initial state and stabilizer, without NaN."""
    case = draw_mlstm(40, queries=queries)
    case["input_gate"][:, :35] = -torch.inf
    case["input_gate"][:, 36] = -torch.inf
    args = {n: x.float().requires_grad_() for n, x in case.items()}
    o, state = ops.mlstm(**args, form=form)
    sum(x.square().sum() for x in (o, *state[:2])).backward()
    assert not o[:, :35].any()
    for n, x in args.items():
        assert torch.isfinite(x.grad).all(), n
    short = {n: x[:, 35:] for n, x in case.items()}
    assert error(o[:, 35:], ops.mlstm(**short, form="step")[0]) < 1e-6
    _, (S, n, m) = ops.mlstm(**{name: x[:, :35].float() for name, x in case.items()}, form=form)
    assert not S.any()
    assert not n.any()
    assert (m == INITIAL_STABILIZER).all()


def test_mlstm_in_bfloat16():
    case = draw_mlstm(100, low=-3, high=3)
    half = {n: x.bfloat16() for n, x in case.items()}
    o, state = ops.mlstm(**half)
    assert o.dtype == torch.bfloat16
    assert {x.dtype for x in state} == {torch.float32}
    want, _ = ops.mlstm(**{n: x.double() for n, x in half.items()}, form="step")
    assert error(o, want) < 1e-2


@pytest.mark.parametrize("op", ["mlstm", "normalized"])
def test_gradients_of_half_precision_inputs(op):
    case = draw_mlstm(100, low=-2, high=2)
    case["q"], case["k"] = case["q"].abs(), case["k"].abs()
    if op == "normalized":
        del case["input_gate"], case["forget_gate"]
    case = {n: x.bfloat16().double() for n, x in case.items()}

    def in_half(**args):
        half = {n: x.bfloat16() for n, x in args.items()}
        return getattr(ops, op)(**half)[0].float()

    by_step = differentiate(lambda **args: getattr(ops, op)(**args, form="step")[0], case)
    assert_close(differentiate(in_half, case, torch.float32), by_step, 1e-2)


@pytest.mark.parametrize("K", [128, 256])
def test_mlstm_with_large_heads(K):
    case = draw_mlstm(70, K=K, V=K, low=-2.0, high=2.0)
    case["q"], case["k"] = case["q"].abs(), case["k"].abs()
    assert_close(differentiate(run_mlstm("chunk"), case, torch.float32), differentiate(run_mlstm("step"), case), 1e-6)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("decay", ["none", "fixed", "scalar", "channel"])
@pytest.mark.parametrize("T", [1, 65, 200])
def test_normalized_matches_division_by_a_second_recurrence(decay, T, queries):
    case = draw((decay, False), T=T, H=3, V=24, queries=queries)
    del case["beta"]
    S = case.pop("initial_state")
    case |= {"q": case["q"].abs(), "k": case["k"].abs(), "S": S, "z": S[..., 0].abs()}

    def naive(q, k, v, log_decay, S, z):
        o, S_new = ops.step(q, k, v, log_decay, initial_state=S, scale=1.0)
        normalizer, z_new = ops.step(
            q, k, torch.ones_like(v[..., :1]), log_decay, initial_state=z.unsqueeze(-1), scale=1.0
        )
        return o / (normalizer + 1e-3), (S_new, z_new.squeeze(-1))

    def op(form):
        return lambda q, k, v, log_decay, S, z: ops.normalized(q, k, v, log_decay, (S, z), 1.0, 1e-3, form)

    reference = definition(case, naive)
    assert_close(differentiate(op("step"), case), reference, 1e-13)
    assert_close(differentiate(op("chunk"), case), reference, 1e-13)
    # The decay cancels in the ratio, to a gradient that is small next to its terms in some draws.
    assert_close(differentiate(op("chunk"), case, torch.float32), reference, 1e-6 if queries == 1 else 5e-6)


def test_normalized_documents_and_bfloat16():
    case = draw(("scalar", False), T=50, state=False)
    q, k, v, g = (case[n] for n in ("q", "k", "v", "log_decay"))
    cu = torch.tensor([0, 20, 20, 50])
    o, (S, z) = ops.normalized(q.abs(), k.abs(), v, g, cu_seqlens=cu)
    assert S.shape == (3, 2, 16, 16)
    assert z.shape == (3, 2, 16)
    want, state = ops.normalized(q[:, 20:].abs(), k[:, 20:].abs(), v[:, 20:], g[:, 20:], form="step")
    assert error(o[:, 20:], want) < 1e-12
    assert error(z[2:], state[1]) < 1e-12
    o, (S, _) = ops.normalized(q.abs().bfloat16(), k.abs().bfloat16(), v.bfloat16(), g.float())
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
