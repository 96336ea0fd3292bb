"""The operators with `torch.compile`, `torch.func`, checkpointing, and the memory saved for the backward pass."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from subquad import ops
from subquad.ops.engine import compiled
from tests.helpers.ops import VARIANT_IDS, VARIANTS, assert_close, definition, differentiate, draw, draw_gates, error

variants = pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)


@variants
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("normalizer", [False, True], ids=["plain", "normalizer"])
def test_schema_and_fake_results_of_the_custom_operation(variant, normalizer, queries):
    """The slow tests compile whole graphs."""
    case = draw(variant, T=70, state=False, queries=queries)
    case = {n: x if x is None else x.float() for n, x in case.items()}
    gate = case["log_decay"]
    gate = gate.expand(1, 70, 2) if variant[0] == "fixed" else gate
    given = [case["q"], case["k"], case["v"], gate, case["beta"], None, None]
    eps = 1e-3 if normalizer and not variant[1] else None
    arguments = (*given, None, 32, None, 0.25, True, eps)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(compiled.forward, arguments, test_utils=tests)
    o, final_state, _, *saved = compiled.forward(*arguments)
    needs_grad = [x is not None for x in given]
    backward = (torch.ones_like(o), final_state, *saved, o, *arguments, needs_grad)
    torch.library.opcheck(compiled.backward, backward, test_utils=tests)


@pytest.mark.slow
@variants
def test_compiled_step_and_chunk_match_eager(variant):
    torch.compiler.reset()
    case = draw(variant, T=70, queries=2)
    for op in (ops.chunk, ops.step):
        compiled = torch.compile(lambda op=op, **args: op(**args), backend="aot_eager", fullgraph=True)
        short = case if op is ops.chunk else draw(variant, T=3, queries=2)
        tolerance = 1e-6 if op is ops.chunk else 1e-5
        assert_close(differentiate(compiled, short, torch.float32), definition(short), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("mlstm", marks=pytest.mark.sample), "normalized", "short_conv", "matrix"]
)
def test_compiled_losses_match_eager(name):
    functions, q = losses()
    compiled = torch.compile(functions[name], backend="aot_eager")
    want, got = (q.clone().requires_grad_() for _ in range(2))
    functions[name](want).backward()
    compiled(got).backward()
    assert error(got.grad, want.grad) < 1e-12


@pytest.mark.slow
@pytest.mark.sample
def test_compiled_and_eager_convolutions_of_several_lengths_alternate():
    def loss(x, weight):
        return ops.short_conv(x, weight, activation="silu")[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager")
    for T in (40, 90, 20, 90):
        gen = torch.Generator().manual_seed(T)
        x, weight = (torch.randn(*shape, generator=gen).double() for shape in ((2, T, 16), (16, 4)))
        want, got = (x.clone().requires_grad_() for _ in range(2))
        loss(want, weight).backward()
        compiled(got, weight).backward()
        assert error(got.grad, want.grad) < 1e-12


def losses():
    case = draw(("scalar", True), T=40)
    i, f = draw_gates(T=40, low=-3, high=3)
    q, k, v = case["q"], case["k"], case["v"]
    channel = draw(("channel", False), T=40)
    weight = torch.ones(16, 4, dtype=torch.float64)
    return {
        "chunk": lambda q: ops.chunk(**case | {"q": q})[0].square().sum(),
        "grouped": lambda q: ops.chunk(**case | {"q": torch.cat([q, 2 * q.roll(1, 2)], 2)})[0].square().sum(),
        "channel": lambda q: ops.chunk(**channel | {"q": q})[0].square().sum(),
        "mlstm": lambda q: ops.mlstm(q, k, v, i, f)[0].square().sum(),
        "mlstm gates": lambda q: ops.mlstm(k, k, v, q[..., 0], f)[1][0].square().sum(),
        "normalized": lambda q: ops.normalized(q.abs(), k.abs(), v)[0].square().sum(),
        "short_conv": lambda q: ops.short_conv(q[:, :, 0], weight, activation="silu")[0].square().sum(),
        "matrix": lambda q: ops.matrix(q, k)[0].square().sum(),
        "step": lambda q: ops.step(**case | {"q": q})[0].square().sum(),
    }, q


@pytest.mark.parametrize("name", losses()[0])
def test_grad_and_vmap_of_torch_func(name):
    functions, q = losses()
    loss = functions[name]
    leaf = q.clone().requires_grad_()
    loss(leaf).backward()
    assert error(torch.func.grad(loss)(q), leaf.grad) < 1e-12
    each = torch.func.vmap(torch.func.grad(loss))(torch.stack([q, 2 * q]))
    assert error(each[0], leaf.grad) < 1e-12
    assert error(each[1], torch.func.grad(loss)(2 * q)) < 1e-12


@pytest.mark.parametrize("name", ["chunk", "channel", "mlstm", "normalized", "short_conv"])
def test_second_derivatives_raise(name):
    functions, q = losses()
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functions[name](leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_two_backward_passes_and_checkpointing():
    functions, q = losses()
    leaf = q.clone().requires_grad_()
    loss = functions["chunk"](leaf)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    assert error(leaf.grad, 2 * first) < 1e-14
    leaf.grad = None
    checkpoint(functions["chunk"], leaf, use_reentrant=False).backward()
    assert error(leaf.grad, first) < 1e-14


def test_gradients_of_single_arguments():
    case = draw(("scalar", True), T=40, queries=2)
    expected = definition(case)
    for name in [n for n, x in case.items() if x is not None]:
        leaf = case[name].clone().requires_grad_()
        o, state = ops.chunk(**case | {name: leaf})
        gen = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, dtype=torch.float64, generator=gen).float().double() for x in (o, state)]
        torch.autograd.backward([o, state], cotangents)
        assert error(leaf.grad, expected[f"d{name}"]) < 1e-12


def saved_bytes(op, *inputs):
    """Bytes that a call saves for its backward pass, without inputs and outputs."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.update({x.data_ptr(): x}), x)[1], lambda x: x):
        outputs = op(*inputs)
    excluded = {x.data_ptr() for x in inputs} | {outputs[0].data_ptr()}
    return sum(x.untyped_storage().nbytes() for pointer, x in saved.items() if pointer not in excluded)


@variants
def test_memory_saved_for_the_backward_pass(variant):
    T, H, K = 1024, 2, 64
    args = {n: None if x is None else x.float() for n, x in draw(variant, T=T, H=H, K=K, V=K, state=False).items()}
    given = [x.requires_grad_() for x in args.values() if x is not None]
    names = [n for n, x in args.items() if x is not None]
    saved = saved_bytes(lambda *xs: ops.chunk(**dict(zip(names, xs, strict=True))), *given)
    # One state more than chunks: the final state, which is an output.
    assert saved - K * K * H * 4 <= (4 if variant[1] else 3) * args["q"].nbytes


@pytest.mark.parametrize("op", ["mlstm", "normalized"])
def test_memory_saved_with_a_normalizer(op):
    q, k, v = (torch.randn(1, 1024, 2, 64).requires_grad_() for _ in range(3))
    gates = [torch.randn(1, 1024, 2).requires_grad_() for _ in range(2)] if op == "mlstm" else []
    assert saved_bytes(getattr(ops, op), q, k, v, *gates) <= 3 * q.nbytes
