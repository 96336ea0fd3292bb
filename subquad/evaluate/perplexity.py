"""Metrics on validation text: perplexity, bits per byte, KL divergence from the teacher, agreement with it."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sized

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad import progress
from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import estimate
from subquad.utils import eval_mode, kl_divergence

Batch = Tensor | Mapping[str, Tensor]
"""Token ids `[B, T]`, or a batch of `subquad.data`: `input_ids`, optional `position_ids` and `labels`."""

CHUNK_BYTES, CPU_CHUNK_BYTES = 2**27, 2**22
"""Size of the float64 distributions of the tokens that are compared at a time. On a CPU they stay in its cache, and
temporary tensors reuse memory of the process: a third of the time of larger chunks with a vocabulary of 49,152."""

UNIGRAM_TOKENS = 200_000
"""Training tokens that the unigram model counts (`unigram_perplexity`, `recovered_share`)."""

MAX_LOSS = math.log(sys.float_info.max)
SPACES = ("\u2581", "\u0120")
"""How vocabularies of sentencepiece and of bytes write a space."""

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
    with progress.bar(len(batches) if isinstance(batches, Sized) else None, "perplexity", "batches", delay=3) as bar:
        for batch in map(_as_mapping, batches):
            logits = _logits(model, batch)
            reference = logits if teacher is model else None if teacher is None else _logits(teacher, batch)
            for b, (ids, labels) in enumerate(zip(batch["input_ids"], next_labels(batch), strict=True)):
                counted = labels != IGNORE_INDEX
                targets = labels[counted]
                of_teacher = None if reference is None else reference[b][counted]
                sums = prediction_sums(logits[b][counted], of_teacher, targets)
                if count_bytes is not None:
                    sums[2] = count_bytes(ids[counted], targets)
                rows.append(sums)
            bar.update()
    if not rows or not sum(row[0] for row in rows):
        raise ValueError("batches: got no predicted token, expected at least one batch of at least two tokens")
    return torch.stack(rows)


def _as_mapping(batch: Batch) -> Mapping[str, Tensor]:
    return {"input_ids": batch} if isinstance(batch, Tensor) else batch


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
    with eval_mode(model):
        return model(**inputs, use_cache=False).logits


def prediction_sums(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
    """The sums of one row of text but for its bytes, `[7]`, from logits `[T, vocab]` and labels `[T]`.

    Logits that are NaN make every sum that depends on them NaN, the counts of agreement too.
    """
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    sums[0] = len(labels)
    size = CPU_CHUNK_BYTES if logits.device.type == "cpu" else CHUNK_BYTES
    for chunk in torch.arange(len(labels)).split(max(1, size // (8 * logits.shape[-1]))):
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
        "perplexity": perplexity(loss / count),
        "teacher_perplexity": perplexity(teacher_loss / count),
        "kl": kl / count,
        "top1_agreement": agreement / count,
    }


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    return math.inf if loss > MAX_LOSS else math.exp(loss)


def language_results(task: str, sums: Tensor, unigram: float | None = None) -> list[Result]:
    """Results from `token_sums`, with bootstrap intervals over rows of text.

    unigram: the loss of the unigram model in nats (`unigram_loss`), needed for `recovered_share`.
    """

    def per_token(name: str) -> Callable[[Tensor], Tensor]:
        return lambda s: s[..., SUMS.index(name)] / s[..., 0]

    loss, teacher_loss = per_token("loss"), per_token("teacher_loss")
    statistics = {"loss": loss, "perplexity": lambda s: loss(s).exp()}
    if sums[:, 2].sum():
        statistics["bits_per_byte"] = lambda s: s[..., 1] / s[..., 2] / math.log(2)
    if sums[:, 3].sum():
        agreement = {f"top{k}_agreement": per_token(f"top{k}") for k in (1, 5)}
        statistics |= {"kl": per_token("kl"), **agreement}
        if unigram is not None:
            statistics["recovered_share"] = lambda s: recovered_share(loss(s), teacher_loss(s), unigram)
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
    targets = torch.cat([next_labels(_as_mapping(batch)).flatten() for batch in validation])
    return -log_p[targets[targets != IGNORE_INDEX]].mean().item()


def recovered_share(loss, teacher_loss, unigram):
    """(unigram - loss) / (unigram - teacher_loss), of floats or tensors: 0 for the unigram model, 1 for the teacher."""
    return (unigram - loss) / (unigram - teacher_loss)


# ---------------------------------------------------------------------- bytes


def byte_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[Tensor, Tensor], int]:
    """A function that returns the UTF-8 bytes of the text of tokens `[T]`, given the token before each, `[T]`, so that
    rows may begin and end within a character.

    Special tokens have none, nor has a space that the tokenizer itself puts before a text. Exact for vocabularies of
    bytes and of sentencepiece, whose tokens are counted one by one; other tokens hold whole characters and are decoded
    together.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = "" if backend is None else json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
    of_bytes, with_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
    if not of_bytes and SPACES[0] not in decoder:
        return lambda before, tokens: len(
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()  # type: ignore[union-attr]
        )
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    lengths, spaces = torch.zeros(2, max(vocabulary.values()) + 1, dtype=torch.long)
    for token, index in vocabulary.items():
        if index in special:
            continue
        spaces[index] = token.startswith(SPACES)
        if of_bytes and index not in added:
            lengths[index] = len(token)  # one character for each byte
        elif with_fallback and len(token) == 6 and token.startswith("<0x"):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace(SPACES[0], " ").encode())
    if not tokenizer.tokenize("a")[0].startswith(SPACES):
        spaces.zero_()

    def count(before: Tensor, tokens: Tensor) -> int:
        before, tokens = before.cpu(), tokens.cpu()
        return int((lengths[tokens] - spaces[tokens] * (lengths[before] == 0)).sum())

    return count
