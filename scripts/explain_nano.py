"""What the students of a study keep of their teacher inside, and whether that says how much they recovered.

    make demo
    python scripts/explain_nano.py demo --output explained
    python scripts/explain_nano.py --mqar

The first form looks into every student of a study: diagnostics and recall of each, pictures, and Spearman's rank
correlation of each diagnostic with the recovered share. The second trains the small models of `mqar.py`. Both print the
tables of docs/analysis.md.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import yaml

import subquad
from subquad import mixers
from subquad.analysis.ablations import ablation_results
from subquad.analysis.correlation import rank_correlation
from subquad.analysis.diagnostics import diagnostics_results
from subquad.analysis.mqar import Setting, mqar_results
from subquad.analysis.plots import draw_cka, draw_recall, draw_student
from subquad.analysis.recall import recall_results
from subquad.analysis.recall_tasks import TASKS
from subquad.config import Data
from subquad.data import token_rows
from subquad.evaluate.results import Result, label_results, select

COLUMNS = (
    *("topk_mass_overlap", "frobenius", "row_cosine", "cka", "cosine", "mixer_error", "swap_kl"),
    *("memory_length", "half_life", "entropy", "diversity"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, help="directory of finished runs, as `make demo` makes it")
    parser.add_argument("--output", type=Path, help="directory for rows.json and pictures")
    parser.add_argument("--rows", type=int, default=4, help="held-out texts that the diagnostics look at")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--items", type=int, default=8, help="recall questions for each length and depth")
    parser.add_argument("--mqar", action="store_true", help="train the small models too")
    args = parser.parse_args()
    if args.study is None and not args.mqar:
        parser.error("give the directory of a study, or --mqar")
    rows = explain(args) if args.study else []
    if args.mqar:
        rows += associations()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "rows.json").write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")


def explain(args: argparse.Namespace) -> list[Result]:
    """Everything about the students of a study, printed."""
    runs = sorted(path.parent for path in args.study.glob("*/result.json"))
    if not runs:
        raise SystemExit(f"{args.study}: no finished runs (directories with result.json)")
    recipe = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    teacher, tokenizer = subquad.load_teacher(recipe["teacher"])
    corpus = Data(source=recipe["data"]["source"], seq_len=args.context)
    held_out = token_rows(corpus, tokenizer, "validation", limit=2**16)
    texts = torch.stack([held_out[i]["input_ids"] for i in range(args.rows)])
    haystack = torch.cat([held_out[i]["input_ids"] for i in range(args.rows, min(len(held_out), args.rows + 32))])
    found = label_results(
        "teacher",
        None,
        diagnostics_results(teacher, texts) + recall_results(teacher, tokenizer, haystack, items=args.items),
    )
    results = [json.loads((run / "result.json").read_text())["result"] for run in runs]
    told_apart = len({result["mixer"] for result in results}) == len(runs)
    recovered = {}
    for run, result in zip(runs, results, strict=True):
        begun = time.perf_counter()
        student, _ = subquad.load_teacher(run)
        name = result["mixer"] if told_apart else run.name
        recovered[name] = result["recovered_share"]
        rows = diagnostics_results(student, texts, teacher) + ablation_results(student, texts)
        rows += recall_results(student, tokenizer, haystack, items=args.items)
        rows.append(Result(task="quality", metric="recovered_share", value=recovered[name]))
        found += label_results(name, "teacher", rows)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            draw_student(name, student, teacher, texts, args.output)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if args.output:
        draw_recall(found, args.output)
        draw_cka(found, args.output)
    print("\n" + table(("recovered_share", *COLUMNS), found, ["teacher", *recovered]))
    print("\n" + recall_table(found, ["teacher", *recovered]))
    print("\n" + correlations(found, {n: r for n, r in recovered.items() if n != mixers.SOFTMAX}))
    return found


def whole(rows: list[Result], model: str, metric: str) -> float | None:
    """The number that stands for a model: over all layers and heads, or the mean over recall tasks at each length."""
    found = [r.value for r in select(rows, model=model, metric=metric, layer=None, head=None, depth=None)]
    return statistics.fmean(found) if found else None


def table(columns: tuple[str, ...], rows: list[Result], models: list[str]) -> str:
    lines = [f"| | {' | '.join(c.replace('_', ' ') for c in columns)} |", f"|---{'|---' * len(columns)}|"]
    for model in models:
        values = [whole(rows, model, column) for column in columns]
        lines.append(f"| `{model}` | {' | '.join('' if v is None else f'{v:.3g}' for v in values)} |")
    return "\n".join(lines)


def recall_table(rows: list[Result], models: list[str]) -> str:
    """Accuracy by likelihood, and how much of it greedy decoding writes, over all lengths and depths."""
    lines = [f"| | {' | '.join(TASKS)} |", f"|---{'|---' * len(TASKS)}|"]
    for model in models:
        cells = []
        for task in TASKS:
            own = select(rows, model=model, task=task, depth=None)
            cells.append(" / ".join(f"{whole(own, model, metric):.2f}" for metric in ("acc", "acc_generated")))
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlations(rows: list[Result], recovered: dict[str, float]) -> str:
    """Of each diagnostic with the recovered share, over those students that have it."""
    lines = ["| | students | rank correlation with the recovered share | 95% interval |", "|---|---|---|---|"]
    for metric in (*COLUMNS, "acc", "acc_generated"):
        pairs = [
            (value, share) for name, share in recovered.items() if (value := whole(rows, name, metric)) is not None
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


def associations() -> list[Result]:
    """MQAR by mixer and state, printed as it comes."""
    heads, found = (2, 4, 8), []
    states = [Setting(heads=count).state for count in heads]
    print(f"| mixer | {' | '.join(f'{state}' for state in states)} |\n|---{'|---' * len(heads)}|", flush=True)
    for name in mixers.names():
        rows = mqar_results([name], heads)
        found += rows
        print(f"| `{name}` | {' | '.join(f'{row.value:.1%}' for row in rows)} |", flush=True)
    return found


if __name__ == "__main__":
    main()
