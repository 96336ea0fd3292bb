"""Measures needles in a haystack: a teacher, and the student that keeps the key/value groups that a ranking puts first.

    python scripts/needles.py smollm2-135m --calibrate books.train.txt --text books.valid.txt
        --keep 8 --window 64 --output results/needles/smollm2-135m.json

The groups are ranked on the calibration text alone; the needles are drawn in the other. `acc` is by likelihood among
four answers, `acc_generated` by greedy writing.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch

import subquad
from subquad.analysis.recall import recall_results
from subquad.config import Data
from subquad.data import spread_rows
from subquad.modeling.attention.discovery import discover_attention
from subquad.selection.ranking import kept_layer_types, rank_groups
from subquad.selection.texts import HAYSTACK
from subquad.utils import run_info, write_json_atomic

TASKS = ("needle_number", "needle_word")
DEPTHS = (0.0, 0.25, 0.5, 0.75)
KEYS = ("task", "length", "metric", "value", "n")
METRICS = ("acc", "acc_generated", "loglikelihood")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--calibrate", required=True, help="text source on which the groups are ranked")
    parser.add_argument("--text", required=True, type=Path, help="text file in which the needles are")
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--items", type=int, default=6, help="for each task, length and depth")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher(args.teacher)
    start, layers = time.perf_counter(), discover_attention(teacher)
    calibration = spread_rows(Data(source=args.calibrate), tokenizer, *HAYSTACK).flatten()
    ranking = rank_groups(teacher, tokenizer, calibration, keep=args.keep, attention_layers=layers)
    seconds = time.perf_counter() - start
    kept = [(unit.layer, unit.kv_head) for unit in ranking[: args.keep]]
    print(f"{seconds:.0f} s for the ranking; kept: {kept}", flush=True)
    types = kept_layer_types(ranking[: args.keep], [info.spec.num_kv_heads for info in layers], args.window)
    models = {"teacher": teacher, "student": subquad.linearize(teacher, layer_types=types, attention_layers=layers)}
    haystack = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8")).input_ids)
    rows = []
    for length, (name, model) in itertools.product(map(int, args.lengths.split(",")), models.items()):
        found = recall_results(model, tokenizer, haystack, TASKS, [length], DEPTHS, args.items)
        for result in found:
            if result.depth is None and result.metric in METRICS:
                rows.append({"model": name, **{key: getattr(result, key) for key in KEYS}})
                print(name, result.task, length, result.metric, f"{result.value:.3f}", f"n {result.n}", flush=True)
        write_json_atomic(args.output, {**run_info(), "kept": kept, "ranking_seconds": seconds, "results": rows})


if __name__ == "__main__":
    main()
