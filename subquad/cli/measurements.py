"""Commands that measure: eval, report, bench."""

import argparse
import importlib
import json
import logging
import os
import sys
from pathlib import Path

from subquad.cli.parser import AddCommand, split_list
from subquad.utils import UserError, needs_extra, quiet_libraries

BENCHMARKS = ("ops", "decode", "distill", "loss", "serving", "mqar", "data")
"""Modules of `benchmarks`."""


def add_commands(add: AddCommand) -> None:
    command = add("eval", run_eval, "Compare models with their teacher: quality, long context and efficiency.")
    command.add_argument("models", metavar="MODEL", nargs="+", help="students or other models")
    command.add_argument(
        "--teacher", metavar="MODEL", help="reference model (default: that of the first student, from its recipe.yaml)"
    )
    command.add_argument(
        "--suite",
        default="quick",
        metavar="LIST",
        help="quick, full, recall, diagnostics, or parts of full: language, zero-shot, generation, long, efficiency",
    )
    command.add_argument("--output", "-o", metavar="DIR", help="directory of results.json; rerun to resume")
    command.add_argument(
        "--corpus",
        metavar="SOURCE",
        help="evaluation text, used whole (default: the validation text of the student's recipe, or of python-stdlib)",
    )
    command.add_argument("--data", metavar="DIR", help="benchmark items, NAME.jsonl or NAME.jsonl.gz")
    command.add_argument(
        "--tasks",
        metavar="LIST",
        help="tasks of --data or of lm-eval (default: all of --data; without --data, lm-eval's from the hub)",
    )
    command.add_argument("--include-path", metavar="DIR", help="task definitions in lm-eval's format")
    command.add_argument("--limit", type=int, metavar="N", help="number of items of each task, evenly spaced")
    command.add_argument("--lengths", metavar="LIST", help="context lengths in tokens for long, efficiency and recall")
    command.add_argument("--figures", action="store_true", help="write plots to DIR/figures as SVG and PNG")
    command.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")

    command = add(
        "report", run_report, "Write the self-contained HTML page of a study, figures as SVG and PDF, and tables."
    )
    command.add_argument("directory", metavar="DIR", help="directory of the study")
    command.add_argument("--output", "-o", metavar="FILE", help="the page (default: DIR/report.html)")

    command = add("bench", run_bench, "Run a benchmark of the repository on this machine.")
    command.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    command.add_argument(
        "args",
        metavar="...",
        nargs=argparse.REMAINDER,
        help="options of the benchmark; `subquad bench NAME --help` lists them",
    )


def run_eval(args: argparse.Namespace) -> None:
    lengths = None if args.lengths is None else [read_int(n, "--lengths") for n in split_list(args.lengths)]
    quiet_libraries()
    from subquad.evaluate import command

    if args.json:  # nothing else may be on stdout
        logging.getLogger("subquad").handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    outcome = command.run(
        args.models,
        teacher=args.teacher,
        suites=split_list(args.suite),
        output=args.output,
        corpus=args.corpus,
        data=args.data,
        tasks=None if args.tasks is None else split_list(args.tasks),
        include=args.include_path,
        limit=args.limit,
        lengths=lengths,
        figures=args.figures,
    )
    print(json.dumps(outcome.as_dict(), indent=2) if args.json else outcome.table())
    if args.output:
        print(
            f"\nAll results are in {Path(args.output) / 'results.json'}", file=sys.stderr if args.json else sys.stdout
        )


def read_int(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{option}: got {text!r}, expected a whole number") from None


def run_report(args: argparse.Namespace) -> None:
    quiet_libraries()
    with needs_extra("report", "report"):
        from subquad.report.page import write_report

    page = write_report(Path(args.directory), None if args.output is None else Path(args.output))
    print(f"{page}\nFigures (SVG, PDF) and tables (CSV, LaTeX) are in {Path(args.directory) / 'report'}")


def run_bench(args: argparse.Namespace) -> int:
    """Runs `main` of a module of the repository's package `benchmarks`."""
    quiet_libraries()
    sys.path.append(os.getcwd())  # an installed `subquad` script does not have it
    try:
        module = importlib.import_module(f"benchmarks.{args.name}")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", f"benchmarks.{args.name}"):
            raise
        raise UserError("bench needs the repository: clone it and run the command from its root") from None
    return module.main(args.args)
