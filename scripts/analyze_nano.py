"""Analyzes the students of a study, and correlates each diagnostic with the recovered share.

    make demo
    python scripts/analyze_nano.py demo --output analysis
    python scripts/analyze_nano.py --mqar

With a study: diagnostics, recall and figures of each student, and Spearman's rank correlation of each diagnostic with
the recovered share. With `--mqar`: the small models of `subquad.analysis.mqar`. Prints the tables of docs/analysis.md.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy import stats

import subquad
from subquad import mixers
from subquad.analysis.ablations import ablation_results
from subquad.analysis.diagnostics import diagnostics_results
from subquad.analysis.mqar import MQARSettings, mqar_results
from subquad.analysis.plots import draw_cka, draw_recall, draw_student
from subquad.analysis.recall import recall_results
from subquad.config import Data
from subquad.data import token_rows
from subquad.data.recall_tasks import TASKS
from subquad.evaluate.results import Result, label_results, select
from subquad.utils import UserError

COLUMNS = (
    *("topk_mass_overlap", "frobenius", "row_cosine", "cka", "cosine", "mixer_error", "swap_kl"),
    *("memory_length", "half_life", "entropy", "diversity"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, help="directory of finished runs, as `make demo` makes it")
    parser.add_argument("--output", type=Path, help="directory for results.json and figures")
    parser.add_argument("--rows", type=int, default=4, help="validation texts for diagnostics")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--items", type=int, default=8, help="recall questions per length and depth")
    parser.add_argument("--mqar", action="store_true", help="train the small models too")
    args = parser.parse_args()
    if args.study is None and not args.mqar:
        parser.error("give the directory of a study, or --mqar")
    results = analyze(args) if args.study else []
    if args.mqar:
        results += print_mqar()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps([result.as_dict() for result in results], indent=1)
        (args.output / "results.json").write_text(text + "\n")


def analyze(args: argparse.Namespace) -> list[Result]:
    """Analyzes and prints all students of a study."""
    runs = sorted(path.parent for path in args.study.glob("*/result.json"))
    if not runs:
        raise SystemExit(f"{args.study}: no finished runs (directories with result.json)")
    recipe = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    teacher, tokenizer = subquad.load_teacher(recipe["teacher"])
    data = Data(source=recipe["data"]["source"], seq_len=args.seq_len)
    validation = token_rows(data, tokenizer, "validation", limit=2**16)
    rows = torch.stack([validation[i]["input_ids"] for i in range(args.rows)])
    haystack = torch.cat([validation[i]["input_ids"] for i in range(args.rows, min(len(validation), args.rows + 32))])
    of_teacher = diagnostics_results(teacher, rows) + recall_results(teacher, tokenizer, haystack, items=args.items)
    found = label_results("teacher", None, of_teacher)
    quality = [json.loads((run / "result.json").read_text())["result"] for run in runs]
    unique = len({result["mixer"] for result in quality}) == len(runs)
    recovered = {}
    for run, result in zip(runs, quality, strict=True):
        begin = time.perf_counter()
        student, _ = subquad.load_teacher(run)
        name = result["mixer"] if unique else run.name
        recovered[name] = result["recovered_share"]
        results = diagnostics_results(student, rows, teacher) + ablation_results(student, rows)
        results += recall_results(student, tokenizer, haystack, items=args.items)
        results.append(Result(task="quality", metric="recovered_share", value=recovered[name]))
        found += label_results(name, "teacher", results)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            draw_student(name, student, teacher, rows, args.output)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if args.output:
        draw_recall(found, args.output)
        draw_cka(found, args.output)
    print("\n" + table(("recovered_share", *COLUMNS), found, ["teacher", *recovered]))
    print("\n" + recall_table(found, ["teacher", *recovered]))
    print("\n" + correlations(found, {n: r for n, r in recovered.items() if n != mixers.SOFTMAX}))
    return found


def mean_value(results: list[Result], model: str, metric: str) -> float | None:
    """A model's value over all layers, heads and depths; for recall the mean over tasks and lengths."""
    found = [r.value for r in select(results, model=model, metric=metric, layer=None, head=None, depth=None)]
    return statistics.fmean(found) if found else None


def table(columns: tuple[str, ...], results: list[Result], models: list[str]) -> str:
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", f"|---{'|---' * len(columns)}|"]
    for model in models:
        values = [mean_value(results, model, column) for column in columns]
        lines.append(f"| `{model}` | {' | '.join('' if v is None else f'{v:.3g}' for v in values)} |")
    return "\n".join(lines)


def recall_table(results: list[Result], models: list[str]) -> str:
    """`acc / acc_generated` over all lengths and depths."""
    lines = [f"| | {' | '.join(TASKS)} |", f"|---{'|---' * len(TASKS)}|"]
    for model in models:
        cells = []
        for task in TASKS:
            own = select(results, model=model, task=task, depth=None)
            cells.append(" / ".join(f"{mean_value(own, model, metric):.2f}" for metric in ("acc", "acc_generated")))
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlations(results: list[Result], recovered: dict[str, float]) -> str:
    """The rank correlation of each diagnostic with the recovered share, over the students that have both."""
    lines = ["| | students | rank correlation with the recovered share | 95% interval |", "|---|---|---|---|"]
    for metric in (*COLUMNS, "acc", "acc_generated"):
        pairs = [
            (value, share)
            for name, share in recovered.items()
            if (value := mean_value(results, name, metric)) is not None
        ]
        if len(pairs) < 4:
            continue
        values, shares = zip(*pairs, strict=True)
        if len(set(values)) == 1:
            lines.append(f"| {metric.replace('_', ' ')} | {len(pairs)} | all the same: {values[0]:.3g} | |")
            continue
        rho, low, high = rank_correlation(values, shares)
        lines.append(f"| {metric.replace('_', ' ')} | {len(pairs)} | {rho:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def rank_correlation(
    x: Sequence[float], y: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rho of x and y (ties have their mean rank) and its 95% percentile bootstrap interval.

    Pairs are drawn with replacement; draws in which x or y is constant are left out.

    Raises:
        UserError: fewer than three pairs, different lengths, constant x or y.
    """
    if len(x) != len(y) or len(x) < 3:
        raise UserError(f"rank_correlation: got {len(x)} and {len(y)} values, expected equally many, at least 3")
    if min(len(set(x)), len(set(y))) == 1:
        raise UserError("rank_correlation: got a constant sequence, expected at least two different values")
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    low, high = np.nanpercentile(spearman(np.asarray(x)[draws], np.asarray(y)[draws]), [2.5, 97.5])
    return float(spearman(np.asarray(x), np.asarray(y))), float(low), float(high)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each row of `[..., n]`; NaN where x or y is constant."""
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
        return stats.pearsonr(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1), axis=-1).statistic


def print_mqar() -> list[Result]:
    """MQAR accuracy by mixer and state size, printed line by line."""
    heads, found = (2, 4, 8), []
    states = [MQARSettings(heads=count).state for count in heads]
    print(f"| mixer | {' | '.join(f'{state}' for state in states)} |\n|---{'|---' * len(heads)}|", flush=True)
    for name in mixers.names():
        results = mqar_results([name], heads)
        found += results
        cells = [f"{acc.value:.1%} (lr {lr.value:g})" for acc, lr in zip(results[::2], results[1::2], strict=True)]
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    return found


if __name__ == "__main__":
    main()
