"""How much of the teacher a student kept, on held-out text: perplexity, KL divergence, top-1 agreement.

Needs a loaded model, and nothing of how it was made.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, rows: Iterable[Tensor]) -> dict[str, float]:
    """Means over all predicted tokens of `rows`, each `[B, T]`.

    Returns loss and teacher_loss (nats), their perplexities, kl (teacher from student, nats) and top1_agreement (the
    share of tokens on which both think the same one likeliest). A model compared with itself has kl 0, agreement 1.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    count = 0
    modes = student.training, teacher.training
    student.eval(), teacher.eval()
    for batch in rows:
        ids = batch.to(student.device)
        log_q = _log_probabilities(student, ids)
        log_p = _log_probabilities(teacher, ids.to(teacher.device)).to(log_q.device)
        target = ids[:, 1:].flatten()
        totals += torch.stack(
            [
                F.nll_loss(log_q, target, reduction="sum"),
                F.nll_loss(log_p, target, reduction="sum"),
                (log_p.exp() * (log_p - log_q)).sum(),
                (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
            ]
        ).to("cpu", torch.float64)
        count += target.numel()
    student.train(modes[0]), teacher.train(modes[1])
    if not count:
        raise ValueError("rows is empty; expected at least one batch of at least two tokens")
    loss, teacher_loss, kl, agreement = (totals / count).tolist()
    return {
        "loss": loss,
        "teacher_loss": teacher_loss,
        "perplexity": math.exp(loss),
        "teacher_perplexity": math.exp(teacher_loss),
        "kl": kl,
        "top1_agreement": agreement,
    }


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of every next token, `[B * (T - 1), vocabulary]` in float32."""
    return F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1).flatten(0, 1)


def unigram_loss(train: Iterable[Tensor], held_out: Iterable[Tensor], vocabulary: int) -> float:
    """Held-out loss in nats of the model that knows only how frequent each token is (add-one smoothed): the floor
    from which recovery is counted. First tokens of rows are not predicted, as in `compare`."""
    counts = torch.ones(vocabulary, dtype=torch.float64)
    for batch in train:
        counts += torch.bincount(batch.flatten(), minlength=vocabulary)
    log_p = (counts / counts.sum()).log()
    targets = torch.cat([batch[:, 1:].flatten() for batch in held_out])
    return -log_p[targets].mean().item()


def recovered_share(loss: float, teacher_loss: float, unigram: float) -> float:
    """(L_unigram - L_student) / (L_unigram - L_teacher): 0 is a model that knows token frequencies, 1 the teacher."""
    return (unigram - loss) / (unigram - teacher_loss)
