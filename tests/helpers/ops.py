"""Random inputs for every variant of the recurrence (decay, delta rule), and functions to run and compare them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from subquad import ops

DECAYS = ("none", "fixed", "scalar", "channel")
VARIANTS = [(decay, delta) for decay in DECAYS for delta in (False, True)]
VARIANT_IDS = [f"{decay}-{'delta' if delta else 'additive'}" for decay, delta in VARIANTS]
NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")
EXTREMES = torch.tensor([0.0, -1e-6, -0.1, -1.0, -5.0, -20.0], dtype=torch.float64)


def rounded(x):
    """Float64 numbers that float32 holds exactly, so that both see the same input."""
    return x.float().double()


def draw(variant, B=1, T=64, H=2, K=16, V=16, state=True, log_decay=None, seed=0, queries=1, repeat_keys=False):
    """The arguments of `step` and `chunk` in float64: H states, each with `queries` query heads; log decays from
    EXTREMES, mixed within every head. With `repeat_keys` a third of the keys repeat earlier ones."""
    decay, delta = variant
    gen = torch.Generator().manual_seed(1000 * seed + T)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=gen)

    q, k, v = normal(B, T, H * queries, K), normal(B, T, H, K), normal(B, T, H, V)
    if repeat_keys:
        k[:, 2::3] = k[:, ::2][:, : len(range(2, T, 3))].clone()
    shape = {"none": None, "fixed": (H,), "scalar": (B, T, H), "channel": (B, T, H, K)}[decay]
    if shape is not None and log_decay is None:
        log_decay = EXTREMES[torch.randint(0, len(EXTREMES), shape, generator=gen)]
    elif shape is not None:
        log_decay = torch.full(shape, float(log_decay), dtype=torch.float64)
    beta = torch.rand(B, T, H, dtype=torch.float64, generator=gen) if delta else None
    if delta:
        k = F.normalize(k, dim=-1)
    case = {"q": q, "k": k, "v": v, "log_decay": log_decay if shape else None, "beta": beta}
    case["initial_state"] = normal(B, H, K, V) if state else None
    return {name: None if x is None else rounded(x) for name, x in case.items()}


def draw_gates(B=1, T=64, H=2, low=-20.0, high=20.0, seed=0):
    """Pre-activations of mLSTM: input gates from low to high, forget gates from closed to open."""
    gen = torch.Generator().manual_seed(77 + 1000 * seed + T)

    def uniform(lo, hi):
        return lo + (hi - lo) * torch.rand(B, T, H, dtype=torch.float64, generator=gen)

    return rounded(uniform(low, high)), rounded(uniform(-5.0, 15.0))


def draw_mlstm(T, B=1, H=2, K=16, V=16, state=False, queries=1, **gates):
    case = draw(("none", False), B=B, T=T, H=H, K=K, V=V, queries=queries)
    i, f = draw_gates(B=B, T=T, H=H, **gates)
    args = {"q": case["q"], "k": case["k"], "v": case["v"], "input_gate": i, "forget_gate": f}
    if state:
        gen = torch.Generator().manual_seed(5)
        args["S"] = case["initial_state"]
        args["n"] = rounded(torch.randn(B, H, K, generator=gen, dtype=torch.float64))
        args["m"] = rounded(3 * torch.randn(B, H, generator=gen, dtype=torch.float64))
    return args


def run_mlstm(form, **kwargs):
    """`mlstm` as a function of the parts of its state; the stabilizer m has no gradient."""

    def op(q, k, v, input_gate, forget_gate, S=None, n=None, m=None):
        state = None if S is None else (S, n, m)
        o, (S, n, m) = ops.mlstm(q, k, v, input_gate, forget_gate, state, form=form, **kwargs)
        assert not m.requires_grad
        return o, (S, n)

    return op


def draw_conv(T, B=2, D=6, W=4, bias=True, sequences=None):
    """The arguments of `short_conv` in float64."""
    gen = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=gen).float().double()

    case = {"x": normal(B, T, D), "weight": normal(D, W), "bias": normal(D) if bias else None}
    case["initial_state"] = normal(sequences or B, W - 1, D)
    return case


def differentiate(op, case, dtype=torch.float64, seed=1, **kwargs):
    """Outputs of `op` and its gradients with respect to every argument, from fixed random cotangents, by name."""
    args = {n: None if x is None else x.to(dtype).detach().requires_grad_() for n, x in case.items()}
    outputs = flatten(op(**args, **kwargs))
    gen = torch.Generator().manual_seed(seed)
    cotangents = [rounded(torch.randn(o.shape, dtype=torch.float64, generator=gen)).to(o) for o in outputs]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    given = {n: x for n, x in args.items() if x is not None}
    grads = torch.autograd.grad([o for o, _ in pairs], list(given.values()), [c for _, c in pairs], allow_unused=True)
    named = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    zero = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(given.items(), grads, strict=True)}
    return named | {f"d{n}": g for n, g in zero.items()}


def flatten(outputs):
    """o, (o, state) or (o, (S, n, m)) as a flat list of tensors."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    o, state = outputs
    return [o, *(state if isinstance(state, tuple) else (state,))]


def error(x, reference):
    """Norm of the difference over the norm of the reference, or the norm of the difference if the reference is zero."""
    assert x.shape == reference.shape, (x.shape, reference.shape)
    assert torch.isfinite(x).all(), "inf or NaN"
    difference = (x.double() - reference.double()).norm().item()
    norm = reference.double().norm().item()
    return difference / norm if norm else difference


def errors(got, expected):
    """`error` of each result, relative to its scale in `expected` if there is one (see `definition`)."""
    names = [name for name in expected if not name.startswith("scale of ")]
    assert got.keys() == set(names)
    worst = {}
    for name in names:
        worst[name] = error(got[name], expected[name])
        if (scale := expected.get(f"scale of {name}", torch.zeros(1)).norm().item()) > 0:
            worst[name] *= expected[name].norm().item() / scale
    return worst


def assert_close(got, expected, tolerance):
    bad = {name: f"{e:.1e}" for name, e in errors(got, expected).items() if not e <= tolerance}
    assert not bad, f"above {tolerance:.0e}: {bad}"


def ungrouped(op):
    """`op` with as many states as query heads, those of a group equal, of which it returns the first."""

    def run(**args):
        queries = args["q"].shape[2] // args["k"].shape[2]
        for name in args.keys() - {"q"}:
            if args[name] is not None:
                axis = 1 if name in ("initial_state", "S", "n", "z", "m") else min(2, args[name].dim() - 1)
                args[name] = args[name].repeat_interleave(queries, axis)
        o, *states = flatten(op(**args))
        return o, tuple(x[:, ::queries] for x in states)

    return run


def definition(case, op=ops.step):
    """`op` in float64, with a state for each query head. The gradient of a fixed decay is a sum over all tokens that
    may cancel; its scale is the sum of the absolute values."""
    log_decay = case["log_decay"]
    if log_decay is None or log_decay.dim() > 1:
        return differentiate(ungrouped(op), case)
    results = differentiate(ungrouped(op), case | {"log_decay": log_decay.expand(*case["k"].shape[:3])})
    per_token = results["dlog_decay"]
    return results | {"dlog_decay": per_token.sum((0, 1)), "scale of dlog_decay": per_token.abs().sum((0, 1))}
