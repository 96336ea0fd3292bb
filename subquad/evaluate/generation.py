"""Greedy generation: continuations compared with the teacher's, repetition, and last-word tasks.

Linearized models lose more in generation than likelihoods show (arXiv 2603.26556).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.evaluate.results import Result
from subquad.evaluate.statistics import mean
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.utils import eval_mode

LENGTHS = (16, 64, 256)
NGRAM = 4
DEGENERATE_SHARE = 0.5
"""A continuation with a larger share of repeated n-grams is degenerate."""


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor, tokens: int, batch_size: int = 16) -> Tensor:
    """Greedy continuations of `prompts: [N, T]`: `[N, tokens]`. An end-of-text token does not stop them."""
    written = []
    with eval_mode(model):
        for batch in prompts.split(batch_size):
            input_ids, cache, tokens_out = batch.to(model.device), None, []
            for _ in range(tokens):
                out = model(input_ids=input_ids, use_cache=True, **{CACHE_ARGUMENT: cache})
                cache = out[CACHE_ARGUMENT]
                input_ids = out.logits[:, -1:].argmax(-1)
                tokens_out.append(input_ids)
            written.append(torch.cat(tokens_out, dim=1).cpu())
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
    shares = repeated_ngram_share(written)
    length = written.shape[1]
    return [
        mean(task, "repetition", shares, length=length),
        mean(task, "degenerate_rate", (shares > DEGENERATE_SHARE).double(), length=length),
    ]


def agreement_results(task: str, written: Tensor, reference: Tensor, lengths: Sequence[int] = LENGTHS) -> list[Result]:
    """Continuations `[N, T]` against the teacher's of the same prompts: `common_prefix` (mean tokens before the first
    difference) and `same_continuation` (share of rows equal over the first 16, 64, 256 tokens)."""
    same = common_prefix(written, reference)
    results = [mean(task, "common_prefix", same, length=written.shape[1])]
    return results + [
        mean(task, "same_continuation", (same >= n).double(), length=n) for n in lengths if n <= written.shape[1]
    ]
