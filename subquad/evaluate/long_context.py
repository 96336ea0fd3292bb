"""Perplexity against context: by position and by length of what was read, in one pass with the state carried.

A document is read in pieces, the cache handed from one to the next, so that 32,768 tokens cost a student hardly more
memory than 8,192.
"""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.config import Data
from subquad.data import token_rows
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import estimate
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.positions import find_max_learned_positions
from subquad.utils import UserError, eval_mode

logger = logging.getLogger(__name__)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PIECE = 512
WORSE = 1.1
"""The extrapolation point is where perplexity is so many times its best."""


def long_documents(data: Data, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> Tensor:
    """`[at most count, tokens]`: rows of held-out text that lie within one document; where there are none, rows across
    documents, said aloud.

    Raises:
        UserError: not even one row of text.
    """
    wanted = data.model_copy(update={"seq_len": tokens, "document_masking": True})
    rows = token_rows(wanted, tokenizer, "validation", limit=16 * count * tokens)
    whole: list[Tensor] = []
    across: list[Tensor] = []
    for i in range(len(rows)):
        item = rows[i]
        (whole if int(item["position_ids"][-1]) == tokens - 1 else across).append(item["input_ids"])
        if len(whole) == count:
            break
    if not whole:
        logger.warning("no document of %s has %d tokens; reading across documents", data.source, tokens)
    return torch.stack((whole or across)[:count])


@torch.no_grad()
def position_losses(model: PreTrainedModel, ids: Tensor, piece: int = PIECE, label: str = "") -> Tensor:
    """Loss in nats of each next token of `ids: [N, T]`: `[N, T - 1]`, float32. One row at a time, piece after piece."""
    losses = torch.empty(len(ids), ids.shape[1] - 1)
    with (
        eval_mode(model),
        tqdm(total=ids.numel(), desc=label, unit="tok", unit_scale=True, leave=False, disable=None) as bar,
    ):
        for row, into in zip(ids, losses, strict=True):
            cache = None
            for start in range(0, len(row), piece):
                part = row[None, start : start + piece].to(model.device)
                out = model(input_ids=part, use_cache=True, **{CACHE_ARGUMENT: cache})
                cache = out[CACHE_ARGUMENT]
                targets = row[start + 1 : start + piece + 1].to(model.device)
                found = F.cross_entropy(out.logits[0, : len(targets)].float(), targets, reduction="none")
                into[start : start + len(targets)] = found.cpu()
                bar.update(part.shape[1])
    return losses


def readable(model: PreTrainedModel, lengths: Sequence[int]) -> list[int]:
    """Those lengths that the model can read at all: learned positions end with their table."""
    is_student = isinstance(model, SubquadForCausalLM)
    table = model.config.max_learned_positions if is_student else find_max_learned_positions(model)
    return [length for length in lengths if table is None or length <= table]


def context_results(task: str, losses: Tensor, lengths: Sequence[int]) -> list[Result]:
    """Of `losses: [N, T - 1]` from the start of documents on:

    - `perplexity` at each length L: of the first L tokens;
    - `perplexity_by_position` at each L: of the tokens from L/2 (the length before L; the first from 0) up to L;
    - `extrapolation_point`: the first length whose tokens are 10% more perplexing than those of the best length before
      it; infinite lengths are not written: where perplexity never rises so far, the row is missing.
    """
    rows, by_position = [], []
    before = 0
    for length in sorted(lengths):
        if length > losses.shape[1] + 1:
            break
        rows.append(_perplexity(task, "perplexity", losses[:, : length - 1], length))
        by_position.append(_perplexity(task, "perplexity_by_position", losses[:, before : length - 1], length))
        before = length - 1
    best = math.inf
    point = None
    for row in by_position:
        if point is None and row.value > WORSE * best:
            point = row.length
        best = min(best, row.value)
    ends = [] if point is None else [Result(task, "extrapolation_point", float(point), n=len(losses))]
    return [*rows, *by_position, *ends]


def _perplexity(task: str, metric: str, losses: Tensor, length: int) -> Result:
    """The interval is over pieces of text: positions of all documents, in pieces of up to 256 tokens."""
    pieces = [piece for row in losses for piece in row.double().split(256)]
    sums = torch.stack([torch.stack([piece.sum(), torch.tensor(float(len(piece))).double()]) for piece in pieces])
    found = estimate(sums, lambda s: (s[..., 0] / s[..., 1]).exp(), losses.numel())
    return found.row(task, metric, length=length)


def check_lengths(lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 2:
        raise UserError(f"lengths: got {list(lengths)}, expected numbers of tokens of at least 2")
