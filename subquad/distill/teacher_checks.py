"""How the teacher of a run is loaded, and whether it can be that of its recipe."""

import torch
from transformers import PreTrainedModel

from subquad.config import Recipe
from subquad.modeling.placement import Placement, find_device
from subquad.utils import UserError, eval_mode


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


def teacher_placement(recipe: Recipe) -> Placement:
    """How the teacher of a run is loaded."""
    dtype, device = recipe.teacher_dtype, find_device(recipe.device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and recipe.precision == "bfloat16" else "float32"
    return Placement(str(device), dtype, recipe.attn_implementation)


def check_teacher(teacher: PreTrainedModel, recipe: Recipe) -> None:
    """Raises UserError if the teacher cannot read `data.seq_len` tokens, or cannot mask documents where it has to."""
    seq_len, limit = recipe.data.seq_len, getattr(teacher.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"data.seq_len: got {seq_len}, expected at most {limit}, the maximum of teacher {recipe.teacher!r}"
        )
    if recipe.data.document_masking and not respects_document_boundaries(teacher):
        raise UserError(
            f"data.document_masking: got true, expected false for teacher {recipe.teacher!r}, whose attention crosses "
            "documents in one row whatever their position_ids"
        )
