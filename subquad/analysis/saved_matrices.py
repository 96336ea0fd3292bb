"""Mixing matrices that are kept to be looked at: one head in the first, a middle and the last layer."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.diagnostics import matrices_beside
from subquad.analysis.layer_access import LayerAccess
from subquad.analysis.mixing_matrices import normalized_abs_rows

TOKENS = 96
"""Of a text whose matrices are shown: more are too small to be seen."""

Beside = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Of each (layer, head) the student's matrix and the teacher's, `[T, T]`, each entry as a share of its row."""


def chosen_matrices(student: PreTrainedModel, teacher: PreTrainedModel, texts: Tensor) -> Beside:
    """The first head of three layers, on the beginning of the first of `texts: [N, T]`; the same for every student of
    a teacher, so that students can be compared."""
    last = len(LayerAccess(student)) - 1
    found = {}
    for layer in sorted({0, last // 2, last}):
        ours, theirs = matrices_beside(student, teacher, texts[0, :TOKENS], layer)
        found[layer, 0] = normalized_abs_rows(ours[0]).cpu(), normalized_abs_rows(theirs[0]).cpu()
    return found


def pack(beside: Beside) -> list[dict[str, Any]]:
    """As JSON: shares in half precision, base64."""
    return [
        {"layer": layer, "head": head, "tokens": len(ours), "student": _packed(ours), "teacher": _packed(theirs)}
        for (layer, head), (ours, theirs) in beside.items()
    ]


def unpack(kept: Sequence[Mapping[str, Any]]) -> Beside:
    return {
        (one["layer"], one["head"]): tuple(_unpacked(one[who], one["tokens"]) for who in ("student", "teacher"))  # type: ignore[misc]
        for one in kept
    }


def _packed(M: Tensor) -> str:
    return base64.b64encode(M.half().numpy().astype("<f2").tobytes()).decode()


def _unpacked(text: str, tokens: int) -> Tensor:
    values = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    return torch.from_numpy(values).view(tokens, tokens)
