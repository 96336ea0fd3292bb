"""What can be said of mixing matrices, in numbers: one alone, and a student's beside its teacher's.

Matrices come in blocks of rows, `[H, rows, T]`, and are never whole; sums are kept in float64, so that the result does
not depend on the blocks. Signs and scales have no meaning where a norm and a projection follow the core, so that most
numbers are those of `attended`: the size of each entry, as a share of its row. Knows nothing of models.
"""

import torch
from torch import Tensor


def normalized_abs_rows(M: Tensor) -> Tensor:
    """|M| with rows that sum to one, `[.., T]`; a row of zeros stays one."""
    size = M.abs()
    return size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def causal(first: int, rows: int, T: int, device: torch.device) -> Tensor:
    """`[rows, T]`: which tokens the rows from `first` on may see."""
    return torch.arange(T, device=device) <= torch.arange(first, first + rows, device=device).unsqueeze(-1)


def top_weights(size: Tensor, seen: Tensor, top: int) -> Tensor:
    """Which entries of each row are among its `top` largest, `size: [H, rows, T]` to weights from 0 to 1 that sum to
    `top`. Entries tied for the last places share them equally."""
    size = size.masked_fill(~seen, -1.0)
    last = size.topk(top, dim=-1).values[..., -1:]
    above, tied = size > last, size == last
    left = top - above.sum(-1, keepdim=True)
    return above.to(size.dtype) + tied * (left / tied.sum(-1, keepdim=True))


def sums_by_distance(p: Tensor, first: int) -> Tensor:
    """Sums over entries of equal distance i - j, `[H, rows, T]` (rows from `first` on) to `[H, T]`; later tokens, which
    a row cannot see, are left out."""
    r, T = p.shape[1:]
    # Written one after the other with `r` zeros between them, rows that are read one element shorter stand shifted
    # against each other, so that a distance is a column.
    spread = torch.nn.functional.pad(p.flip(-1), (0, r)).flatten(1)[:, : r * (T + r - 1)]
    columns = spread.unflatten(1, (r, T + r - 1)).sum(1)
    begin = T - 1 - first
    found = columns[:, begin : begin + min(T, first + r)]
    return torch.nn.functional.pad(found, (0, T - found.shape[1]))


class MatrixStats:
    """Of one layer's matrices `[H, T, T]`, one text after the other.

    - entropy: of a row of `attended`, in nats; the mean over rows. A uniform head has the mean of log(i + 1).
    - memory_length: the distance within which half of the attended mass lies, of the rows from T/2 on (before which
      there is not yet enough to attend to), interpolated within the distance that crosses the half.
    - mass: the share of that mass at each distance, `[H, T]`.
    - diversity: of the layer: the mean over pairs of heads of sqrt(1 - <M, N> / |M| |N|), the distance of the matrices
      at norm one, over sqrt(2). 0: all heads are the same up to a positive scale; 1: no entry is shared.
    """

    def __init__(self, heads: int, length: int, device: torch.device):
        self.half = length // 2
        self.rows = 0
        zeros = {"dtype": torch.float64, "device": device}
        self._entropy = torch.zeros(heads, **zeros)  # type: ignore[call-overload]
        self._mass = torch.zeros(heads, length, **zeros)  # type: ignore[call-overload]
        self._products = torch.zeros(heads, heads, **zeros)  # type: ignore[call-overload]

    def add(self, M: Tensor, first: int) -> None:
        """Rows `[H, rows, T]` from `first` on."""
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
        """`[H]`, in tokens: 0.5 where all mass is on the token itself."""
        mass = self.mass()
        below = mass.cumsum(-1)
        at = (below < 0.5).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)
        here = mass.gather(-1, at).squeeze(-1)
        before = below.gather(-1, at).squeeze(-1) - here
        return at.squeeze(-1) + (0.5 - before) / here.clamp_min(torch.finfo(torch.float64).tiny)

    def diversity(self) -> float | None:
        """None where there is one head only."""
        H = len(self._products)
        if H == 1:
            return None
        norm = self._products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        cosine = self._products / (norm.unsqueeze(0) * norm.unsqueeze(1))
        distance = (1 - cosine).clamp_min(0).sqrt()
        pairs = torch.triu_indices(H, H, offset=1, device=distance.device)
        return distance[pairs[0], pairs[1]].mean().item()


class MatrixComparison:
    """Of one layer's matrices M, a student's, with A, its teacher's attention, head by head.

    - overlap: of the mass that A has on the `top` tokens that it attends to most, the share that lies on those that M
      attends to most: the mean over rows that have more than `top` tokens to choose from. Tokens tied for the last
      places share them. A model compared with itself has exactly 1; one that chooses blindly has `chance`.
    - chance: the mean of `top` / (i + 1) over the same rows.
    - frobenius: min over s >= 0 of |A - s M| / |A|, one s for each head: 0 the same, 1 nothing in common.
    - row_cosine: the cosine of a row of M with that of A; the mean over rows.
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
        """Rows of both, `[H, rows, T]`, from `first` on."""
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
            self._add_overlap(M[:, skip:], A[:, skip:], causal(first + skip, r - skip, T, M.device))
            self._chance += sum(self.top / (i + 1) for i in range(first + skip, first + r))
            self.chosen += r - skip

    def _add_overlap(self, M: Tensor, A: Tensor, seen: Tensor) -> None:
        mass = A.abs()
        theirs = top_weights(mass, seen, self.top)
        both = torch.minimum(theirs, top_weights(M.abs(), seen, self.top))
        whole = (mass * theirs).sum(-1)
        share = torch.where(whole > 0, (mass * both).sum(-1) / whole, 0.0)
        self._sums["overlap"] += share.sum(-1)

    def topk_mass_overlap(self) -> Tensor:
        """`[H]`."""
        return self._sums["overlap"] / self.chosen

    def chance(self) -> float:
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
    """Distances 0, 1, 2 to 3, 4 to 7, ... up to `length` - 1, both ends included."""
    bins = [(0, 0)]
    while bins[-1][1] < length - 1:
        low = bins[-1][1] + 1
        bins.append((low, min(2 * low - 1, length - 1)))
    return bins
