"""The operators against `fla`'s naive references and the PyTorch functions of `transformers`, all in float32.

`import fla` needs Triton, so that its references are loaded by file path. `transformers` binds `fla`'s kernels if it
finds them, so that `fla` is hidden while its models are imported.
"""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from subquad import ops
from subquad.ops.recurrence import chunk
from tests.helpers.ops import assert_close, differentiate, draw, draw_gates, error
from tests.helpers.references import fla_reference


def model_function(model, function):
    """A function of `transformers.models.<model>`, in its PyTorch form."""
    pytest.importorskip("transformers")
    name = f"transformers.models.{model}.modeling_{model}"
    if name not in sys.modules:
        hidden = sys.modules.get("fla")
        sys.modules["fla"] = None
        try:
            importlib.import_module(name)
        except ImportError as why:
            pytest.skip(f"{name}: {why}")
        finally:
            del sys.modules["fla"]
            if hidden is not None:
                sys.modules["fla"] = hidden
    return getattr(sys.modules[name], function)


def moderate_case(decay, delta, T=70, **sizes):
    """Decays for which references with plain cumulative sums do not overflow."""
    case = draw((decay, delta), T=T, H=3, **sizes)
    if decay != "none":
        gen = torch.Generator().manual_seed(9)
        case["log_decay"] = -torch.rand(case["log_decay"].shape, generator=gen).double().square()
    return {n: None if x is None else x.float().double() for n, x in case.items()}


def compare(reference_op, case, tolerance=2e-6, **kwargs):
    """Compares outputs, states and gradients of `step` and `chunk` with those of the reference, all in float32."""
    present = {n: x for n, x in case.items() if x is not None}
    for op in (ops.step, chunk):
        got = differentiate(lambda op=op, **args: op(**args, **kwargs), present, torch.float32)
        assert_close(
            got, {n: x.double() for n, x in differentiate(reference_op, present, torch.float32).items()}, tolerance
        )


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def test_fla_simple_gla():
    naive = fla_reference("simple_gla", "naive_recurrent_simple_gla")
    compare(
        lambda q, k, v, log_decay, initial_state: naive(q, k, v, log_decay, initial_state=initial_state),
        moderate_case("scalar", False, V=24),
    )
    case = moderate_case("scalar", False)
    parallel = fla_reference("simple_gla", "naive_parallel_simple_gla")
    _, A = parallel(*(case[n].float() for n in ("q", "k", "v", "log_decay")))
    assert error(ops.matrix(case["q"], case["k"], case["log_decay"]), A) < 2e-6


def test_fla_gla():
    naive = fla_reference("gla", "naive_recurrent_gla")
    compare(
        lambda q, k, v, log_decay, initial_state: naive(q, k, v, log_decay, initial_state, True),
        moderate_case("channel", False, V=24),
    )


def test_fla_retention():
    naive = fla_reference("retention", "naive_retention")
    case = moderate_case("fixed", False)
    log_decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(3, dtype=torch.float64))))
    q, k, v = (case[n].float() for n in "qkv")
    o = naive(*heads_first(q, k, v)).transpose(1, 2)
    assert error(ops.chunk(q, k, v, log_decay.float())[0], o) < 2e-6
    assert error(ops.step(q, k, v, log_decay.float())[0], o) < 2e-6


def test_fla_delta_rule():
    naive = fla_reference("delta_rule", "delta_rule_recurrence")

    def reference_op(q, k, v, beta, initial_state):
        o, state = naive(*heads_first(q, k, v, beta), initial_state=initial_state)
        return o.transpose(1, 2), state

    compare(reference_op, moderate_case("none", True, V=24))


