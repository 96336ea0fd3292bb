"""Mixing matrices times values equal the outputs of the recurrences."""

import pytest
import torch

from subquad import ops
from tests.helpers.ops import VARIANT_IDS, VARIANTS, assert_close, definition, differentiate, draw, draw_gates, error

variants = pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)


def multiply(M, v):
    v = v.repeat_interleave(M.shape[1] // v.shape[2], 2)
    return (M @ v.transpose(1, 2)).transpose(1, 2)


@variants
@pytest.mark.parametrize(("T", "queries"), [(1, 1), (2, 1), (63, 1), (64, 1), (65, 1), (257, 1), (65, 3)])
def test_matrix_times_values_equals_step(variant, T, queries):
    case = draw(variant, T=T, K=16, V=24, state=False, queries=queries)
    del case["initial_state"]

    def by_matrix(q, k, v, log_decay, beta):
        M = ops.matrix(q, k, log_decay, beta)
        assert M.shape == (1, 2 * queries, T, T)
        assert not M.triu(1).any()
        return multiply(M, v)

    reference = definition(case, lambda **args: ops.step(**args)[0])
    assert_close(differentiate(by_matrix, case, torch.float32), reference, 1e-6)


@variants
@pytest.mark.parametrize("rows", [slice(0, 10), slice(70, 200), slice(-3, None), slice(64, 128), slice(5, 5)], ids=str)
def test_some_rows_equal_rows_of_the_full_matrix(variant, rows):
    case = draw(variant, T=150, state=False)
    del case["initial_state"], case["v"]
    full = ops.matrix(**case)
    part = ops.matrix(**case, rows=rows)
    assert part.shape == full[:, :, rows].shape
    assert error(part, full[:, :, rows]) < 1e-13

    sliced = differentiate(lambda **args: ops.matrix(**args)[:, :, rows], case)
    assert_close(differentiate(ops.matrix, case, rows=rows), sliced, 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_matrix_of_bfloat16(autocast):
    case = draw(("channel", True), T=150)
    q, k = case["q"].bfloat16(), case["k"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        M = ops.matrix(q, k, case["log_decay"].float(), case["beta"].float())
    assert M.dtype == torch.bfloat16
    assert error(M, ops.matrix(q.double(), k.double(), case["log_decay"], case["beta"])) < 1e-2


@pytest.mark.parametrize(("T", "queries"), [(1, 1), (64, 1), (100, 1), (70, 3)])
def test_mlstm_matrix_times_values_equals_mlstm(T, queries):
    case = draw(("none", False), T=T, state=False, queries=queries)
    i, f = draw_gates(T=T, low=-5, high=5)
    M = ops.mlstm_matrix(case["q"], case["k"], i, f)
    o, _ = ops.mlstm(case["q"], case["k"], case["v"], i, f, form="step")
    assert error(multiply(M, case["v"]), o) < 1e-12

    def by_matrix(q, k, input_gate, forget_gate):
        return multiply(ops.mlstm_matrix(q, k, input_gate, forget_gate), case["v"])

    def by_step(q, k, input_gate, forget_gate):
        return ops.mlstm(q, k, case["v"], input_gate, forget_gate, form="step")[0]

    args = {"q": case["q"], "k": case["k"], "input_gate": i, "forget_gate": f}
    assert_close(differentiate(by_matrix, args), differentiate(by_step, args), 1e-11)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("decay", ["none", "fixed", "scalar", "channel"])
def test_normalized_matrix_rows_sum_to_one(decay, queries):
    case = draw((decay, False), T=70, state=False, queries=queries)
    q, k = case["q"].abs(), case["k"].abs()
    M = ops.normalized_matrix(q, k, case["log_decay"], eps=0.0)
    assert error(M.sum(-1), torch.ones(1, 2 * queries, 70, dtype=torch.float64)) < 1e-12
    o, _ = ops.normalized(q, k, case["v"], case["log_decay"], eps=1e-3, form="step")
    M = ops.normalized_matrix(q, k, case["log_decay"], eps=1e-3)
    assert error(multiply(M, case["v"]), o) < 1e-12
