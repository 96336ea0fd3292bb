"""Measure the small-budget recipe's changes one by one, each with three seeds at equal tokens.

    python scripts/small_budget.py DIR                              # runs what is missing in DIR, writes the table
    python scripts/small_budget.py DIR --only baseline "KL only"    # some of the changes

The table, results/small-budget/nano.csv, has the perplexity and the KL divergence from the teacher, and the change of
the loss against the baseline of the same seed, in nats per token; means and 95% intervals of the seeds.
"""

import argparse
import csv
import math
from pathlib import Path
from typing import Any

from subquad.config import Recipe, load_recipe
from subquad.study.aggregate import Mean
from subquad.study.grid import run_study
from subquad.study.runs import find_runs

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "subquad" / "recipes" / "small-budget.yaml"
TABLE = ROOT / "results" / "small-budget" / "nano.csv"
SEEDS = (0, 1, 2)
SLOW = "stages.end_to_end.param_groups.{}.lr"
OLD = ("attention_projections", "backbone", "embeddings")
XLSTM = ("student={mixer: xlstm, calibration_tokens: 1024}",)
CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("baseline", ()),
    "old weights at a tenth: stage 3 at 5e-3, old weights 5e-4": (
        "baseline",
        ("stages.end_to_end.lr=5e-3", *(f"{SLOW.format(group)}=5e-4" for group in OLD)),
    ),
    "old weights at a tenth: stage 3 at 5e-4, old weights 5e-5": (
        "baseline",
        tuple(f"{SLOW.format(group)}=5e-5" for group in OLD),
    ),
    "old weights at a tenth: stage 2 at 3e-3, projections 3e-4": (
        "baseline",
        ("stages.hidden.param_groups.attention_projections.lr=3e-4",),
    ),
    "KL only": ("baseline", ("stages.end_to_end.ce_weight=0",)),
    "CE only": ("baseline", ("stages.end_to_end.kl_weight=0",)),
    "0.9 CE + 0.1 KL": ("baseline", ("stages.end_to_end.ce_weight=0.9", "stages.end_to_end.kl_weight=0.1")),
    "head untied": ("baseline", ("stages.end_to_end.untie_head=true",)),
    "head untied, embeddings frozen": (
        "baseline",
        (
            "stages.end_to_end.untie_head=true",
            "stages.end_to_end.param_groups={embeddings: {frozen: true}, head: {frozen: false}}",
        ),
    ),
    "head untied, head frozen": (
        "baseline",
        ("stages.end_to_end.untie_head=true", "stages.end_to_end.param_groups={head: {frozen: true}}"),
    ),
    "tied, both frozen": ("baseline", ("stages.end_to_end.param_groups={embeddings: {frozen: true}}",)),
    "together: KL only, old weights 5e-5, head untied": (
        "baseline",
        (
            "stages.end_to_end.ce_weight=0",
            "stages.end_to_end.untie_head=true",
            *(f"{SLOW.format(group)}=5e-5" for group in OLD),
        ),
    ),
    "half-lives 3 to 32": ("baseline", ("student.mixer_kwargs={half_life: 3, longest_half_life: 32}",)),
    "xlstm": ("xlstm", XLSTM),
    "xlstm without output norm": ("xlstm", (*XLSTM, "student.mixer_kwargs={output_norm: false}")),
}
"""Of each change what it is compared with and what it overrides in the recipe."""


def recipes_of(name: str) -> list[Recipe]:
    return [load_recipe(RECIPE, [*CHANGES[name][1], f"seed={seed}"]) for seed in SEEDS]


def cell(values: list[float], digits: int) -> str:
    mean = Mean.of(values)
    half = "" if mean.high is None else f" ± {mean.high - mean.value:.{digits}f}"
    return f"{mean.value:.{digits}f}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    args = parser.parse_args()
    run_study([recipe for name in args.only for recipe in recipes_of(name)], args.study, log=print)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in CHANGES:
        found = [run.result() for run in find_runs(recipes_of(name), args.study)]
        if all(found):
            results[name] = [result for result in found if result is not None]
    lines = []
    for name, own in results.items():
        reference = results.get(CHANGES[name][0], [])
        changes = [math.log(a["perplexity"] / b["perplexity"]) for a, b in zip(own, reference, strict=False)]
        change = "" if CHANGES[name][0] == name or not changes else cell(changes, 3)
        lines.append([name, cell([r["perplexity"] for r in own], 2), cell([r["kl"] for r in own], 3), change])
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["change", "perplexity", "KL", "change of the loss"], *lines])


if __name__ == "__main__":
    main()
