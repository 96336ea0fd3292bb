"""Compares students with their teacher and with what needs no training: the teacher behind a window and four sinks.

    python scripts/students_and_windows.py DIR [DIR ...] --teacher smollm2-135m --text books.valid.txt
        --lambada lambada_openai.jsonl.gz [--windows 64,96,192] [--device cuda] [--json FILE]

DIR is the output of `subquad distill`. Columns: loss in nats per token on rows of 512 and 2,048 tokens and on the
second half of the latter, KL from the teacher and agreement with its most likely token on rows of 512, LAMBADA's
accuracy by greedy decoding, and bytes of the state in the dtype of the weights. A window of N tokens keeps N + 4.
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import subquad
from subquad.evaluate.efficiency import prefill
from subquad.modeling.cache import CACHE_ARGUMENT, cache_bytes

SINKS = 4
Logits = Callable[[Tensor], Tensor]
"""From token ids `[B, T]` to logits `[B, T, vocab]`."""


def behind_window(teacher, window: int) -> Logits:
    def logits(ids: Tensor) -> Tensor:
        i = torch.arange(ids.shape[1], device=ids.device)
        distance = i[:, None] - i
        seen = (distance >= 0) & ((distance < window) | (i < SINKS))
        mask = torch.zeros(seen.shape, dtype=teacher.dtype, device=ids.device).masked_fill(~seen, -torch.inf)
        return teacher(input_ids=ids, attention_mask=mask.expand(len(ids), 1, -1, -1), use_cache=False).logits

    return logits


def plain(model) -> Logits:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def text_losses(logits: Logits, rows: Tensor, batch: int) -> Tensor:
    """Loss in nats of every predicted token, `[rows, T - 1]`."""
    losses = []
    for ids in rows.split(batch):
        found = logits(ids)[:, :-1].float()
        losses.append(F.cross_entropy(found.transpose(1, 2), ids[:, 1:], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def agreement(logits: Logits, teacher: Logits, rows: Tensor, batch: int) -> tuple[float, float]:
    """KL(teacher || student) in nats per token, and the share of tokens whose most likely successor is the same."""
    kl, same = [], []
    for ids in rows.split(batch):
        log_p, log_q = (f(ids)[:, :-1].float().log_softmax(-1) for f in (teacher, logits))
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
    return float(torch.cat(kl).mean()), float(torch.cat(same).float().mean())


@torch.no_grad()
def lambada(logits: Logits, items: list[tuple[list[int], int]], device: torch.device, batch: int) -> float:
    """Share of items whose last word is the most likely one, token by token."""
    order = sorted(range(len(items)), key=lambda i: len(items[i][0]))
    correct = 0
    for start in range(0, len(order), batch):
        chosen = [items[i] for i in order[start : start + batch]]
        ids = torch.zeros(len(chosen), max(len(x) for x, _ in chosen), dtype=torch.long, device=device)
        for row, (tokens, _) in zip(ids, chosen, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, device=device)
        best = logits(ids).argmax(-1)
        for row, found, (tokens, count) in zip(ids, best, chosen, strict=True):
            word = slice(len(tokens) - count, len(tokens))
            correct += bool((found[word.start - 1 : word.stop - 1] == row[word]).all())
    return correct / len(items)


def lambada_items(path: Path, tokenizer, limit: int | None) -> list[tuple[list[int], int]]:
    """Tokens of context and last word, and the number of tokens of the word."""
    with gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in file][:limit]
    items = []
    for record in records:
        context = tokenizer(record["context"])["input_ids"]
        word = tokenizer(" " + record["continuation"].strip(), add_special_tokens=False)["input_ids"]
        items.append((context + word, len(word)))
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lambada", type=Path)
    parser.add_argument("--limit", type=int, help="items of LAMBADA")
    parser.add_argument("--windows", default="64,96,192")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the text, for each length of rows")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    teacher, tokenizer = subquad.load_teacher(args.teacher, dtype)
    teacher.to(args.device)
    text = tokenizer(args.text.read_text()[: 8 * args.tokens], add_special_tokens=False)["input_ids"][: args.tokens]
    rows = {T: torch.tensor(text[: len(text) // T * T], device=args.device).view(-1, T) for T in (512, 2048)}
    items = lambada_items(args.lambada, tokenizer, args.limit) if args.lambada else []
    config = teacher.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    models: dict[str, tuple[Logits, int | None]] = {"teacher": (plain(teacher), None)}
    for window in map(int, filter(None, args.windows.split(","))):
        models[f"window {window} + {SINKS}"] = behind_window(teacher, window), (window + SINKS) * token_bytes
    for directory in args.students:
        student = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(args.device).eval()
        state = cache_bytes(prefill(student, rows[512][:1])[CACHE_ARGUMENT])
        models[directory.name] = plain(student), state
    results: list[dict[str, Any]] = []
    for name, (logits, state) in models.items():
        long = text_losses(logits, rows[2048], max(1, args.batch // 4))
        kl, same = agreement(logits, models["teacher"][0], rows[512], args.batch)
        result = {
            "model": name,
            "512": float(text_losses(logits, rows[512], args.batch).mean()),
            "2048": float(long.mean()),
            "late": float(long[:, 1023:].mean()),
            "kl": kl,
            "top1_agreement": same,
            "lambada": lambada(logits, items, args.device, args.batch) if items else None,
            "state_bytes": state,
        }
        print(json.dumps(result), flush=True)
        results.append(result)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
