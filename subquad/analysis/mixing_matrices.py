"""Statistics of mixing matrices, alone and against a teacher's attention, and matrices as JSON.

Matrices come in chunks of rows, `[H, rows, T]`. Sums are in float64, so that results do not depend on the chunks. Where
a norm and a projection follow, sign and scale of a row have no meaning, so most numbers use `normalized_abs_rows`.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def normalized_abs_rows(M: Tensor) -> Tensor:
    """|M| with each row divided by its sum, `[.., T]`. Rows of zeros stay zero."""
    size = M.abs()
    return size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def causal_mask(first: int, rows: int, T: int, device: torch.device) -> Tensor:
    """`[rows, T]`: the keys that each query from `first` on can see."""
    return torch.arange(T, device=device) <= torch.arange(first, first + rows, device=device).unsqueeze(-1)


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
    """Sums over entries of equal distance i - j: `[H, rows, T]` (rows from `first` on) to `[H, T]`.

    Entries above the diagonal are left out.
    """
    r, T = p.shape[1:]
    # Reading the rows, padded with r zeros, with a stride one shorter shifts each row by one more column, so that equal
    # distances are in one column.
    shifted = torch.nn.functional.pad(p.flip(-1), (0, r)).flatten(1)[:, : r * (T + r - 1)]
    columns = shifted.unflatten(1, (r, T + r - 1)).sum(1)
    begin = T - 1 - first
    found = columns[:, begin : begin + min(T, first + r)]
    return torch.nn.functional.pad(found, (0, T - found.shape[1]))


class MatrixStats:
    """Statistics of the matrices of one layer, `[H, T, T]` for each text.

    - entropy: of the rows of `normalized_abs_rows`, in nats; the mean over rows. Uniform attention has the mean of
      log(i + 1).
    - memory_length: the distance within which half of the mass lies, over rows from T/2 on, interpolated.
    - mass: the share of the mass at each distance, over the same rows.
    - diversity: of the layer: the mean over pairs of heads of sqrt(1 - cos(M, N)). 0: all heads are equal up to a
      positive scale; 1: they share no entry.
    """

    def __init__(self, heads: int, length: int, device: torch.device):
        self.half = length // 2
        self.rows = 0
        zeros = {"dtype": torch.float64, "device": device}
        self._entropy = torch.zeros(heads, **zeros)  # type: ignore[call-overload]
        self._mass = torch.zeros(heads, length, **zeros)  # type: ignore[call-overload]
        self._products = torch.zeros(heads, heads, **zeros)  # type: ignore[call-overload]

    def add(self, M: Tensor, first: int) -> None:
        """Adds rows `[H, rows, T]` from `first` on."""
        M = M.double()
        p = normalized_abs_rows(M)
        self.rows += M.shape[1]
        self._entropy -= torch.special.xlogy(p, p).sum((1, 2))
        late = max(0, self.half - first)
        if late < M.shape[1]:
            self._mass += sums_by_distance(p[:, late:], first + late)
        flat = M.flatten(1)
        self._products += flat @ flat.T

    def entropy(self) -> Tensor:
        """`[H]`."""
        return self._entropy / self.rows

    def mass(self) -> Tensor:
        """`[H, T]`."""
        return self._mass / self._mass.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def memory_length(self) -> Tensor:
        """`[H]`, in tokens; 0.5 if all mass is on the token itself."""
        mass = self.mass()
        cumulative = mass.cumsum(-1)
        at = (cumulative < 0.5).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)
        here = mass.gather(-1, at).squeeze(-1)
        before = cumulative.gather(-1, at).squeeze(-1) - here
        return at.squeeze(-1) + (0.5 - before) / here.clamp_min(torch.finfo(torch.float64).tiny)

    def diversity(self) -> float | None:
        """None with a single head."""
        H = len(self._products)
        if H == 1:
            return None
        norm = self._products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        cosine = self._products / (norm.unsqueeze(0) * norm.unsqueeze(1))
        distance = (1 - cosine).clamp_min(0).sqrt()
        pairs = torch.triu_indices(H, H, offset=1, device=distance.device)
        return distance[pairs[0], pairs[1]].mean().item()


class MatrixComparison:
    """Comparison of a student's matrices M of one layer with its teacher's attention A, by head.

    - topk_mass_overlap: of A's mass on its `top` largest entries of a row, the share on entries that are also among the
      `top` largest of M; the mean over rows with more than `top` visible tokens. Ties share the last places. A matrix
      compared with itself has exactly 1.
    - chance_overlap: the value for a random choice, the mean of `top` / (i + 1) over the same rows.
    - frobenius: min over s >= 0 of |A - s M| / |A|, one s for each head: 0 for matrices equal up to a positive scale,
      1 without positive correlation.
    - row_cosine: the cosine similarity of the rows of M and A; the mean over rows.
    """

    def __init__(self, heads: int, top: int, device: torch.device):
        self.top = top
        self.rows = self.chosen = 0
        self._chance = 0.0
        self._sums = {
            name: torch.zeros(heads, dtype=torch.float64, device=device)
            for name in ("overlap", "row_cosine", "MA", "MM", "AA")
        }

    def add(self, M: Tensor, A: Tensor, first: int) -> None:
        """Adds rows of both, `[H, rows, T]`, from `first` on."""
        M, A = M.double(), A.double()
        r, T = M.shape[1:]
        products = {"MA": (M * A).sum(-1), "MM": (M * M).sum(-1), "AA": (A * A).sum(-1)}
        for name, value in products.items():
            self._sums[name] += value.sum(-1)
        size = (products["MM"] * products["AA"]).sqrt()
        self._sums["row_cosine"] += (products["MA"] / size.clamp_min(torch.finfo(size.dtype).tiny)).sum(-1)
        self.rows += r
        skip = max(0, self.top - first)
        if skip < r:
            self._add_overlap(M[:, skip:], A[:, skip:], causal_mask(first + skip, r - skip, T, M.device))
            self._chance += sum(self.top / (i + 1) for i in range(first + skip, first + r))
            self.chosen += r - skip

    def _add_overlap(self, M: Tensor, A: Tensor, visible: Tensor) -> None:
        mass = A.abs()
        of_teacher = topk_weights(mass, visible, self.top)
        of_both = torch.minimum(of_teacher, topk_weights(M.abs(), visible, self.top))
        total = (mass * of_teacher).sum(-1)
        share = torch.where(total > 0, (mass * of_both).sum(-1) / total, 0.0)
        self._sums["overlap"] += share.sum(-1)

    def topk_mass_overlap(self) -> Tensor:
        """`[H]`."""
        return self._sums["overlap"] / self.chosen

    def chance_overlap(self) -> float:
        return self._chance / self.chosen

    def frobenius(self) -> Tensor:
        """`[H]`."""
        MA, MM, AA = (self._sums[name] for name in ("MA", "MM", "AA"))
        share = MA.clamp_min(0).square() / (MM * AA).clamp_min(torch.finfo(torch.float64).tiny)
        return (1 - share).clamp_min(0).sqrt()

    def row_cosine(self) -> Tensor:
        """`[H]`."""
        return self._sums["row_cosine"] / self.rows


def distance_bins(length: int) -> list[tuple[int, int]]:
    """Bins of distances 0, 1, 2 to 3, 4 to 7, ... up to `length` - 1, both ends included."""
    bins = [(0, 0)]
    while bins[-1][1] < length - 1:
        low = bins[-1][1] + 1
        bins.append((low, min(2 * low - 1, length - 1)))
    return bins


# ---------------------------------------------------------------------- as JSON

MatrixPairs = Mapping[tuple[int, int], tuple[Tensor, Tensor]]
"""(layer, head) to the student's matrix and the teacher's attention, `[T, T]` each, as `normalized_abs_rows`."""


def pack_pairs(pairs: MatrixPairs) -> list[dict[str, Any]]:
    """Pairs as JSON values: base64 of little-endian float16."""
    return [
        {"layer": layer, "head": head, "tokens": len(M), "student": _pack(M), "teacher": _pack(A)}
        for (layer, head), (M, A) in pairs.items()
    ]


def unpack_pairs(packed: Sequence[Mapping[str, Any]]) -> MatrixPairs:
    return {
        (item["layer"], item["head"]): (
            _unpack(item["student"], item["tokens"]),
            _unpack(item["teacher"], item["tokens"]),
        )
        for item in packed
    }


def _pack(M: Tensor) -> str:
    return base64.b64encode(M.half().numpy().astype("<f2").tobytes()).decode()


def _unpack(text: str, tokens: int) -> Tensor:
    values = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    return torch.from_numpy(values).view(tokens, tokens)
