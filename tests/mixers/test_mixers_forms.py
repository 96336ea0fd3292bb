"""Every mixer, with every value of every option, on a sequence, token by token, and as its mixing matrix."""

import pytest
import torch
from mixer_cases import build, case_id, distance, draw, every_option, rotary

from subquad import mixers

PRECISIONS = {torch.float32: 1e-5, torch.float64: 1e-10}


def by_dtype(dtype):
    return str(dtype).removeprefix("torch.")


def inputs(T, dtype, B=2):
    positions = torch.stack([torch.arange(T) + 3 * b for b in range(B)])
    return draw(B, T, 24, dtype=dtype), rotary(positions, dtype=dtype)


def run_pieces(mixer, x, positions, sizes):
    """Outputs of the pieces of x in turn, each from the state that the one before left; and the last state."""
    outputs, state, start = [], None, 0
    for size in sizes:
        piece = slice(start, start + size)
        y, state = mixer(x[:, piece], tuple(p[:, piece] for p in positions), state=state)
        outputs.append(y)
        start += size
    assert start == x.shape[1]
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("dtype", PRECISIONS, ids=by_dtype)
@pytest.mark.parametrize("case", every_option(), ids=case_id)
def test_sequence_tokens_and_pieces_agree(case, dtype):
    name, options = case
    mixer = build(name, "biased", dtype=dtype, **options)
    x, positions = inputs(13, dtype)
    whole, state = mixer(x, positions)
    for sizes in ([1] * 13, [5, 1, 7], [1, 12]):
        y, after = run_pieces(mixer, x, positions, sizes)
        assert distance(y, whole) < PRECISIONS[dtype], sizes
        assert len(after) == len(state)
        for found, expected in zip(after, state, strict=True):
            assert distance(found, expected) < PRECISIONS[dtype], sizes


@pytest.mark.parametrize("name", mixers.REGISTRY)
def test_forms_agree_past_a_chunk(name):
    mixer = build(name, short_conv=4)
    x, positions = inputs(150, torch.float32)
    whole, _ = mixer(x, positions)
    assert distance(run_pieces(mixer, x, positions, [1] * 150)[0], whole) < 1e-5
    assert distance(run_pieces(mixer, x, positions, [70, 1, 79])[0], whole) < 1e-5


@pytest.mark.parametrize("dtype", PRECISIONS, ids=by_dtype)
@pytest.mark.parametrize("case", every_option(), ids=case_id)
def test_mixing_matrix_times_v_is_the_core_output(case, dtype):
    name, options = case
    mixer = build(name, "biased", dtype=dtype, **options)
    x, positions = inputs(21, dtype)
    core, _ = mixer.op_inputs(x, positions, None, None)
    o, _ = mixer.run_op(core, None, None)
    if name == "mamba2":  # its skip D belongs to the matrix
        o = mixer.add_skip(o, core)
    M = mixer.mixing_matrix(core)
    assert M.shape == (2, 2, 21, 21)
    assert torch.equal(M, M.tril()), "the matrix looks ahead"
    assert torch.equal(M, mixer.matrix(x, positions))
    assert distance(torch.einsum("bhij,bjhv->bihv", M, core["v"]), o) < PRECISIONS[dtype]


@pytest.mark.parametrize("case", every_option(), ids=case_id)
def test_gradients_reach_every_parameter(case):
    name, options = case
    mixer = build(name, "biased", **options)
    x, positions = inputs(9, torch.float32)
    y, _ = mixer(x.requires_grad_(), positions)
    (y * draw(*y.shape, seed=2)).sum().backward()
    without = [key for key, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
    assert x.grad.abs().amin() > 0


@pytest.mark.parametrize("case", every_option(), ids=case_id)
def test_matrix_depends_on_the_parameters_that_it_names_and_no_other(case):
    name, options = case
    mixer = build(name, "biased", **options)
    x, positions = inputs(9, torch.float32)
    M = mixer.matrix(x, positions)
    (M * draw(*M.shape, seed=2)).sum().backward()
    behind = {key for key, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert behind == {key for key, _ in mixer.named_parameters() if key.split(".")[0] in mixer.VALUE_PATH_PARAMS}


@pytest.mark.parametrize("name", mixers.REGISTRY)
def test_bfloat16_runs_and_stays_near_float32(name):
    mixer = build(name, "biased")
    x, positions = inputs(40, torch.float32)
    expected, _ = mixer(x, positions)
    mixer = mixer.to(torch.bfloat16)
    found, _ = mixer(x.bfloat16(), tuple(p.bfloat16() for p in positions))
    assert found.dtype == torch.bfloat16
    assert distance(found, expected) < 0.1


@pytest.mark.parametrize("name", mixers.REGISTRY)
def test_a_later_token_changes_nothing_before_it(name):
    mixer = build(name, "biased", short_conv=4)
    x, positions = inputs(12, torch.float32)
    changed = x.clone()
    changed[:, 7:] += 1.0
    before, after = mixer(x, positions)[0], mixer(changed, positions)[0]
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4
