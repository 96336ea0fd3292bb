"""What a student is taught by in stage 3: cross-entropy and a divergence from the teacher's distribution.

Every loss is a mean per token that counts, so that it does not change with batch size, length or accumulation. Here is
the definition, on logits; `fused.py` computes the same from hidden states.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Tokens whose logits are held in float32 at a time."""

Divergence = Literal["forward", "reverse", "jsd"]


class LogProbs(NamedTuple):
    """The teacher's distributions p and the student's q, and their logarithms, `[N, vocabulary]`."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor

    @classmethod
    def of(cls, log_p: Tensor, log_q: Tensor) -> "LogProbs":
        return cls(log_p.exp(), log_q.exp(), log_p, log_q)


def divergence_per_token(pair: LogProbs, divergence: Divergence, beta: float) -> Tensor:
    """How far the student is from the teacher, `[N]`, in nats.

    forward: KL(p || q), which asks the student to cover all that the teacher may say.
    reverse: KL(q || p), which asks it to say nothing that the teacher would not.
    jsd: the generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2306.13649, section 2),
        beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Divided by beta it becomes the forward
        KL as beta goes to 0; divided by 1 - beta the reverse one as beta goes to 1.
    """
    p, q, log_p, log_q = pair
    if divergence == "forward":
        return (p * (log_p - log_q)).sum(-1)
    if divergence == "reverse":
        return (q * (log_q - log_p)).sum(-1)
    log_m = _log_mixture(log_p, log_q, beta)
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def divergence_grad(pair: LogProbs, divergence: Divergence, beta: float) -> Tensor:
    """Gradient of `divergence_per_token` with respect to logits x of the student, log q = log_softmax(x), in closed
    form, `[N, vocabulary]`.

    With g = dD/dq it is q (g - <q, g>), in which a constant in g has no part: g is -p / q for the forward KL,
    log(q / p) for the reverse one, and (1 - beta) log(q / m) for Jensen-Shannon, where the terms of dm/dq cancel.
    """
    p, q, log_p, log_q = pair
    if divergence == "forward":
        return q - p
    if divergence == "reverse":
        g = log_q - log_p
    else:
        g = (log_q - _log_mixture(log_p, log_q, beta)).mul_(1 - beta)
    return g.sub_((q * g).sum(-1, keepdim=True)).mul_(q)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    # not the logarithm of a sum, which is -inf where both probabilities underflow
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def check_options(divergence: str, beta: float, temperature: float) -> None:
    if divergence not in ("forward", "reverse", "jsd"):
        raise ValueError(f"divergence: got {divergence!r}, expected 'forward', 'reverse' or 'jsd'")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta: got {beta}, expected a number between 0 and 1, or a KL divergence for the ends")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")


def check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(
            f"the student has {student} logits a token and the teacher {teacher}; expected one vocabulary: cut the "
            "rows that pad the larger head (resize_token_embeddings), or distil from a teacher with this tokenizer"
        )


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight * CE + kl_weight * divergence from the teacher, of next-token predictions, means per token.

    student_logits, teacher_logits: `[B, T, vocabulary]`, the teacher's None where `kl_weight` is 0; labels: `[B, T]`,
        the same tokens that were fed: position t predicts label t + 1. -100 is ignored.
    temperature: softens both distributions; the divergence is multiplied by its square (Hinton et al., 1503.02531), so
        that its gradient keeps its size.
    divergence, beta: see `divergence_per_token`.

    Returns the weighted sum, the cross-entropy and the divergence (0 where `kl_weight` is 0). Float32 copies exist of
    CHUNK tokens at a time, in forward and in backward.

    Raises:
        ValueError: an unknown divergence, an impossible beta or temperature, or another vocabulary.
    """
    check_options(divergence, beta, temperature)
    if kl_weight == 0:
        teacher_logits = None
    elif teacher_logits is None:
        raise ValueError("teacher_logits: got None with a kl_weight, expected the teacher's logits")
    else:
        check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    student = student_logits[:, :-1].flatten(0, 1)
    teacher = None if teacher_logits is None else teacher_logits[:, :-1].flatten(0, 1)
    target = labels[:, 1:].flatten()
    count = (target != -100).sum().clamp_min(1)
    ce = kl = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for start in range(0, len(target), CHUNK):
        part = slice(start, start + CHUNK)
        given = student[part], None if teacher is None else teacher[part], target[part]
        ce_part, kl_part = checkpoint(_chunk_loss, *given, temperature, divergence, beta, use_reentrant=False)
        ce, kl = ce + ce_part, kl + kl_part
    ce, kl = ce / count, kl / count
    return ce_weight * ce + kl_weight * kl, ce, kl


def _chunk_loss(
    student: Tensor, teacher: Tensor | None, target: Tensor, temperature: float, divergence: Divergence, beta: float
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens that count."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student = student.to(dtype)
    ce = F.cross_entropy(student, target, reduction="sum", ignore_index=-100)
    if teacher is None:
        return ce, torch.zeros_like(ce)
    log_p = F.log_softmax(teacher.to(dtype) / temperature, dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    far = divergence_per_token(LogProbs.of(log_p, log_q), divergence, beta)
    return ce, (far * (target != -100)).sum() * temperature**2
