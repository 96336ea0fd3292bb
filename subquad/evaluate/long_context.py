"""Perplexity by context length and by position, in one pass over long documents.

A document is read in chunks with a cache between them: for a student, memory barely grows with its length.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad import progress
from subquad.config import Data
from subquad.data import token_rows
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import estimate
from subquad.modeling.attention.tracing import find_max_learned_positions
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import eval_mode

logger = logging.getLogger(__name__)
CHUNK_TOKENS = 512
DEGRADED = 1.1
"""Perplexity relative to its minimum at which `degradation_length` is reached."""


def long_documents(data: Data, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> Tensor:
    """Up to `count` rows of validation text within one document each, `[rows, tokens]`.

    If no document is long enough, the rows span documents, and a warning is logged.

    Raises:
        UserError: there is not one row of text.
    """
    separated = data.model_copy(update={"seq_len": tokens, "document_masking": True})
    within: list[Tensor] = []
    across: list[Tensor] = []
    for row in token_rows(separated, tokenizer, "validation", limit=16 * count * tokens):
        (within if int(row["position_ids"][-1]) == tokens - 1 else across).append(row["input_ids"])
        if len(within) == count:
            break
    if not within:
        logger.warning("no document of %s has %d tokens; reading across documents", data.source, tokens)
    return torch.stack((within or across)[:count])


@torch.no_grad()
def position_losses(model: PreTrainedModel, ids: Tensor, chunk_tokens: int = CHUNK_TOKENS, label: str = "") -> Tensor:
    """The loss in nats of each next token of `ids: [N, T]`: `[N, T - 1]`, float32. label: of the progress bar."""
    losses = torch.empty(len(ids), ids.shape[1] - 1)
    with (
        eval_mode(model),
        progress.bar(ids.numel(), label, "tok") as bar,
    ):
        for row, row_losses in zip(ids, losses, strict=True):
            cache = None
            for start in range(0, len(row), chunk_tokens):
                chunk = row[None, start : start + chunk_tokens].to(model.device)
                out = model(input_ids=chunk, use_cache=True, **{CACHE_ARGUMENT: cache})
                cache = out[CACHE_ARGUMENT]
                targets = row[start + 1 : start + chunk_tokens + 1].to(model.device)
                loss = F.cross_entropy(out.logits[0, : len(targets)].float(), targets, reduction="none")
                row_losses[start : start + len(targets)] = loss.cpu()
                bar.update(chunk.shape[1])
    return losses


def supported_lengths(model: PreTrainedModel, lengths: Sequence[int]) -> list[int]:
    """The lengths that the model's position table, if it has one, covers."""
    is_student = isinstance(model, SubquadForCausalLM)
    table = model.config.max_learned_positions if is_student else find_max_learned_positions(model)
    return [length for length in lengths if table is None or length <= table]


def context_results(task: str, losses: Tensor, lengths: Sequence[int]) -> list[Result]:
    """Results by length L from `losses: [N, T - 1]` of documents from their start.

    - `perplexity`: of the first L tokens.
    - `perplexity_by_position`: of the tokens between the next smaller length (0 for the first) and L.
    - `degradation_length`: the first L whose `perplexity_by_position` is more than 10% above the lowest before it.
      There is no such result if perplexity never rises so far.
    """
    ends = [length for length in sorted(lengths) if length <= losses.shape[1] + 1]
    starts = [0, *(length - 1 for length in ends)]
    whole = [_perplexity(task, "perplexity", losses[:, : end - 1], end) for end in ends]
    by_position = [
        _perplexity(task, "perplexity_by_position", losses[:, start : end - 1], end)
        for start, end in zip(starts, ends, strict=False)
    ]
    results = [*whole, *by_position]
    for i, result in enumerate(by_position[1:], 1):
        if result.value > DEGRADED * min(before.value for before in by_position[:i]):
            return [*results, Result(task, "degradation_length", float(ends[i]), n=len(losses))]
    return results


def _perplexity(task: str, metric: str, losses: Tensor, length: int) -> Result:
    """The units of the bootstrap are pieces of up to 256 tokens."""
    pieces = [piece for row in losses for piece in row.double().split(256)]
    sums = torch.tensor([[piece.sum(), len(piece)] for piece in pieces], dtype=torch.float64)
    return estimate(task, metric, sums, lambda s: (s[..., 0] / s[..., 1]).exp(), losses.numel(), length=length)
