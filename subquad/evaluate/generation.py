"""What a model writes by itself, where linearized models fall behind while likelihoods hide it (arXiv 2603.26556):
greedy continuations beside the teacher's, repetition, and a text's last word by generation.
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
GRAM = 4
DEGENERATE_SHARE = 0.5
"""A continuation of whose runs of `GRAM` tokens more than this share have stood in it before is degenerate."""


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor, tokens: int, rows_a_batch: int = 16) -> Tensor:
    """Greedy continuations of `prompts: [N, T]`: `[N, tokens]`. The end of a text does not stop them."""
    written = []
    with eval_mode(model):
        for some in prompts.split(rows_a_batch):
            fed, cache, found = some.to(model.device), None, []
            for _ in range(tokens):
                out = model(input_ids=fed, use_cache=True, **{CACHE_ARGUMENT: cache})
                cache = out[CACHE_ARGUMENT]
                fed = out.logits[:, -1:].argmax(-1)
                found.append(fed)
            written.append(torch.cat(found, dim=1).cpu())
    return torch.cat(written)


def common_prefix(a: Tensor, b: Tensor) -> Tensor:
    """Tokens up to the first in which `a: [N, T]` and `b: [N, T]` differ: `[N]`."""
    return (a == b).long().cumprod(1).sum(1)


def repeated_share(tokens: Tensor, gram: int = GRAM) -> Tensor:
    """Of each row of `tokens: [N, T]`, the share of its runs of `gram` tokens that have stood in it before: `[N]`."""
    if tokens.shape[1] < gram:
        return torch.zeros(len(tokens), dtype=torch.float64)
    runs = tokens.unfold(1, gram, 1)
    different = [len({tuple(run) for run in row}) for row in runs.tolist()]
    return 1 - torch.tensor(different, dtype=torch.float64) / runs.shape[1]


def repetition_results(task: str, written: Tensor) -> list[Result]:
    """`repetition` (mean share of repeated runs) and `degenerate` (share of continuations that go round in circles)."""
    shares = repeated_share(written)
    length = written.shape[1]
    return [
        mean(shares).row(task, "repetition", length=length),
        mean((shares > DEGENERATE_SHARE).double()).row(task, "degenerate", length=length),
    ]


def agreement_results(task: str, written: Tensor, teachers: Tensor, lengths: Sequence[int] = LENGTHS) -> list[Result]:
    """Beside the teacher's continuations of the same prompts: `common_prefix` (mean tokens up to the first that
    differs) and `same_continuation` (share equal over the first 16, 64, 256 tokens)."""
    same = common_prefix(written, teachers)
    rows = [mean(same).row(task, "common_prefix", length=written.shape[1])]
    return rows + [
        mean((same >= n).double()).row(task, "same_continuation", length=n) for n in lengths if n <= written.shape[1]
    ]


# ---------------------------------------------------------------------- the last word


def last_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    tokens: int = 8,
    rows_a_batch: int = 16,
) -> list[str]:
    """The word that a model writes behind each context, greedily; without punctuation around it."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encoded = [tokenizer(text).input_ids for text in contexts]
    longest_first = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    words: dict[int, str] = {}
    with eval_mode(model):
        for start in range(0, len(encoded), rows_a_batch):
            some = longest_first[start : start + rows_a_batch]
            width = len(encoded[some[0]])
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in some], device=model.device)
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in some])
            out = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask.to(model.device),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=pad,
            )
            for i, row in zip(some, out[:, width:].tolist(), strict=True):
                words[i] = first_word(str(tokenizer.decode(row, skip_special_tokens=True)))
    return [words[i] for i in range(len(encoded))]


def first_word(text: str) -> str:
    """Of a text, without punctuation around it: `first_word(' "Signs," he') == "Signs"`."""
    pieces = text.split()
    return pieces[0].strip(string.punctuation + "“”‘’—…") if pieces else ""


def last_word_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[tuple[str, str]]
) -> Tensor:
    """1 where the model writes the word that stands behind a context, else 0, `[n]`; items: (context, word)."""
    written = last_words(model, tokenizer, [context for context, _ in items])
    wanted = [first_word(word) for _, word in items]
    return torch.tensor([float(a == b) for a, b in zip(written, wanted, strict=True)], dtype=torch.float64)
