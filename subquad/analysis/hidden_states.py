"""Similarity of the hidden states of two models, layer by layer; each model runs by itself on the same text.

Linear CKA (Kornblith et al., arXiv 1905.00414, equation 3) of centered states X, Y `[tokens, hidden]`, in Frobenius
norms:

    CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|)

It is invariant to rotation and scale; the mean cosine similarity of a token's two states is not. The first token of
each text is left out, because its state is often large enough to dominate (arXiv 2402.17762).
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.layer_access import layer_access_pair
from subquad.evaluate.results import Result
from subquad.utils import UserError, eval_mode


class LinearCKA:
    """Linear CKA and mean cosine similarity, accumulated over batches of tokens."""

    def __init__(self, hidden: int, device: torch.device):
        self.tokens = 0
        self._cosine = 0.0
        self._sums = torch.zeros(2, hidden, dtype=torch.float64, device=device)
        self._products = torch.zeros(3, hidden, hidden, dtype=torch.float64, device=device)
        """X^T X, Y^T Y, X^T Y."""

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Adds the states of the same tokens in both models, `[tokens, hidden]`."""
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
    """`cka` and `cosine` of the outputs of each decoder layer on texts `rows: [N, T]`, and their means over layers.

    Raises:
        UserError: models whose layers do not correspond; texts of one token.
    """
    if rows.shape[1] < 2:
        raise UserError(f"rows: got texts of {rows.shape[1]} token, expected at least 2 (the first is left out)")
    student_layers, teacher_layers = layer_access_pair(student, teacher)
    hidden = student_layers.mixer_layers[0].spec.hidden_size
    by_layer = [LinearCKA(hidden, student.device) for _ in range(len(student_layers))]
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            pairs = zip(
                student_layers.record(student_layers.decoder_layers, ids),
                teacher_layers.record(teacher_layers.decoder_layers, ids),
                strict=True,
            )
            for similarity, (a, b) in zip(by_layer, pairs, strict=True):
                similarity.add(a.output[0, 1:], b.output[0, 1:].to(student.device))
    results = []
    for metric in ("cka", "cosine"):
        values = [getattr(similarity, metric)() for similarity in by_layer]
        make = partial(Result, task="states", metric=metric, n=by_layer[0].tokens, length=rows.shape[1])
        results.append(make(value=sum(values) / len(values)))
        results += [make(value=value, layer=index) for index, value in enumerate(values)]
    return results
