"""Padding anywhere, and several documents in a row: each gives what it gives alone."""

import pytest
import torch
from mixer_cases import build, case_id, distance, draw, rotary

from subquad import mixers

CASES = [(name, options) for name in mixers.REGISTRY for options in ({}, {"short_conv": 4, "rotary": True})]
CASES += [("linear_attention", {"normalizer": True, "qk_activation": "elu1"}), ("mamba2", {"discretization": "zoh"})]

# where a row's tokens are real: 1, or the number of their document
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
    "padding behind": [1, 1, 1, 2, 2, 2, 3, 0, 0, 0],
    "padding before and between": [0, 0, 1, 1, 1, 0, 2, 2, 2, 2],
    "padding inside a document": [1, 1, 0, 0, 1, 1, 2, 0, 2, 2],
    "one": [4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
}


def alone(mixer, x, positions, real, state=None):
    """What one row's real tokens give without anything else: outputs [n, hidden] and state."""
    piece = tuple(p[None, real] for p in positions)
    y, after = mixer(x[None, real], piece, state=state)
    return y[0], after


@pytest.fixture(params=CASES, ids=case_id)
def mixer(request):
    name, options = request.param
    return build(name, "biased", **options)


@pytest.mark.parametrize("continued", [False, True], ids=["fresh", "continued"])
def test_padded_rows_equal_each_row_alone(mixer, continued):
    documents = torch.tensor(list(PADDED.values())).bool()
    B, T = documents.shape
    x, positions = draw(B, T, 24), rotary((documents.cumsum(1) - 1).clamp_min(0) + 3)
    state = mixer(draw(B, 3, 24, seed=3), rotary(torch.arange(3)[None]))[1] if continued else None
    y, after = mixer(x, positions, documents, state)
    assert y.isfinite().all()
    for row, case in enumerate(PADDED):
        own = None if state is None else tuple(s[row : row + 1] for s in state)
        expected, last = alone(mixer, x[row], [p[row] for p in positions], documents[row], own)
        assert distance(y[row, documents[row]], expected) < 1e-5, case
        for found, wanted in zip(after, last, strict=True):
            assert found.dtype == wanted.dtype
        assert distance(continue_from(mixer, after, row), continue_from(mixer, last, 0)) < 1e-5, case


def continue_from(mixer, state, row):
    """What comes out next: states themselves may differ where they mean the same (mLSTM's stabiliser)."""
    x, positions = draw(1, 4, 24, seed=9), rotary(torch.arange(20, 24)[None])
    return mixer(x, positions, state=tuple(s[row : row + 1] for s in state))[0]


def test_packed_documents_equal_each_alone(mixer):
    documents = torch.tensor(list(PACKED.values()))
    B, T = documents.shape
    x, positions = draw(B, T, 24), rotary(torch.arange(T).expand(B, T))
    y, after = mixer(x, positions, documents)
    assert torch.equal(y[documents == 0], torch.zeros_like(y[documents == 0]))
    for row, case in enumerate(PACKED):
        for number in documents[row].unique():
            if number == 0:
                continue
            real = documents[row] == number
            expected, last = alone(mixer, x[row], [p[row] for p in positions], real)
            assert distance(y[row, real], expected) < 1e-5, (case, number)
        for found, wanted in zip(after, last, strict=True):  # the row's last document
            assert distance(found[row], wanted[0]) < 1e-5, case


def test_packed_row_of_padding_alone_has_a_state(mixer):
    documents = torch.tensor([[0] * 16, [1] * 9 + [2] * 7])
    x, positions = draw(2, 16, 24), rotary(torch.arange(16)[None])
    y, after = mixer(x, positions, documents)
    assert y.isfinite().all()
    assert all(s.shape[0] == 2 for s in after)
    expected, _ = alone(mixer, x[1], [p[0] for p in positions], documents[1] == 2)
    assert distance(y[1, 9:], expected) < 1e-5


def test_packed_gradients_equal_those_of_each_document_alone(mixer):
    documents = torch.tensor([[1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2]])
    x, positions = draw(1, 13, 24), rotary(torch.arange(13)[None])
    weight = draw(1, 13, 24, seed=4)
    packed = torch.autograd.grad((mixer(x, positions, documents)[0] * weight)[documents > 0].sum(), mixer.parameters())
    total = 0
    for number in (1, 2):
        real = documents[0] == number
        total = total + (alone(mixer, x[0], [p[0] for p in positions], real)[0] * weight[0, real]).sum()
    apart = torch.autograd.grad(total, mixer.parameters())
    assert distance(flat(packed), flat(apart)) < 1e-5


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_packed_documents_of_very_few_tokens(mixer):
    x, positions = draw(1, 5, 24), rotary(torch.arange(5)[None])
    y, _ = mixer(x, positions, torch.tensor([[1, 1, 1, 2, 2]]))
    expected, _ = alone(mixer, x[0], [p[0] for p in positions], torch.tensor([False] * 3 + [True] * 2))
    assert distance(y[0, 3:], expected) < 1e-5


def test_packed_documents_refuse_a_state(mixer):
    x = draw(1, 4, 24)
    state = mixer(x, rotary(torch.arange(4)[None]))[1]
    with pytest.raises(ValueError, match="packed documents cannot be continued"):
        mixer(x, rotary(torch.arange(4)[None]), torch.tensor([[1, 1, 2, 2]]), state)
