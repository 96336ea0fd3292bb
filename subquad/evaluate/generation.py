"""Greedy generation: continuations compared with the teacher's, and repetition.

Linearized models lose more in generation than likelihoods show (arXiv 2603.26556).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad import progress
from subquad.evaluate.efficiency import decode, prefill
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import mean
from subquad.utils import eval_mode

LENGTHS = (16, 64, 256)
NGRAM = 4
DEGENERATE_SHARE = 0.5
"""A continuation with a larger share of repeated n-grams is degenerate."""


def continuations(model: PreTrainedModel, prompts: Tensor, tokens: int, batch_size: int = 16) -> Tensor:
    """Greedy continuations of `prompts: [N, T]`: `[N, tokens]`. An end-of-text token does not stop them."""
    written = []
    with eval_mode(model), progress.bar(prompts.shape[0], "continuations", "texts", delay=3) as bar:
        for batch in prompts.split(batch_size):
            written.append(decode(model, prefill(model, batch), tokens - 1)[0].cpu())
            bar.update(len(batch))
    return torch.cat(written)


def common_prefix(a: Tensor, b: Tensor) -> Tensor:
    """The number of tokens before the first difference between the rows of `a: [N, T]` and `b: [N, T]`: `[N]`."""
    return (a == b).long().cumprod(1).sum(1)


def repeated_ngram_share(tokens: Tensor, n: int = NGRAM) -> Tensor:
    """The share of n-grams of each row of `tokens: [N, T]` that occurred earlier in the row: `[N]`, float64."""
    if tokens.shape[1] < n:
        return torch.zeros(len(tokens), dtype=torch.float64)
    ngrams = tokens.unfold(1, n, 1)
    distinct = [len({tuple(ngram) for ngram in row}) for row in ngrams.tolist()]
    return 1 - torch.tensor(distinct, dtype=torch.float64) / ngrams.shape[1]


def repetition_results(task: str, written: Tensor) -> list[Result]:
    """`repetition` (mean share of repeated n-grams) and `degenerate_rate` of continuations `[N, T]`."""
    shares, length = repeated_ngram_share(written), written.shape[1]
    degenerate = (shares > DEGENERATE_SHARE).double()
    return [
        mean(task, "repetition", shares, length=length),
        mean(task, "degenerate_rate", degenerate, length=length),
    ]


def agreement_results(task: str, written: Tensor, reference: Tensor, lengths: Sequence[int] = LENGTHS) -> list[Result]:
    """Continuations `[N, T]` against the teacher's of the same prompts: `common_prefix` (mean tokens before the first
    difference) and `same_continuation` (share of rows equal over the first 16, 64, 256 tokens)."""
    same, tokens = common_prefix(written, reference), written.shape[1]
    shares = [mean(task, "same_continuation", (same >= n).double(), length=n) for n in lengths if n <= tokens]
    return [mean(task, "common_prefix", same, length=tokens), *shares]
