"""Measure sparse targets of the teacher in stage 3: students of nano at equal tokens, bytes and time.

    python scripts/teacher_targets.py DIR     # runs what is missing in DIR, writes the table

The recipe is small-budget with 12,288 tokens of stage 2, then 36,864 of stage 3 without cross-entropy, on three seeds.
The table, results/teacher-targets/nano.csv, has perplexity and KL divergence (means and 95% intervals),
the change of the latter against full targets of the same seed, and per token of stage 3 the bytes of the cache, the
share of the teacher's probability that is left out, and milliseconds of processor time: of the teacher's pass that
fills the cache, and of loss and gradients in training.
"""

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path

import torch
from small_budget import RECIPE, ROOT, SEEDS, cell

import subquad
from subquad.config import Recipe, load_recipe
from subquad.data import token_rows
from subquad.distill.end_to_end import EndToEndDistillation
from subquad.distill.objective import collate
from subquad.study.grid import run_study
from subquad.study.runs import find_runs

TABLE = ROOT / "results" / "teacher-targets" / "nano.csv"
BUDGET = ("stages.hidden.tokens=12_288", "stages.end_to_end.tokens=36_864", "stages.end_to_end.ce_weight=0")
METHODS = [("full", 64), *((method, size) for method in ("sampled", "top_k") for size in (16, 64))]
TIMED_ROWS = 24


def recipes_of(method: str, size: int) -> list[Recipe]:
    targets = f"stages.end_to_end.teacher_targets={method}", f"stages.end_to_end.target_size={size}"
    return [load_recipe(RECIPE, [*BUDGET, *targets, f"seed={seed}"]) for seed in SEEDS]


def cost(recipe: Recipe) -> list[str]:
    """Bytes and the share left out of a new cache, and milliseconds of processor time of its pass and of training, all
    per token."""
    teacher, tokenizer = subquad.load_teacher(recipe.teacher)
    text = token_rows(recipe.data, tokenizer, "train", limit=TIMED_ROWS * recipe.data.seq_len)
    rows = [text[i] for i in range(TIMED_ROWS)]
    objective = EndToEndDistillation(teacher.requires_grad_(False), recipe.stages.end_to_end)
    student = subquad.linearize(teacher, recipe.student.mixer).requires_grad_(True)
    objective.head_of(student)
    tokens, cells = TIMED_ROWS * recipe.data.seq_len, ["", "", ""]
    if recipe.stages.end_to_end.teacher_targets != "full":
        with tempfile.TemporaryDirectory() as directory:
            os.environ["SUBQUAD_CACHE"] = directory
            start = time.process_time()
            objective.prepare(rows)
            seconds = time.process_time() - start
            del os.environ["SUBQUAD_CACHE"]
            found = objective.target_cache.summary(objective.target_rows)
        outside = f"{found['outside']:.1%}" if found["outside"] else ""
        cells = [f"{found['bytes'] / found['tokens']:.0f}", outside, f"{1e3 * seconds / tokens:.2f}"]
    start = time.process_time()
    for row in rows:
        student(objective=objective, **objective.forward_kwargs(collate([row]))).loss.backward()
    return [*cells, f"{1e3 * (time.process_time() - start) / tokens:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = find_runs([recipe for method in METHODS for recipe in recipes_of(*method)], args.study)
    run_study([run.recipe for run in runs], args.study, log=print)
    lines, full = [], []
    for method, size in METHODS:
        own = recipes_of(method, size)
        results = [result for run in find_runs(own, args.study) if (result := run.result()) is not None]
        if len(results) < len(SEEDS):
            continue  # failed
        full = full or [result["kl"] for result in results]
        change = [result["kl"] - kl for result, kl in zip(results, full, strict=True)]
        scores = [cell([result[key] for result in results], digits) for key, digits in (("perplexity", 2), ("kl", 3))]
        names = ["full", ""] if method == "full" else [f"`{method}`, {size}", cell(change, 4)]
        lines.append([names[0], *scores, names[1], *cost(own[0])])
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    header = ["targets", "perplexity", "KL", "change of KL", "bytes", "left out", "pass, ms", "training, ms"]
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])


if __name__ == "__main__":
    main()
