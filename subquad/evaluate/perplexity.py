"""How well a model predicts held-out text, and how much of the teacher a student kept: perplexity, bits per byte, KL
divergence, agreement.

Needs a loaded model, and nothing of how it was made.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.packing import LOSS_IGNORED_LABEL, next_labels
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import Estimate, estimate
from subquad.utils import eval_mode

Batch = Tensor | Mapping[str, Tensor]
"""Tokens `[B, T]`, or what `subquad.data` gives: `input_ids`, and where they matter `position_ids` and `labels`."""

PIECE = 256
"""Tokens whose distributions are held in float64 at a time."""

SUMS = ("tokens", "loss", "bytes", "teacher_loss", "kl", "top1", "top5")


@torch.no_grad()
def token_sums(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tensor:
    """Sums over the predicted tokens of each row, `[rows, 7]` in float64, in the order of `SUMS`: how many, the loss in
    nats, the bytes of their text (0 without a tokenizer); beside a teacher (else 0) its loss, the divergence
    KL(teacher, student), and how often the teacher's likeliest token is the student's too, or among its five.
    """
    rows = []
    with eval_mode(model):
        for batch in batches:
            ids, given, labels = _unpack(batch)
            logits = _logits(model, ids, given)
            others = None
            if teacher is not None and teacher is not model:
                with eval_mode(teacher):
                    others = _logits(teacher, ids, given)
            elif teacher is model:
                others = logits
            for b in range(len(ids)):
                counted = labels[b] != LOSS_IGNORED_LABEL
                theirs = None if others is None else others[b][counted]
                sums = _row_sums(logits[b][counted], theirs, labels[b][counted])
                sums[2] = 0 if tokenizer is None else _bytes(tokenizer, labels[b][counted])
                rows.append(sums)
    if not rows or not sum(row[0] for row in rows):
        raise ValueError("rows is empty; expected at least one batch of at least two tokens")
    return torch.stack(rows)


def _unpack(batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    given = {name: batch[name] for name in ("position_ids",) if name in batch}
    return batch["input_ids"], given, next_labels(batch)


def _logits(model: PreTrainedModel, ids: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    given = {name: value.to(model.device) for name, value in given.items()}
    return model(input_ids=ids.to(model.device), use_cache=False, **given).logits


def _row_sums(logits: Tensor, others: Tensor | None, labels: Tensor) -> Tensor:
    """Of one row: logits `[T, vocabulary]` of model and teacher (None: without one), labels `[T]`."""
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    sums[0] = len(labels)
    for piece in torch.arange(len(labels)).split(PIECE):
        log_q = F.log_softmax(logits[piece.to(logits.device)].double(), dim=-1)
        target = labels[piece].to(log_q.device)
        sums[1] += F.nll_loss(log_q, target, reduction="sum").cpu()
        if others is None:
            continue
        log_p = F.log_softmax(others[piece.to(others.device)].double(), dim=-1).to(log_q.device)
        likeliest = log_p.argmax(-1)
        few = log_q.topk(min(5, log_q.shape[-1]), dim=-1).indices
        sums[3:] += torch.stack(
            [
                F.nll_loss(log_p, target, reduction="sum"),
                (log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum(),
                (likeliest == log_q.argmax(-1)).sum(),
                (few == likeliest[:, None]).any(-1).sum(),
            ]
        ).cpu()
    return sums


def _bytes(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> int:
    """UTF-8 bytes of the text that tokens stand for; special ones stand for none."""
    return len(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())  # type: ignore[union-attr]


def compare(student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over all predicted tokens.

    Returns loss and teacher_loss (nats), their perplexities, kl (teacher from student, nats) and top1_agreement (the
    share of tokens on which both think the same one likeliest). A model compared with itself has kl 0, agreement 1.
    """
    count, loss, _, teacher_loss, kl, agreement, _ = token_sums(student, teacher, batches).sum(0).tolist()
    return {
        "loss": loss / count,
        "teacher_loss": teacher_loss / count,
        "perplexity": math.exp(loss / count),
        "teacher_perplexity": math.exp(teacher_loss / count),
        "kl": kl / count,
        "top1_agreement": agreement / count,
    }


def language_results(task: str, sums: Tensor, unigram: float | None = None) -> list[Result]:
    """The rows of results of `token_sums`, each with an interval by bootstrap over rows of text.

    unigram: loss in nats of token frequencies alone (`unigram_loss`), from which `recovered_share` is counted.
    """
    count = int(sums[:, 0].sum())

    def row(metric: str, statistic) -> Result:
        found: Estimate = estimate(sums, statistic, count)
        return found.row(task, metric)

    rows = [
        row("loss", lambda s: s[..., 1] / s[..., 0]),
        row("perplexity", lambda s: (s[..., 1] / s[..., 0]).exp()),
    ]
    if sums[:, 2].sum():
        rows.append(row("bits_per_byte", lambda s: s[..., 1] / s[..., 2] / math.log(2)))
    if sums[:, 3].sum():
        rows += [
            row("kl", lambda s: s[..., 4] / s[..., 0]),
            row("top1_agreement", lambda s: s[..., 5] / s[..., 0]),
            row("top5_agreement", lambda s: s[..., 6] / s[..., 0]),
        ]
        if unigram is not None:
            rows.append(
                row(
                    "recovered_share",
                    lambda s: recovered_share(s[..., 1] / s[..., 0], s[..., 3] / s[..., 0], unigram),
                )
            )
    return rows


def unigram_loss(train: Iterable[Tensor], held_out: Iterable[Batch], vocabulary: int) -> float:
    """Held-out loss in nats of the model that knows only how frequent each token is (add-one smoothed): the floor
    from which recovery is counted. It predicts the tokens that `compare` counts."""
    counts = torch.ones(vocabulary, dtype=torch.float64)
    for batch in train:
        counts += torch.bincount(batch.flatten(), minlength=vocabulary)
    log_p = (counts / counts.sum()).log()
    targets = torch.cat([_unpack(batch)[2].flatten() for batch in held_out])
    return -log_p[targets[targets != LOSS_IGNORED_LABEL]].mean().item()


def recovered_share(loss, teacher_loss, unigram):
    """(L_unigram - L_student) / (L_unigram - L_teacher): 0 is a model that knows token frequencies, 1 the teacher.
    Of numbers, or tensors of them."""
    return (unigram - loss) / (unigram - teacher_loss)
