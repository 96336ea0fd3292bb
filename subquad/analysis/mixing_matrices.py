"""Statistics of mixing matrices, alone and against a teacher's attention, and of hidden states; matrices as JSON.

Matrices come in chunks of rows, `[H, rows, T]`. Statistics are computed from sums over chunks in float64, so that they
do not depend on the chunks. Where a norm and a projection follow, sign and scale of a row have no meaning, so most
numbers use `normalized_abs_rows`.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny


def normalized_abs_rows(M: Tensor) -> Tensor:
    """|M| with each row divided by its sum, `[.., T]`. Rows of zeros stay zero."""
    size = M.abs()
    return size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def topk_weights(size: Tensor, visible: Tensor, top: int) -> Tensor:
    """Weights in [0, 1] that mark the `top` largest entries of each row of `size: [H, rows, T]`; they sum to `top`.

    Entries tied for the last places share them equally.
    """
    size = size.masked_fill(~visible, -1.0)
    last = size.topk(top, dim=-1).values[..., -1:]
    above, tied = size > last, size == last
    left = top - above.sum(-1, keepdim=True)
    return above.to(size.dtype) + tied * (left / tied.sum(-1, keepdim=True))


def sums_by_distance(p: Tensor, first: int) -> Tensor:
    """Sums over entries of equal distance i - j >= 0: `[H, rows, T]` (rows from `first` on) to `[H, T]`."""
    r, T = p.shape[1:]
    # Reading the rows, padded with r zeros, with a stride one shorter shifts each row by one more column, so that equal
    # distances are in one column.
    shifted = F.pad(p.flip(-1), (0, r)).flatten(1)[:, : r * (T + r - 1)]
    columns = shifted.unflatten(1, (r, T + r - 1)).sum(1)
    found = columns[:, T - 1 - first :][:, : first + r]
    return F.pad(found, (0, T - found.shape[1]))


def distance_bins(length: int) -> list[tuple[int, int]]:
    """Bins of distances 0, 1, 2 to 3, 4 to 7, ... up to `length` - 1, both ends included."""
    return [(0, 0), *((2**i, min(2 ** (i + 1), length) - 1) for i in range((length - 1).bit_length()))]


# ---------------------------------------------------------------------- matrices of one model


def matrix_sums(M: Tensor, first: int) -> dict[str, Any]:
    """What `matrix_statistics` needs of rows `[H, rows, T]` from `first` on."""
    M = M.double()
    p, flat = normalized_abs_rows(M), M.flatten(1)
    late = max(0, M.shape[-1] // 2 - first)
    return {
        "rows": M.shape[1],
        "entropy": -torch.special.xlogy(p, p).sum((1, 2)),
        "mass": sums_by_distance(p[:, late:], first + late),
        "products": flat @ flat.T,
    }


def matrix_statistics(sums: Mapping[str, Any]) -> dict[str, Tensor]:
    """Statistics of the matrices of one layer, `[H]`, float64.

    - entropy: of the rows of `normalized_abs_rows`, in nats; the mean over rows. Uniform attention has the mean of
      log(i + 1).
    - memory_length: the distance within which half of the mass lies, over rows from T/2 on, interpolated, in tokens;
      0.5 if all mass is on the token itself.
    - mass_0, mass_1, mass_2_3 ...: the share of the mass at these distances, over the same rows.
    - diversity: of the layer, `[]`; none with a single head. The mean over pairs of heads of sqrt(1 - cos(M, N)). 0:
      all heads are equal up to a positive scale; 1: they share no entry.
    """
    mass = sums["mass"] / sums["mass"].sum(-1, keepdim=True).clamp_min(TINY)
    cumulative = mass.cumsum(-1)
    at = (cumulative < 0.5).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)
    here, up_to = mass.gather(-1, at), cumulative.gather(-1, at)
    memory_length = (at + (0.5 - (up_to - here)) / here.clamp_min(TINY)).squeeze(-1)
    found = {"entropy": sums["entropy"] / sums["rows"], "memory_length": memory_length}
    for low, high in distance_bins(mass.shape[-1]):
        found[f"mass_{low}" if low == high else f"mass_{low}_{high}"] = mass[:, low : high + 1].sum(-1)
    norm = sums["products"].diagonal().sqrt().clamp_min(TINY)
    distance = (1 - sums["products"] / torch.outer(norm, norm)).clamp_min(0).sqrt()
    if len(norm) > 1:
        pairs = torch.ones_like(distance, dtype=torch.bool).triu(1)
        found["diversity"] = distance[pairs].mean()
    return found


# ---------------------------------------------------------------------- matrices of two models


def comparison_sums(M: Tensor, A: Tensor, first: int, top: int) -> dict[str, Any]:
    """What `comparison_statistics` needs of rows of both, `[H, rows, T]`, from `first` on."""
    M, A = M.double(), A.double()
    MA, MM, AA = (M * A).sum(-1), (M * M).sum(-1), (A * A).sum(-1)
    skip = max(0, top - first)
    mass, visible = A[:, skip:].abs(), torch.ones_like(M[0], dtype=torch.bool).tril(first)[skip:]
    of_teacher = topk_weights(mass, visible, top)
    of_both = torch.minimum(of_teacher, topk_weights(M[:, skip:].abs(), visible, top))
    total = (mass * of_teacher).sum(-1)
    overlap = torch.where(total > 0, (mass * of_both).sum(-1) / total, 0.0)
    return {
        "rows": M.shape[1],
        "chosen": overlap.shape[1],
        "overlap": overlap.sum(-1),
        "row_cosine": (MA / (MM * AA).sqrt().clamp_min(TINY)).sum(-1),
        "MA": MA.sum(-1),
        "MM": MM.sum(-1),
        "AA": AA.sum(-1),
    }


def comparison_statistics(sums: Mapping[str, Any]) -> dict[str, Tensor]:
    """Comparison of a student's matrices M of one layer with its teacher's attention A, `[H]`, float64.

    - topk_mass_overlap: of A's mass on its `top` largest entries of a row, the share on entries that are also among the
      `top` largest of M; the mean over rows with more than `top` visible tokens. Ties share the last places. A matrix
      compared with itself has exactly 1.
    - frobenius: min over s >= 0 of |A - s M| / |A|, one s for each head: 0 for matrices equal up to a positive scale,
      1 without positive correlation.
    - row_cosine: the cosine similarity of the rows of M and A; the mean over rows.
    """
    explained = sums["MA"].clamp_min(0).square() / (sums["MM"] * sums["AA"]).clamp_min(TINY)
    return {
        "topk_mass_overlap": sums["overlap"] / sums["chosen"],
        "frobenius": (1 - explained).clamp_min(0).sqrt(),
        "row_cosine": sums["row_cosine"] / sums["rows"],
    }


def chance_overlap(length: int, top: int) -> float:
    """The `topk_mass_overlap` of a random choice: the mean of `top` / (i + 1) over the same rows."""
    return sum(top / (i + 1) for i in range(top, length)) / (length - top)


# ---------------------------------------------------------------------- hidden states


def state_sums(X: Tensor, Y: Tensor) -> dict[str, Any]:
    """What `state_statistics` needs of the states of the same tokens in two models, `[tokens, hidden]`."""
    X, Y = X.double(), Y.double()
    return {
        "tokens": len(X),
        "cosine": F.cosine_similarity(X, Y, dim=-1).sum(),
        "sums": torch.stack([X.sum(0), Y.sum(0)]),
        "products": torch.stack([X.T @ X, Y.T @ Y, X.T @ Y]),
    }


def state_statistics(sums: Mapping[str, Any]) -> dict[str, Tensor]:
    """Similarity of the hidden states X, Y of two models, `[]`, float64.

    - cka: linear CKA (Kornblith et al., arXiv 1905.00414, equation 3) of centered states in Frobenius norms,
      |X^T Y|^2 / (|X^T X| |Y^T Y|). It is invariant to rotation and scale.
    - cosine: the cosine similarity of a token's two states; the mean over tokens.
    """
    x, y = sums["sums"]
    means = torch.stack([torch.outer(x, x), torch.outer(y, y), torch.outer(x, y)]) / sums["tokens"]
    XX, YY, XY = (sums["products"] - means).square().sum((1, 2))
    return {"cka": XY / (XX * YY).sqrt(), "cosine": sums["cosine"] / sums["tokens"]}


# ---------------------------------------------------------------------- as JSON

MatrixPairs = Mapping[tuple[int, int], tuple[Tensor, Tensor]]
"""(layer, head) to the student's matrix and the teacher's attention, `[T, T]` each, as `normalized_abs_rows`."""


def pack_pairs(pairs: MatrixPairs) -> list[dict[str, Any]]:
    """Pairs as JSON values: base64 of little-endian float16."""

    def pack(M: Tensor) -> str:
        return base64.b64encode(M.half().numpy().astype("<f2").tobytes()).decode()

    return [
        {"layer": layer, "head": head, "tokens": len(M), "student": pack(M), "teacher": pack(A)}
        for (layer, head), (M, A) in pairs.items()
    ]


def unpack_pairs(packed: Sequence[Mapping[str, Any]]) -> MatrixPairs:
    def unpack(item: Mapping[str, Any], side: str) -> Tensor:
        values = np.frombuffer(base64.b64decode(item[side]), "<f2").astype(np.float32)
        return torch.from_numpy(values).view(item["tokens"], -1)

    return {(item["layer"], item["head"]): (unpack(item, "student"), unpack(item, "teacher")) for item in packed}
