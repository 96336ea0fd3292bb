"""Metrics on validation text: perplexity, bits per byte, KL divergence from the teacher, agreement with it."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import estimate
from subquad.evaluate.token_bytes import byte_counter
from subquad.utils import eval_mode

Batch = Tensor | Mapping[str, Tensor]
"""Token ids `[B, T]`, or a batch of `subquad.data`: `input_ids`, optional `position_ids` and `labels`."""

CHUNK_TOKENS = 256
"""Tokens whose distributions are held in float64 at a time."""

UNIGRAM_TOKENS = 200_000
"""Training tokens that the unigram model counts (`unigram_perplexity`, `recovered_share`)."""

SUMS = ("tokens", "loss", "bytes", "teacher_loss", "kl", "top1", "top5")


@torch.no_grad()
def token_sums(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tensor:
    """Sums over the predicted tokens of each row of text, `[rows, 7]`, float64, in the order of `SUMS`.

    These are the number of tokens, the loss in nats, and the bytes of their text (0 without a tokenizer); with a
    teacher (else 0) its loss, KL(teacher || student), and how often the teacher's most likely token is the model's most
    likely one, or among its five most likely.

    Raises:
        ValueError: no predicted token.
    """
    rows = []
    count_bytes = None if tokenizer is None else byte_counter(tokenizer)
    with eval_mode(model):
        for batch in batches:
            ids, inputs, labels = _unpack(batch)
            logits = _logits(model, ids, inputs)
            teacher_logits = None
            if teacher is not None and teacher is not model:
                with eval_mode(teacher):
                    teacher_logits = _logits(teacher, ids, inputs)
            elif teacher is model:
                teacher_logits = logits
            for b in range(len(ids)):
                counted = labels[b] != IGNORE_INDEX
                reference = None if teacher_logits is None else teacher_logits[b][counted]
                sums = prediction_sums(logits[b][counted], reference, labels[b][counted])
                sums[2] = 0 if count_bytes is None else count_bytes(ids[b][counted], labels[b][counted])
                rows.append(sums)
    if not rows or not sum(row[0] for row in rows):
        raise ValueError("batches: got no predicted token, expected at least one batch of at least two tokens")
    return torch.stack(rows)


def _unpack(batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Token ids, other inputs of the model, and the label of each position."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    inputs = {name: batch[name] for name in ("position_ids",) if name in batch}
    return batch["input_ids"], inputs, next_labels(batch)


def _logits(model: PreTrainedModel, ids: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model(input_ids=ids.to(model.device), use_cache=False, **inputs).logits


def kl_divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, `[...]`, from p and both logarithms, `[..., vocab]`. A token with probability 0 in p adds 0,
    also where it has probability 0 in q."""
    return (p * (log_p - log_q)).masked_fill_(log_p == -torch.inf, 0).sum(-1)


def prediction_sums(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
    """The sums of one row of text but for its bytes, `[7]`, from logits `[T, vocab]` and labels `[T]`.

    Logits that are NaN make every sum that depends on them NaN, the counts of agreement too.
    """
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    sums[0] = len(labels)
    for chunk in torch.arange(len(labels)).split(CHUNK_TOKENS):
        log_q = F.log_softmax(logits[chunk.to(logits.device)].double(), dim=-1)
        target = labels[chunk].to(log_q.device)
        sums[1] += F.nll_loss(log_q, target, reduction="sum").cpu()
        if teacher_logits is None:
            continue
        log_p = F.log_softmax(teacher_logits[chunk.to(teacher_logits.device)].double(), dim=-1).to(log_q.device)
        top1 = log_p.argmax(-1)
        top5 = log_q.topk(min(5, log_q.shape[-1]), dim=-1).indices
        agreement = torch.stack([top1 == log_q.argmax(-1), (top5 == top1[:, None]).any(-1)]).double()
        undefined = (log_p + log_q).isnan().any(-1)
        sums[3] += F.nll_loss(log_p, target, reduction="sum").cpu()
        sums[4] += kl_divergence(log_p.exp(), log_p, log_q).sum().cpu()
        sums[5:] += agreement.masked_fill(undefined, torch.nan).sum(-1).cpu()
    return sums


def compare(student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over all predicted tokens.

    Returns loss and teacher_loss (nats), their perplexities, kl (KL(teacher || student), nats) and top1_agreement
    (share of tokens). A model compared with itself has kl 0 and agreement 1.
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
    """Results from `token_sums`, with bootstrap intervals over rows of text.

    unigram: the loss of the unigram model in nats (`unigram_loss`), needed for `recovered_share`.
    """
    statistics: dict[str, Callable[[Tensor], Tensor]] = {
        "loss": lambda s: s[..., 1] / s[..., 0],
        "perplexity": lambda s: (s[..., 1] / s[..., 0]).exp(),
    }
    if sums[:, 2].sum():
        statistics["bits_per_byte"] = lambda s: s[..., 1] / s[..., 2] / math.log(2)
    if sums[:, 3].sum():
        statistics["kl"] = lambda s: s[..., 4] / s[..., 0]
        statistics["top1_agreement"] = lambda s: s[..., 5] / s[..., 0]
        statistics["top5_agreement"] = lambda s: s[..., 6] / s[..., 0]
        if unigram is not None:
            statistics["recovered_share"] = lambda s: recovered_share(
                s[..., 1] / s[..., 0], s[..., 3] / s[..., 0], unigram
            )
    count = int(sums[:, 0].sum())
    return [estimate(task, metric, sums, statistic, count) for metric, statistic in statistics.items()]


def unigram_loss(train: Iterable[Tensor], validation: Iterable[Batch], vocabulary: int) -> float:
    """The validation loss in nats of the unigram model (add-one smoothed), over the tokens that `compare` counts.

    train: token ids of the training text. vocabulary: number of tokens.
    """
    counts = torch.ones(vocabulary, dtype=torch.float64)
    for batch in train:
        counts += torch.bincount(batch.flatten(), minlength=vocabulary)
    log_p = (counts / counts.sum()).log()
    targets = torch.cat([_unpack(batch)[2].flatten() for batch in validation])
    return -log_p[targets[targets != IGNORE_INDEX]].mean().item()


def recovered_share(loss, teacher_loss, unigram):
    """(unigram - loss) / (unigram - teacher_loss), of floats or tensors: 0 for the unigram model, 1 for the teacher."""
    return (unigram - loss) / (unigram - teacher_loss)
