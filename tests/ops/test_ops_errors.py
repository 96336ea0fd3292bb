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
        "input_gate": zeros(B, T, H),
        "forget_gate": zeros(B, T, H),
    }


SHARED = [
    ({"q": [1.0]}, TypeError, "q: got list"),
    ({"q": torch.zeros(B, T, H, K).int()}, TypeError, "q: got dtype torch.int32, .*float32"),
    ({"q": torch.zeros(T, H, K)}, ValueError, r"q: got shape \[5, 3, 4\]"),
    ({"k": torch.zeros(B, T, H, K + 1)}, ValueError, r"k: got shape \[2, 5, 3, 5\], .*\[2, 5, 3, 4\]"),
    ({"k": torch.zeros(B, T, H, K).double()}, TypeError, "k: got dtype torch.float64, .*torch.float32"),
    ({"q": torch.zeros(B, T, H + 1, K)}, ValueError, "q: got 4 heads, expected a multiple of the 3 heads of k"),
    ({"q": torch.zeros(B, T, 2 * H, K), "beta": torch.zeros(B, T, 2 * H)}, ValueError, r"beta: .*\[2, 5, 3\]"),
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


FORM = ({"form": "parallel"}, ValueError, "form: got 'parallel'")
STATE = torch.zeros(B, H, K, V)
ERRORS = {
    "step": SHARED + WITH_STATE,
    "chunk": SHARED + WITH_STATE + PACKED,
    "matrix": [
        *SHARED,
        ({"rows": 3}, TypeError, "rows: got int"),
        ({"rows": slice(0, 4, 2)}, ValueError, "rows: got a step of 2"),
    ],
    "mlstm": [
        FORM,
        ({"input_gate": torch.zeros(B, T, H, K)}, ValueError, r"input_gate: got shape \[2, 5, 3, 4\]"),
        ({"forget_gate": None}, TypeError, "forget_gate: got NoneType"),
        ({"initial_state": STATE}, TypeError, r"initial_state: got Tensor, .*\(S, n, m\)"),
        ({"initial_state": (STATE,) * 2}, ValueError, "initial_state: got 2 tensors"),
        ({"initial_state": (STATE,) * 3}, ValueError, r"initial_state n: got shape \[2, 3, 4, 6\]"),
    ],
    "normalized": [FORM, ({"initial_state": (STATE,) * 2}, ValueError, r"initial_state z: got shape \[2, 3, 4, 6\]")],
}
ARGUMENTS = {
    "matrix": ("q", "k", "log_decay", "beta"),
    "mlstm": ("q", "k", "v", "input_gate", "forget_gate"),
    "normalized": ("q", "k", "v", "log_decay"),
}


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [(op, *case) for op, cases in ERRORS.items() for case in cases],
    ids=lambda x: "",
)
def test_errors_name_the_argument(op, change, error, message):
    given = arguments()
    taken = {name: given[name] for name in ARGUMENTS.get(op, ("q", "k", "v", "log_decay", "beta"))}
    with pytest.raises(error, match=message):
        getattr(ops, op)(**taken | change)


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 3, 2, 5]], ids=str)
def test_cu_seqlens_must_rise_from_zero_to_the_length(bounds):
    args = {n: arguments()[n][:1] for n in "qkv"}
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[.*T = 5"):
        ops.chunk(**args, cu_seqlens=torch.tensor(bounds))


def test_initial_state_needs_one_state_per_document():
    args = {n: arguments()[n][:1] for n in "qkv"}
    with pytest.raises(ValueError, match=r"initial_state: got shape \[1, 3, 4, 6\], .*\[2, 3, 4, 6\]"):
        ops.chunk(**args, initial_state=torch.zeros(1, H, K, V), cu_seqlens=torch.tensor([0, 2, 5]))


def test_inplace_needs_a_state_and_no_gradients():
    args = {n: arguments()[n] for n in "qkv"}
    with pytest.raises(ValueError, match="inplace: got True without initial_state"):
        ops.step(**args, inplace=True)
    state = torch.zeros(B, H, K, V, requires_grad=True)
    with pytest.raises(ValueError, match="inplace: got tensors that require gradients"):
        ops.step(**args, initial_state=state, inplace=True)
