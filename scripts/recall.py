"""Measures needles and associative recall of a teacher and its students, all with the same questions.

    python scripts/recall.py --text books.valid.txt --output results/recall/smollm2-135m.json
        teacher=smollm2-135m "window 96=DIR" "pure, seed 0=DIR" "pure, seed 1=DIR"

Each model is NAME=DIR, or what `subquad eval` takes in place of DIR. Models whose results are in the output are not
measured again. "acc" is by likelihood among four answers (chance 25%), "acc_generated" by greedy writing. The table
beside the output has means of the seeds of a name, "NAME, seed N", and their smallest and largest value.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

from subquad.analysis.recall import recall_results
from subquad.modeling.teachers import load_teacher
from subquad.utils import UserError, run_info, write_json_atomic

TASKS = ("needle_number", "needle_word", "assoc_text", "assoc_tokens")
COLUMNS = {"needles": TASKS[:2], "pairs": TASKS[2:]}
DEPTHS = (0.0, 0.25, 0.5, 0.75)
METRICS = ("acc", "acc_generated", "loglikelihood")


def measure(reference: str, text: str, lengths: list[int], items: int) -> list[dict[str, Any]]:
    model, tokenizer = load_teacher(reference)
    haystack = torch.tensor(tokenizer(text).input_ids)
    found = recall_results(model, tokenizer, haystack, TASKS, lengths, DEPTHS, items)
    keys = ("task", "length", "metric", "value", "stderr", "n")
    return [{key: getattr(r, key) for key in keys} for r in found if r.depth is None and r.metric in METRICS]


def write_table(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """By likelihood / by writing, in percent, one row for each name, one column for each of `COLUMNS` and length."""
    lengths = sorted({r["length"] for rows in results.values() for r in rows})
    names = dict.fromkeys(name.split(", seed ")[0] for name in results)

    def share(rows: list[dict[str, Any]], tasks: tuple[str, ...], length: int, metric: str) -> float:
        own = [r for r in rows if r["task"] in tasks and (r["length"], r["metric"]) == (length, metric)]
        return 100 * sum(r["value"] * r["n"] for r in own) / sum(r["n"] for r in own)

    def cell(name: str, tasks: tuple[str, ...], length: int) -> str:
        seeds = [rows for own, rows in results.items() if own.split(", seed ")[0] == name]
        parts = []
        for metric in METRICS[:2]:
            values = [share(rows, tasks, length, metric) for rows in seeds]
            spread = f" [{min(values):.0f}, {max(values):.0f}]" if len(values) > 1 else ""
            parts.append(f"{sum(values) / len(values):.0f}{spread}")
        return " / ".join(parts)

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = [(title, tasks, length) for title, tasks in COLUMNS.items() for length in lengths]
        writer.writerow(["model", *(f"{title}, {length:,}" for title, _, length in columns)])
        writer.writerows([[name, *(cell(name, tasks, length) for _, tasks, length in columns)] for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--text", required=True, type=Path, help="text file in which the needles are")
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--items", type=int, default=2, help="for each task, length and depth")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads(args.output.read_text())["results"] if args.output.is_file() else {}
    for given in args.models:
        name, separator, reference = given.partition("=")
        if not separator:
            raise UserError(f"models: got {given!r}, expected NAME=DIR")
        if name not in results:
            results[name] = measure(reference, text, [int(n) for n in args.lengths.split(",")], args.items)
            write_json_atomic(args.output, {**run_info(), "text": args.text.name, "results": results})
            write_table(args.output.with_suffix(".csv"), results)
            print(name, flush=True)


if __name__ == "__main__":
    main()
