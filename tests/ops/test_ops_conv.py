"""`short_conv`, in tiles as on a CPU and in one convolution as on other devices, against float64 `conv1d`."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from subquad import ops
from subquad.ops import conv
from tests.helpers.ops import assert_close, differentiate, draw_conv, error


@pytest.fixture(autouse=True, params=["tiles", "conv1d"])
def _form(request, monkeypatch):
    if request.param == "conv1d":
        monkeypatch.setattr(conv.ShortConv, "apply", conv.short_conv_by_conv1d)


def conv1d(activation):
    def op(x, weight, bias, initial_state):
        inputs = torch.cat([initial_state, x], 1)
        y = F.conv1d(inputs.mT, weight.unsqueeze(1), bias, groups=x.shape[-1]).mT
        return F.silu(y) if activation else y, inputs[:, x.shape[1] :]

    return op


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 2, 3, 50])
def test_outputs_and_gradients_match_conv1d(T, W, bias, activation):
    case = draw_conv(T, W=W, bias=bias)
    reference = differentiate(conv1d(activation), case)
    assert_close(differentiate(ops.short_conv, case, activation=activation), reference, 1e-13)
    assert_close(differentiate(ops.short_conv, case, torch.float32, activation=activation), reference, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bounds", [None, [0, 0, 1, 3, 3, 20, 50]])
def test_a_gpu_has_the_results_of_the_cpu(bounds):
    case = draw_conv(50, B=1, D=64, sequences=None if bounds is None else 6)
    given = {"cu_seqlens": None if bounds is None else torch.tensor(bounds), "activation": "silu"}
    on_gpu = {n: x.cuda() for n, x in case.items()}
    got = differentiate(ops.short_conv, on_gpu, torch.float32, **given)
    assert_close({n: x.cpu() for n, x in got.items()}, differentiate(ops.short_conv, case, **given), 1e-6)


def test_token_by_token_matches_the_sequence():
    case = draw_conv(9)
    y, final_state = ops.short_conv(**case, activation="silu")
    state, outputs = case["initial_state"], []
    for t in range(9):
        o, state = ops.short_conv(case["x"][:, t : t + 1], case["weight"], case["bias"], state, activation="silu")
        outputs.append(o)
    assert error(torch.cat(outputs, 1), y) < 1e-14
    assert torch.equal(state, final_state)


def test_missing_state_is_zeros():
    case = draw_conv(5)
    case["initial_state"] = torch.zeros_like(case["initial_state"])
    zero = ops.short_conv(**case)
    none = ops.short_conv(case["x"], case["weight"], case["bias"])
    assert torch.equal(zero[0], none[0])
    assert torch.equal(zero[1], none[1])


def test_no_tokens_leave_the_state():
    case = draw_conv(0)
    y, state = ops.short_conv(**case)
    assert y.shape == (2, 0, 6)
    assert torch.equal(state, case["initial_state"])


@pytest.mark.parametrize("state", [True, False])
def test_packed_documents_match_separate_documents(state):
    bounds = [0, 0, 1, 3, 3, 20, 27]
    case = draw_conv(27, B=1, sequences=6)
    if not state:
        case["initial_state"] = None

    def separate(x, weight, bias, initial_state):
        results = []
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            before = torch.zeros_like(x[:, :3]) if initial_state is None else initial_state[n : n + 1]
            results.append(conv1d("silu")(x[:, start:end], weight, bias, before) if end > start else (x[:, :0], before))
        return tuple(torch.cat(parts, axis) for axis, parts in zip((1, 0), zip(*results, strict=True), strict=True))

    got = differentiate(ops.short_conv, case, cu_seqlens=torch.tensor(bounds), activation="silu")
    assert_close(got, differentiate(separate, case), 1e-13)


def test_bfloat16_is_computed_in_float32():
    case = {n: x.bfloat16() for n, x in draw_conv(40).items()}
    y, state = ops.short_conv(**case)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
    want, _ = conv1d(None)(**{n: x.double() for n, x in case.items()})
    assert error(y, want) < 4e-3


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x: got shape \[2, 3\]"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight: got shape \[5, 4\], .*\[6"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: got shape \[5\], .*\[6\]"),
        ({"initial_state": torch.zeros(2, 4, 6)}, ValueError, r"initial_state: got shape \[2, 4, 6\]"),
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu'"),
        ({"weight": None}, TypeError, "weight: got NoneType"),
    ],
    ids=lambda x: "" if not isinstance(x, dict) else next(iter(x)),
)
def test_errors_name_the_argument(change, error_type, message):
    args = {"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4)} | change
    with pytest.raises(error_type, match=message):
        ops.short_conv(**args)
