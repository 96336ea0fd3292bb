"""Sparse targets of stage 3: a few tokens of the teacher's distribution with their weights, and their divergence."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distribution p at N positions, reduced to K tokens each."""

    ids: Tensor
    """`[N, K]`; a token may stand several times, with weight 0 from the second time on."""
    weights: Tensor
    """`[N, K]`, float32."""
    outside: Tensor | None
    """`[N]`, float32: the probability of all other tokens; None: the weights sum to 1."""
    entropy: Tensor
    """`[N]`, float32, nats: of p where `outside` is None, else of the weights and `outside`."""

    def __getitem__(self, positions: slice) -> "SparseTargets":
        outside = None if self.outside is None else self.outside[positions]
        return SparseTargets(self.ids[positions], self.weights[positions], outside, self.entropy[positions])

    def divergence(self, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of the student's distribution q, `[N]`, in nats, and its gradient, `[N, vocabulary]`, with
        respect to the logits of q.

        Sampled targets, whose weights w have the expectation p: sum of -w log q, minus the entropy of p, with gradient
        q - w. Their expectations are KL(p || q) and its gradient; a single value may be negative.

        The largest probabilities: KL(p || q) between the distributions over K + 1 outcomes, the last of which is every
        other token. It is at most the full divergence, and 0 for q = p. The gradient is q - p, where the probability
        outside is spread over the tokens in proportion to q.
        """
        weights = self.weights.to(q.dtype)
        value = -(weights * log_q.gather(1, self.ids)).sum(-1) - self.entropy
        if self.outside is None:
            return value, q.scatter_add(1, self.ids, -weights)
        own_outside = q.scatter(1, self.ids, 0).sum(-1).clamp_min(torch.finfo(q.dtype).tiny)
        share = (self.outside / own_outside).unsqueeze(1)
        grad = (q * (1 - share)).scatter_add_(1, self.ids, share * q.gather(1, self.ids) - weights)
        return value - torch.xlogy(self.outside, own_outside), grad


Reduction = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]
"""Of n positions: ids and weights of all their tokens, `[entries]`, the number of tokens of each position, `[n]`, and
`outside` and `entropy` of `SparseTargets`. Weights of draws are counts."""


def draw(logits: Tensor, size: int, uniform: Tensor) -> Reduction:
    """`size` draws from the distribution of each row of logits `[n, vocabulary]`, and how often each token is drawn.

    Systematic sampling: the draws of a row are the tokens at (i + u) / size, i < size, of its cumulative distribution.
    A token with probability p is drawn floor(size p) or ceil(size p) times, size p times in expectation, so that the
    gradient of the forward divergence is unbiased as with independent draws (Anshumann et al., arXiv 2503.16870) and
    has less variance.

    uniform: u, `[n]`, float64, in [0, 1).
    """
    p = torch.softmax(logits, -1)
    cumulative = p.cumsum(-1, dtype=torch.float64)
    points = (torch.arange(size, device=p.device) + uniform.unsqueeze(1)) / size * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, points, right=True).clamp_max_(p.shape[1] - 1)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = is_first.flatten().nonzero().squeeze(1)
    counts = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
    return ids[is_first], counts, is_first.sum(1), None, torch.special.entr(p).sum(-1)


def largest(logits: Tensor, size: int, uniform: Tensor) -> Reduction:
    """The `size` largest probabilities of each row of logits `[n, vocabulary]`."""
    p = torch.softmax(logits, -1)
    weights, ids = p.topk(min(size, p.shape[1]))
    outside = p.scatter_(1, ids, 0).sum(-1)
    entropy = torch.special.entr(weights).sum(-1) + torch.special.entr(outside)
    return ids.flatten(), weights.flatten(), torch.full_like(ids[:, 0], ids.shape[1]), outside, entropy


REDUCTIONS: dict[str, Callable[[Tensor, int, Tensor], Reduction]] = {"sampled": draw, "top_k": largest}
"""By `teacher_targets` of a recipe."""
