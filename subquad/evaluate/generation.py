"""Greedy generation: continuations compared with the teacher's, repetition, and last-word tasks.

Linearized models lose more in generation than likelihoods show (arXiv 2603.26556).
"""

import string
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.evaluate.results import Result
from subquad.evaluate.statistics import mean
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.utils import eval_mode

LENGTHS = (16, 64, 256)
NGRAM = 4
DEGENERATE_SHARE = 0.5
"""A continuation with a larger share of repeated n-grams is degenerate."""


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor, tokens: int, batch_size: int = 16) -> Tensor:
    """Greedy continuations of `prompts: [N, T]`: `[N, tokens]`. An end-of-text token does not stop them."""
    written = []
    with eval_mode(model):
        for batch in prompts.split(batch_size):
            input_ids, cache, tokens_out = batch.to(model.device), None, []
            for _ in range(tokens):
                out = model(input_ids=input_ids, use_cache=True, **{CACHE_ARGUMENT: cache})
                cache = out[CACHE_ARGUMENT]
                input_ids = out.logits[:, -1:].argmax(-1)
                tokens_out.append(input_ids)
            written.append(torch.cat(tokens_out, dim=1).cpu())
    return torch.cat(written)


def common_prefix(a: Tensor, b: Tensor) -> Tensor:
    """The number of tokens before the first difference between the rows of `a: [N, T]` and `b: [N, T]`: `[N]`."""
    return (a == b).long().cumprod(1).sum(1)


def repeated_ngram_share(tokens: Tensor, n: int = NGRAM) -> Tensor:
    """The share of n-grams of each row of `tokens: [N, T]` that occurred earlier in the row: `[N]`, float64."""
    if tokens.shape[1] < n:
        return torch.zeros(len(tokens), dtype=torch.float64)
    ngrams = tokens.unfold(1, n, 1)
    distinct = [len({tuple(ngram) for ngram in row}) for row in ngrams.tolist()]
    return 1 - torch.tensor(distinct, dtype=torch.float64) / ngrams.shape[1]


def repetition_results(task: str, written: Tensor) -> list[Result]:
    """`repetition` (mean share of repeated n-grams) and `degenerate_rate` of continuations `[N, T]`."""
    shares = repeated_ngram_share(written)
    length = written.shape[1]
    return [
        mean(shares).result(task, "repetition", length=length),
        mean((shares > DEGENERATE_SHARE).double()).result(task, "degenerate_rate", length=length),
    ]


def agreement_results(task: str, written: Tensor, reference: Tensor, lengths: Sequence[int] = LENGTHS) -> list[Result]:
    """Continuations `[N, T]` against the teacher's of the same prompts: `common_prefix` (mean tokens before the first
    difference) and `same_continuation` (share of rows equal over the first 16, 64, 256 tokens)."""
    same = common_prefix(written, reference)
    results = [mean(same).result(task, "common_prefix", length=written.shape[1])]
    return results + [
        mean((same >= n).double()).result(task, "same_continuation", length=n) for n in lengths if n <= written.shape[1]
    ]


# ---------------------------------------------------------------------- last words


def last_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    tokens: int = 8,
    batch_size: int = 16,
) -> list[str]:
    """The first word that a model generates greedily after each context, without surrounding punctuation."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encoded = [tokenizer(text).input_ids for text in contexts]
    longest_first = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    words: dict[int, str] = {}
    with eval_mode(model):
        for start in range(0, len(encoded), batch_size):
            batch = longest_first[start : start + batch_size]
            width = len(encoded[batch[0]])
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch])
            out = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask.to(model.device),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=pad,
            )
            for i, row in zip(batch, out[:, width:].tolist(), strict=True):
                words[i] = first_word(str(tokenizer.decode(row, skip_special_tokens=True)))
    return [words[i] for i in range(len(encoded))]


def first_word(text: str) -> str:
    """The first word of a text without surrounding punctuation: `first_word(' "Signs," he') == "Signs"`."""
    pieces = text.split()
    return pieces[0].strip(string.punctuation + "“”‘’—…") if pieces else ""


def last_word_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[tuple[str, str]]
) -> Tensor:
    """1 for each item (context, word) whose word the model generates, else 0: `[n]`, float64."""
    written = last_words(model, tokenizer, [context for context, _ in items])
    expected = [first_word(word) for _, word in items]
    return torch.tensor([float(a == b) for a, b in zip(written, expected, strict=True)], dtype=torch.float64)
