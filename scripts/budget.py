"""Measures a budgeted student against its teacher and the uniform window of equal bytes; nothing is trained.

    python scripts/budget.py smollm2-135m --calibrate books.train.txt --text books.valid.txt
        --lambada lambada_openai.jsonl.gz --budget 96 --output results/budget/smollm2-135m.json

The windows are chosen on the calibration text alone. Losses are of rows of 2,048 and 8,192 tokens; the offset of each
row in the text, in characters, is in the output. LAMBADA's first items are answered greedily; the interval is a paired
bootstrap of the ratio to the teacher's accuracy.
"""

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import subquad
from subquad.config import Data
from subquad.data import spread_rows
from subquad.evaluate.long_context import position_losses
from subquad.evaluate.statistics import TaskScores, accuracy_results
from subquad.modeling.budget import allocate_budget, calibration_shape
from subquad.modeling.linearize import linearize
from subquad.utils import run_info, write_json_atomic

ROWS = {2048: 3, 8192: 1}
"""Number of rows by their length."""
CHARACTERS = 16
"""Characters read for each token, more than there are."""


def read_rows(text: str, tokenizer: Any, length: int, count: int, start: int) -> tuple[Tensor, list[int]]:
    """`[count, length]` token ids from character `start` on, and the offset of each row in the text."""
    encoded = tokenizer(text[start : start + CHARACTERS * length * count], return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"][: length * count]).view(count, length)
    return ids, [start + encoded["offset_mapping"][row * length][0] for row in range(count)]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, items: list[dict[str, str]], batch: int = 10) -> list[float]:
    """1 for each item whose last word is the most likely one, token by token; else 0."""
    encoded = []
    for item in items:
        context = tokenizer(item["context"])["input_ids"]
        word = tokenizer(" " + item["continuation"].strip(), add_special_tokens=False)["input_ids"]
        encoded.append((context + word, len(word)))
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    correct = [0.0] * len(items)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids = torch.zeros(len(chosen), max(len(encoded[i][0]) for i in chosen), dtype=torch.long)
        for row, i in zip(ids, chosen, strict=True):
            row[: len(encoded[i][0])] = torch.tensor(encoded[i][0])
        logits = model(input_ids=ids, use_cache=False).logits
        for found, i in zip(logits, chosen, strict=True):
            tokens, count = encoded[i]
            best = found[len(tokens) - count - 1 : len(tokens) - 1].argmax(-1)
            correct[i] = float(best.tolist() == tokens[-count:])
    return correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--start", type=int, default=200_000, help="first character of the text")
    parser.add_argument("--lambada", type=Path, required=True)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--budget", default="96")
    parser.add_argument("--memory", help="also measures a budget that may be spent on memories by this mixer")
    parser.add_argument("--student", action="append", default=[], help="also measures a saved student; may be repeated")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher(args.teacher)
    text = args.text.read_text()
    with gzip.open(args.lambada, "rt") as file:
        items = [json.loads(line) for line in file][: args.items]
    start = time.perf_counter()
    ids = spread_rows(Data(source=args.calibrate), tokenizer, *calibration_shape(teacher))
    allocation = allocate_budget(teacher, args.budget, ids)
    seconds = time.perf_counter() - start
    uniform = {"mixer": "attention", "window": int(args.budget), "sinks": allocation.sinks}
    models = {
        "teacher": teacher,
        f"budget {args.budget}": linearize(teacher, layer_types=allocation.layer_types).eval(),
        f"window {args.budget} + {allocation.sinks}": linearize(teacher, layer_types={"default": uniform}).eval(),
    }
    memory_heads: dict[str, Any] = {}
    if args.memory is not None:
        with_memory = allocate_budget(teacher, args.budget, ids, memory=args.memory)
        student = linearize(teacher, layer_types=with_memory.layer_types).eval()
        with_memory.set_memories(student)
        models[f"budget {args.budget}, memory {args.memory}"] = student
        memory_heads = {"memory_heads": with_memory.memory_heads, "memory_windows": with_memory.windows}
        print(sum(map(len, with_memory.memory_heads)), "heads with a memory", flush=True)
    models |= {Path(name).name: subquad.load_teacher(name)[0] for name in args.student}
    rows = {length: read_rows(text, tokenizer, length, count, args.start) for length, count in ROWS.items()}
    correct = {name: answers(model, tokenizer, items) for name, model in models.items()}
    results: dict[str, Any] = {}
    for name, model in models.items():
        scores = TaskScores(correct[name], correct["teacher"], chance=0.0)
        ratio = accuracy_results("lambada", scores)[0]
        found = {"lambada": sum(correct[name]) / len(items), "lambada_ratio": [ratio.value, ratio.low, ratio.high]}
        for length, (tokens, _) in rows.items():
            losses = position_losses(model, tokens, label=f"{name}, {length} tokens").double()
            found |= {f"loss_{length}": float(losses.mean()), f"late_{length}": float(losses[:, length // 2 :].mean())}
        results[name] = found
        print(name, json.dumps(found), flush=True)
    settings = {
        "teacher": args.teacher,
        "budget": args.budget,
        "text": args.text.name,
        "calibration": Path(args.calibrate).name,
        "offsets": {length: offsets for length, (_, offsets) in rows.items()},
        "lambada_items": len(items),
        "allocation_seconds": round(seconds, 1),
    }
    windows: dict[str, Any] = {
        "windows": allocation.windows,
        "sinks": allocation.sinks,
        "cache_bytes": allocation.cache_bytes,
    }
    windows |= memory_heads
    write_json_atomic(args.output, {**run_info(), **settings, **windows, "results": results})


if __name__ == "__main__":
    main()
