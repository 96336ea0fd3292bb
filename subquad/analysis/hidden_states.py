"""How alike the hidden states of two models are, layer by layer, each model run by itself on the same text.

Linear CKA (Kornblith et al., arXiv 1905.00414, equation 3) compares the geometry that the tokens have among each other:
with centred states X, Y `[tokens, hidden]`

    CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|)        in Frobenius norms

which no rotation and no scale changes; the cosine of a token's two states, averaged, also sees those. The first token
of each text is left out: in many models its state is so large that it would decide alone (arXiv 2402.17762).
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.layer_access import stacks
from subquad.evaluate.results import Result
from subquad.utils import UserError, eval_mode


class LinearCKA:
    """Of two sets of states of the same tokens, given piece by piece."""

    def __init__(self, hidden: int, device: torch.device):
        self.tokens = 0
        self._cosine = 0.0
        self._sums = torch.zeros(2, hidden, dtype=torch.float64, device=device)
        self._products = torch.zeros(3, hidden, hidden, dtype=torch.float64, device=device)
        """X^T X, Y^T Y, X^T Y."""

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Both `[tokens, hidden]`."""
        X, Y = X.double(), Y.double()
        self.tokens += len(X)
        self._cosine += torch.nn.functional.cosine_similarity(X, Y, dim=-1).sum().item()
        self._sums += torch.stack([X.sum(0), Y.sum(0)])
        self._products += torch.stack([X.T @ X, Y.T @ Y, X.T @ Y])

    def cka(self) -> float:
        x, y = self._sums
        means = torch.stack([torch.outer(x, x), torch.outer(y, y), torch.outer(x, y)]) / self.tokens
        XX, YY, XY = (self._products - means).square().sum((1, 2))
        return (XY / (XX * YY).sqrt()).item()

    def cosine(self) -> float:
        return self._cosine / self.tokens


@torch.no_grad()
def hidden_state_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """`cka` and `cosine` of what each decoder layer gives, on texts `rows: [N, T]`, and their means over layers.

    Raises:
        UserError: models whose layers do not correspond; texts of one token.
    """
    if rows.shape[1] < 2:
        raise UserError(f"rows: got texts of {rows.shape[1]} token, expected at least 2: the first is left out")
    ours, theirs = stacks(student, teacher)
    hidden = ours.mixer_layers[0].spec.hidden_size
    found = [LinearCKA(hidden, student.device) for _ in range(len(ours))]
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            pairs = zip(ours.record(ours.layers, ids), theirs.record(theirs.layers, ids), strict=True)
            for likeness, (a, b) in zip(found, pairs, strict=True):
                likeness.add(a.output[0, 1:], b.output[0, 1:].to(student.device))
    out = []
    for metric in ("cka", "cosine"):
        values = [getattr(likeness, metric)() for likeness in found]
        row = partial(Result, task="states", metric=metric, n=found[0].tokens, length=rows.shape[1])
        out.append(row(value=sum(values) / len(values)))
        out += [row(value=value, layer=index) for index, value in enumerate(values)]
    return out
