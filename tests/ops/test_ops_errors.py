"""Errors of the operators name the argument, what it got and what was expected."""

import pytest
import torch

from subquad import ops

B, T, H, K, V = 2, 5, 3, 4, 6


def arguments():
    zeros = torch.zeros
    return {
        "q": zeros(B, T, H, K),
        "k": zeros(B, T, H, K),
        "v": zeros(B, T, H, V),
        "log_decay": zeros(B, T, H),
        "beta": zeros(B, T, H),
    }


SHARED = [
    ({"q": [1.0]}, TypeError, "q: got list"),
    ({"q": torch.zeros(B, T, H, K).int()}, TypeError, "q: got dtype torch.int32, .*float32"),
    ({"q": torch.zeros(T, H, K)}, ValueError, r"q: got shape \[5, 3, 4\]"),
    ({"k": torch.zeros(B, T, H, K + 1)}, ValueError, r"k: got shape \[2, 5, 3, 5\], .*\[2, 5, 3, 4\]"),
    ({"k": torch.zeros(B, T, H, K).double()}, TypeError, "k: got dtype torch.float64, .*torch.float32"),
    ({"log_decay": torch.zeros(B, T)}, ValueError, r"log_decay: got shape \[2, 5\], .*\[3\] or \[2, 5, 3\]"),
    ({"log_decay": torch.full((H,), 0.5)}, ValueError, "log_decay: got 0.5"),
    ({"log_decay": torch.zeros(B, T, H, K).long()}, TypeError, "log_decay: got dtype torch.int64"),
    ({"beta": torch.zeros(B, T, H, 1)}, ValueError, r"beta: got shape \[2, 5, 3, 1\]"),
    ({"beta": torch.zeros(B, T, H, device="meta")}, ValueError, "beta: got a tensor on meta, .*cpu"),
]
WITH_STATE = [
    ({"v": torch.zeros(B, T, H + 1, V)}, ValueError, r"v: got shape \[2, 5, 4, 6\], .*\[2, 5, 3, any\]"),
    (
        {"initial_state": torch.zeros(B, H, V, K)},
        ValueError,
        r"initial_state: got shape \[2, 3, 6, 4\], .*\[2, 3, 4, 6\]",
    ),
    (
        {"initial_state": torch.zeros(B, H, K, V).bfloat16()},
        TypeError,
        "initial_state: got dtype torch.bfloat16, .*torch.float32",
    ),
]
PACKED = [
    ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: got list"),
    ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens: got dtype torch.float32"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens: got a batch of 2"),
    ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
    ({"chunk_size": 16.0}, TypeError, "chunk_size: got float"),
]


def assert_raises(op, change, error, message, drop=()):
    args = {n: x for n, x in (arguments() | change).items() if n not in drop}
    with pytest.raises(error, match=message):
        op(**args)


@pytest.mark.parametrize(("change", "error", "message"), SHARED + WITH_STATE, ids=lambda x: "")
def test_step_errors(change, error, message):
    assert_raises(ops.step, change, error, message)


@pytest.mark.parametrize(("change", "error", "message"), SHARED + WITH_STATE + PACKED, ids=lambda x: "")
def test_chunk_errors(change, error, message):
    assert_raises(ops.chunk, change, error, message)


@pytest.mark.parametrize(("change", "error", "message"), SHARED, ids=lambda x: "")
def test_matrix_errors(change, error, message):
    assert_raises(ops.matrix, change, error, message, drop=("v",))


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 3, 2, 5]], ids=str)
def test_cu_seqlens_must_rise_from_zero_to_the_length(bounds):
    args = {n: x[:1] for n, x in arguments().items()}
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[.*T = 5"):
        ops.chunk(**args, cu_seqlens=torch.tensor(bounds))


def test_initial_state_needs_one_state_per_document():
    args = {n: x[:1] for n, x in arguments().items()}
    with pytest.raises(ValueError, match=r"initial_state: got shape \[1, 3, 4, 6\], .*\[2, 3, 4, 6\]"):
        ops.chunk(**args, initial_state=torch.zeros(1, H, K, V), cu_seqlens=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_gate": torch.zeros(B, T, H, K)}, ValueError, r"input_gate: got shape \[2, 5, 3, 4\]"),
        ({"forget_gate": None}, TypeError, "forget_gate: got NoneType"),
        ({"form": "parallel"}, ValueError, "form: got 'parallel'"),
        ({"initial_state": torch.zeros(B, H, K, V)}, TypeError, r"initial_state: got Tensor, .*\(S, n, m\)"),
        ({"initial_state": (torch.zeros(B, H, K, V),) * 2}, ValueError, "initial_state: got 2 tensors"),
        ({"initial_state": (torch.zeros(B, H, K, V),) * 3}, ValueError, r"initial_state n: got shape \[2, 3, 4, 6\]"),
    ],
    ids=lambda x: "",
)
def test_mlstm_errors(change, error, message):
    gates = {"input_gate": torch.zeros(B, T, H), "forget_gate": torch.zeros(B, T, H)}
    assert_raises(ops.mlstm, gates | change, error, message, drop=("log_decay", "beta"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"form": "parallel"}, ValueError, "form: got 'parallel'"),
        ({"initial_state": (torch.zeros(B, H, K, V),) * 2}, ValueError, r"initial_state z: got shape \[2, 3, 4, 6\]"),
    ],
    ids=lambda x: "",
)
def test_normalized_errors(change, error, message):
    assert_raises(ops.normalized, change, error, message, drop=("beta",))


def test_inplace_needs_a_state_and_no_gradients():
    args = arguments()
    with pytest.raises(ValueError, match="inplace: got True without initial_state"):
        ops.step(**args, inplace=True)
    state = torch.zeros(B, H, K, V, requires_grad=True)
    with pytest.raises(ValueError, match="inplace: got tensors that require gradients"):
        ops.step(**args, initial_state=state, inplace=True)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [(3, TypeError, "rows: got int"), (slice(0, 4, 2), ValueError, "rows: got a step of 2")],
    ids=["int", "step"],
)
def test_rows_errors(rows, error, message):
    assert_raises(ops.matrix, {"rows": rows}, error, message, drop=("v",))
