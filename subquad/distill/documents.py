"""Documents packed into one row: their numbers, their slices, and whether a teacher keeps them apart."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.distill.objective import Batch
from subquad.utils import eval_mode


def document_ids(batch: Batch) -> Tensor | None:
    """The number of each token's document in its row, `[B, T]`, from 1; None if every row is one document."""
    positions = batch.get("position_ids")
    if positions is None:
        return None
    starts = positions[:, 1:] == 0
    if not starts.any():
        return None
    doc_ids = torch.ones_like(positions)
    doc_ids[:, 1:] += starts.cumsum(1)
    return doc_ids


def document_slices(doc_ids: Tensor | None, B: int, T: int) -> list[tuple[slice, slice]]:
    """Rows and tokens of each document; one slice of the whole batch if `doc_ids` is None."""
    if doc_ids is None:
        return [(slice(0, B), slice(0, T))]
    is_first = doc_ids != F.pad(doc_ids[:, :-1], (1, 0), value=-1)
    starts = is_first.flatten().nonzero().flatten().tolist()
    return [
        (slice(start // T, start // T + 1), slice(start % T, start % T + end - start))
        for start, end in itertools.pairwise([*starts, B * T])
    ]


@torch.no_grad()
def respects_document_boundaries(teacher: PreTrainedModel) -> bool:
    """Whether the teacher masks documents by their `position_ids`: its hidden states of a row's second document must
    not depend on the first."""
    vocabulary: int = teacher.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
    tokens = torch.arange(12).to(teacher.device) * 7 % vocabulary
    rows = torch.stack([torch.cat([tokens[:5], tokens[5:]]), torch.cat([tokens[5:10], tokens[5:]])])
    positions = torch.cat([torch.arange(5), torch.arange(7)]).to(rows).expand(2, -1)
    with eval_mode(teacher):
        hidden = teacher.base_model(input_ids=rows, position_ids=positions, use_cache=False).last_hidden_state
    return torch.allclose(hidden[0, 5:], hidden[1, 5:], atol=1e-3 * float(hidden.abs().mean()), rtol=1e-3)
