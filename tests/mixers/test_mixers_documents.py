"""Padding and packed documents: each row or document gives the same output as on its own."""

import pytest
import torch

from subquad import mixers
from tests.helpers.mixers import build, case_id, draw, rotary
from tests.helpers.ops import error

VARIANTS: tuple[dict, ...] = ({}, {"short_conv": 4, "rotary": True}, {"short_conv": 4, "state_heads": "key_value"})
CASES = [(name, options) for name in mixers.MIXERS for options in VARIANTS]
CASES += [("linear_attention", {"normalizer": True, "qk_activation": "elu1"}), ("mamba2", {"discretization": "zoh"})]

# 1 or the document's id at tokens, 0 at padding
PADDED = {
    "left": [0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    "middle": [1, 1, 1, 0, 0, 1, 1, 1, 1, 1],
    "everywhere": [0, 1, 0, 0, 1, 1, 0, 1, 1, 0],
    "none": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "all but one": [0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
}
PACKED = {
    "two": [1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
    "padding at the end": [1, 1, 1, 2, 2, 2, 3, 0, 0, 0],
    "padding at the start and between": [0, 0, 1, 1, 1, 0, 2, 2, 2, 2],
    "padding inside a document": [1, 1, 0, 0, 1, 1, 2, 0, 2, 2],
    "one": [4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
}


def run_alone(mixer, x, positions, row, mask, state=None):
    """Output `[n, hidden]` and state of the tokens of a row at `mask`, without the others."""
    piece = tuple(p[row % len(p)][None, mask] for p in positions)
    y, after = mixer(x[row][None, mask], piece, state=state)
    return y[0], after


@pytest.fixture(params=CASES, ids=case_id)
def mixer(request):
    name, options = request.param
    return build(name, "biased", seed=1, **options)  # with seed 0 a head's output is nearly zero before its norm


@pytest.mark.parametrize("continued", [False, True], ids=["fresh", "continued"])
def test_padding_matches_unpadded_rows(mixer, continued):
    doc_ids = torch.tensor(list(PADDED.values())).bool()
    B, T = doc_ids.shape
    x, positions = draw(B, T, 24), rotary((doc_ids.cumsum(1) - 1).clamp_min(0) + 3)
    state = mixer(draw(B, 3, 24, seed=3), rotary(torch.arange(3)[None]))[1] if continued else None
    y, after = mixer(x, positions, doc_ids, state)
    assert y.isfinite().all()
    for row, case in enumerate(PADDED):
        own = None if state is None else tuple(s[row : row + 1] for s in state)
        expected, last = run_alone(mixer, x, positions, row, doc_ids[row], own)
        assert error(y[row, doc_ids[row]], expected) < 1e-5, case
        for found, reference in zip(after, last, strict=True):
            assert found.dtype == reference.dtype
        assert error(continue_from(mixer, after, row), continue_from(mixer, last, 0)) < 1e-5, case


def continue_from(mixer, state, row):
    """The output of the next tokens. States may differ where outputs agree, by mLSTM's stabilizer."""
    x, positions = draw(1, 4, 24, seed=9), rotary(torch.arange(20, 24)[None])
    return mixer(x, positions, state=tuple(s[row : row + 1] for s in state))[0]


def test_packing_matches_single_documents(mixer):
    doc_ids = torch.tensor(list(PACKED.values()))
    B, T = doc_ids.shape
    x, positions = draw(B, T, 24), rotary(torch.arange(T).expand(B, T))
    y, after = mixer(x, positions, doc_ids)
    assert torch.equal(y[doc_ids == 0], torch.zeros_like(y[doc_ids == 0]))
    for row, case in enumerate(PACKED):
        for doc_id in doc_ids[row].unique():
            if doc_id == 0:
                continue
            mask = doc_ids[row] == doc_id
            expected, last = run_alone(mixer, x, positions, row, mask)
            assert error(y[row, mask], expected) < 1e-5, (case, doc_id)
        for found, reference in zip(after, last, strict=True):  # the row's last document
            assert error(found[row], reference[0]) < 1e-5, case


def test_row_of_only_padding_has_a_state(mixer):
    doc_ids = torch.tensor([[0] * 16, [1] * 9 + [2] * 7])
    x, positions = draw(2, 16, 24), rotary(torch.arange(16)[None])
    y, after = mixer(x, positions, doc_ids)
    assert y.isfinite().all()
    assert all(s.shape[0] == 2 for s in after)
    expected, _ = run_alone(mixer, x, positions, 1, doc_ids[1] == 2)
    assert error(y[1, 9:], expected) < 1e-5


def test_packing_matches_gradients_of_single_documents(mixer):
    doc_ids = torch.tensor([[1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2]])
    x, positions = draw(1, 13, 24), rotary(torch.arange(13)[None])
    weight = draw(1, 13, 24, seed=4)
    packed = torch.autograd.grad((mixer(x, positions, doc_ids)[0] * weight)[doc_ids > 0].sum(), mixer.parameters())
    total = 0
    for doc_id in (1, 2):
        mask = doc_ids[0] == doc_id
        total = total + (run_alone(mixer, x, positions, 0, mask)[0] * weight[0, mask]).sum()
    separate = torch.autograd.grad(total, mixer.parameters())
    assert error(flat(packed), flat(separate)) < 1e-5


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_packing_of_documents_shorter_than_the_convolution(mixer):
    x, positions = draw(1, 5, 24), rotary(torch.arange(5)[None])
    y, _ = mixer(x, positions, torch.tensor([[1, 1, 1, 2, 2]]))
    expected, _ = run_alone(mixer, x, positions, 0, torch.tensor([False] * 3 + [True] * 2))
    assert error(y[0, 3:], expected) < 1e-5


def test_packed_documents_with_a_state_raise(mixer):
    x = draw(1, 4, 24)
    state = mixer(x, rotary(torch.arange(4)[None]))[1]
    with pytest.raises(ValueError, match="doc_ids"):
        mixer(x, rotary(torch.arange(4)[None]), torch.tensor([[1, 1, 2, 2]]), state)