def compare_gated(naive, decay, T=70, tolerance=2e-6):
    """With a reference of the gated delta rule."""

    def reference_op(q, k, v, log_decay, beta, initial_state):
        return naive(q, k, v, g=log_decay, beta=beta, initial_state=initial_state, output_final_state=True)

    compare(reference_op, moderate_case(decay, True, T, V=24), tolerance)


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_fla_gated_delta_rule(form):
    compare_gated(fla_reference("gated_delta_rule", f"naive_{form}_gated_delta_rule"), "scalar")


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_fla_kda(form):
    compare_gated(fla_reference("kda", f"naive_{form}_kda"), "channel", T=64, tolerance=5e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_fla_linear_attention(normalize):
    naive = fla_reference("linear_attn", "naive_recurrent_linear_attn")
    case = moderate_case("none", False)
    q, k, v = case["q"].float().abs(), case["k"].float().abs(), case["v"].float()
    o, state = naive(q, k, v, output_final_state=True, normalize=normalize)
    if normalize:
        got, (S, z) = ops.normalized(q, k, v, eps=1e-10)
        assert error(z, state[1].squeeze(1)) < 2e-6
        assert error(S, state[0]) < 2e-6
    else:
        got, S = ops.chunk(q, k, v)
        assert error(S, state) < 2e-6
    assert error(got, o) < 2e-6


def test_transformers_gated_delta_rule():
    compare_gated(model_function("qwen3_next", "torch_chunk_gated_delta_rule"), "scalar")


def test_transformers_kimi_delta_attention():
    compare_gated(model_function("kimi_linear", "chunk_kimi_delta_attention"), "channel")


def test_transformers_mlstm():
    """Its denominator has an additional 1e-6: gates are drawn where that is below the tolerance."""
    reference_op = model_function("xlstm", "mlstm_chunkwise_native_autograd")
    case = draw(("none", False), T=128, H=3, V=24)
    i, f = draw_gates(T=128, H=3, low=-3.0, high=3.0)
    q, k = case["q"].abs().float(), case["k"].abs().float()
    args = {"q": q, "k": k, "v": case["v"].float(), "input_gate": i.float(), "forget_gate": f.float()}

    def reference(q, k, v, input_gate, forget_gate):
        o, (S, n, m) = reference_op(*heads_first(q, k, v, input_gate, forget_gate), return_last_states=True)
        return o.transpose(1, 2), (S, n, m.squeeze(-1))

    # The reference also stores k unscaled; states are compared after removing the stabilizer.
    o, (S, n, m) = reference(**args)
    for form in ("chunk", "step"):
        got, (S2, n2, m2) = ops.mlstm(**args, form=form)
        assert error(got, o) < 1e-5
        assert error(S2 * m2.exp()[..., None, None], S * m.exp()[..., None, None]) < 1e-5
        assert error(n2 * m2.exp()[..., None], n * m.exp()[..., None]) < 1e-5

    got, want = (differentiate(lambda op=op, **a: op(**a)[0], args, torch.float32) for op in (ops.mlstm, reference))
    assert_close(got, want, 1e-5)


def test_transformers_mamba2():
    """Mamba-2 has a scalar decay: q = C, k = dt B, log decay dt A; C and B are shared by groups of heads."""
    reference_op = model_function("mamba2", "mamba2_chunk_scan")
    gen = torch.Generator().manual_seed(2)
    T, H, G, K, V = 70, 4, 2, 16, 24
    x, B, C = (torch.randn(1, T, *s, generator=gen) for s in ((H, V), (G, K), (G, K)))
    dt, A = F.softplus(torch.randn(1, T, H, generator=gen)), -torch.rand(H, generator=gen)
    D = torch.randn(H, generator=gen)
    o, state = reference_op(x, dt, A, B, C, chunk_size=32, D=D, return_final_states=True)
    q, k = (y.repeat_interleave(H // G, 2) for y in (C, B))
    for op in (ops.chunk, ops.step):
        got, S = op(q, k * dt.unsqueeze(-1), x, dt * A, scale=1.0)
        assert error(got + D.unsqueeze(-1) * x, o) < 2e-6
        assert error(S.mT, state) < 2e-6
