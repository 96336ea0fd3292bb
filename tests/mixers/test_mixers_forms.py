"""Every mixer with every option: sequence, single tokens, pieces, mixing matrix, gradients and precision."""

import pytest
import torch

from subquad import mixers
from tests.helpers.mixers import build, case_id, draw, every_option, rotary
from tests.helpers.ops import error

PRECISIONS = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=every_option(), ids=case_id)
def build_case(request):
    name, options = request.param
    return lambda dtype=torch.float32: build(name, "biased", dtype=dtype, **options)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def inputs(T, dtype, B=2):
    positions = torch.stack([torch.arange(T) + 3 * b for b in range(B)])
    return draw(B, T, 24, dtype=dtype), rotary(positions, dtype=dtype)


def run_pieces(mixer, x, positions, sizes):
    """Output and final state of x run in pieces, each from the state after the piece before it."""
    outputs, state, start = [], None, 0
    for size in sizes:
        piece = slice(start, start + size)
        y, state = mixer(x[:, piece], tuple(p[:, piece] for p in positions), state=state)
        outputs.append(y)
        start += size
    assert start == x.shape[1]
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("dtype", PRECISIONS, ids=dtype_name)
def test_sequence_tokens_and_pieces_agree(build_case, dtype):
    mixer = build_case(dtype)
    x, positions = inputs(13, dtype)
    whole, state = mixer(x, positions)
    for sizes in ([1] * 13, [5, 1, 7], [1, 12]):
        y, after = run_pieces(mixer, x, positions, sizes)
        assert error(y, whole) < PRECISIONS[dtype], sizes
        assert len(after) == len(state)
        for found, expected in zip(after, state, strict=True):
            assert error(found, expected) < PRECISIONS[dtype], sizes


def test_no_tokens_leave_the_state_as_it_is(build_case):
    mixer, (x, positions) = build_case(), inputs(5, torch.float32)
    if mixer.name == "xlstm":
        pytest.skip("mLSTM needs a token")
    with torch.no_grad():
        y, state = run_pieces(mixer, x, positions, [3, 0, 2])
        expected, expected_state = run_pieces(mixer, x, positions, [3, 2])
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_forms_agree_across_chunks(name):
    mixer = build(name, short_conv=4)
    x, positions = inputs(150, torch.float32)
    whole, _ = mixer(x, positions)
    assert error(run_pieces(mixer, x, positions, [1] * 150)[0], whole) < 1e-5
    assert error(run_pieces(mixer, x, positions, [70, 1, 79])[0], whole) < 1e-5


@pytest.mark.parametrize("dtype", PRECISIONS, ids=dtype_name)
def test_mixing_matrix_times_v_is_the_op_output(build_case, dtype):
    mixer = build_case(dtype)
    x, positions = inputs(21, dtype)
    op_inputs, _ = mixer.op_inputs(x, positions)
    o, _ = mixer.run_op(op_inputs)
    if mixer.name == "mamba2":  # the matrix includes the skip D
        o = mixer.add_skip(o, op_inputs)
    M = mixer.mixing_matrix(op_inputs)
    assert M.shape == (2, 4, 21, 21)
    assert torch.equal(M, M.tril()), "the matrix is not causal"
    assert error(torch.einsum("bhij,bjhv->bihv", M, mixer.for_queries(op_inputs["v"])), o) < PRECISIONS[dtype]


def test_gradients_reach_every_parameter(build_case):
    mixer = build_case()
    x, positions = inputs(9, torch.float32)
    y, _ = mixer(x.requires_grad_(), positions)
    (y * draw(*y.shape, seed=2)).sum().backward()
    without_grad = [key for key, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without_grad
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
    assert x.grad.abs().amin() > 0


def test_matrix_is_independent_of_exactly_the_value_path_params(build_case):
    mixer = build_case()
    x, positions = inputs(9, torch.float32)
    M = mixer.mixing_matrix(mixer.op_inputs(x, positions)[0])
    (M * draw(*M.shape, seed=2)).sum().backward()
    independent = {key for key, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert independent == {key for key, _ in mixer.named_parameters() if key.split(".")[0] in mixer.VALUE_PATH_PARAMS}


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_bfloat16_is_close_to_float32(name):
    mixer = build(name, "biased")
    x, positions = inputs(40, torch.float32)
    expected, _ = mixer(x, positions)
    mixer = mixer.to(torch.bfloat16)
    found, _ = mixer(x.bfloat16(), tuple(p.bfloat16() for p in positions))
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 0.1


@pytest.mark.parametrize("dtype", PRECISIONS, ids=dtype_name)
@pytest.mark.parametrize("name", mixers.MIXERS)
def test_states_in_bfloat16_are_rounded_between_calls(name, dtype):
    """The matrices alone; the next call continues from them as from any state."""
    rounding, exact = (build(name, "biased", dtype=dtype, short_conv=4, state_dtype=d) for d in ("bfloat16", "float32"))
    rounding.load_state_dict(exact.state_dict())
    x, positions = inputs(9, dtype)
    first, rest = ((x[:, part], tuple(p[:, part] for p in positions)) for part in (slice(8), slice(8, 9)))
    (y, kept), (expected, state) = rounding(*first), exact(*first)
    assert torch.equal(y, expected)
    matrices = [s.dim() == 4 for s in state]
    assert [s.dtype == torch.bfloat16 for s in kept] == matrices
    assert any(matrices)
    rounded = tuple(s.bfloat16().to(dtype) if s.dim() == 4 else s for s in state)
    assert all(torch.equal(a.to(b), b) for a, b in zip(kept, rounded, strict=True))
    assert torch.equal(rounding(*rest, state=kept)[0], exact(*rest, state=rounded)[0])
    assert not torch.equal(exact(*rest, state=rounded)[0], exact(*rest, state=state)[0])


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_mixers_are_causal(name):
    mixer = build(name, "biased", short_conv=4)
    x, positions = inputs(12, torch.float32)
    changed = x.clone()
    changed[:, 7:] += 1.0
    before, after = mixer(x, positions)[0], mixer(changed, positions)[0]
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4
