"""Commands that measure: eval, report, bench."""

import importlib
import json
import logging
import os
import sys
from argparse import REMAINDER, Namespace
from pathlib import Path

from subquad.cli.parser import Parser, count, split_list
from subquad.utils import UserError, needs_extra, quiet_libraries

BENCHMARKS = ("ops", "decode", "distill", "loss", "serving", "mqar", "data", "gpu")
"""Modules of `benchmarks`."""


def add_commands(parser: Parser) -> None:
    evaluate = parser.command("eval", run_eval, "Compare models with their teacher: quality, long context, efficiency.")
    evaluate.option("models", "MODEL", "students or other models", nargs="+")
    evaluate.option("--teacher", "MODEL", "reference model (default: that of the first student, from its recipe.yaml)")
    suites = "quick, full, recall, diagnostics, or parts of full: language, zero-shot, generation, long, efficiency"
    evaluate.option("--suite", "LIST", suites, dest="suites", type=split_list, default=["quick"])
    evaluate.option("--output -o", "DIR", "directory of results.json; rerun to resume")
    corpus = "evaluation text, used whole (default: the validation text of the student's recipe, or of python-stdlib)"
    evaluate.option("--corpus", "SOURCE", corpus)
    evaluate.option("--data", "DIR", "benchmark items, NAME.jsonl or NAME.jsonl.gz")
    tasks = "tasks of --data or of lm-eval (default: all of --data; without --data, lm-eval's from the hub)"
    evaluate.option("--tasks", "LIST", tasks, type=split_list)
    evaluate.option("--include-path", "DIR", "task definitions in lm-eval's format", dest="include")
    evaluate.option("--limit", "N", "number of items of each task, evenly spaced", type=count)
    lengths = "context lengths in tokens for long, efficiency and recall"
    evaluate.option("--lengths", "LIST", lengths, type=lambda text: [count(length) for length in split_list(text)])
    evaluate.flag("--figures", "write plots to DIR/figures as SVG and PNG")
    evaluate.flag("--json", "print the results as JSON instead of a table")
    report = parser.command("report", run_report, "Write the HTML page of a study, figures as SVG and PDF, and tables.")
    report.option("directory", "DIR", "directory of the study", type=Path)
    report.option("--output -o", "FILE", "the page (default: DIR/report.html)", type=Path)
    bench = parser.command("bench", run_bench, "Measure operators, decoding or training on this machine.")
    bench.option("name", "NAME", ", ".join(BENCHMARKS), choices=BENCHMARKS)
    bench.option("args", "...", "options of the benchmark; `subquad bench NAME --help` lists them", nargs=REMAINDER)


def run_eval(args: Namespace) -> None:
    quiet_libraries()
    from subquad.evaluate import command

    options = {name: value for name, value in vars(args).items() if name not in ("run", "json")}
    if args.json:  # nothing else may be on stdout
        logging.getLogger("subquad").handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    outcome = command.run(**options)
    print(json.dumps(outcome.as_dict(), indent=2) if args.json else outcome.table())
    if args.output:
        stream = sys.stderr if args.json else sys.stdout
        print(f"\nAll results are in {Path(args.output) / 'results.json'}", file=stream)


def run_report(args: Namespace) -> None:
    quiet_libraries()
    with needs_extra("report", "report"):
        from subquad.report.page import write_report

    page = write_report(args.directory, args.output)
    print(f"{page}\nFigures (SVG, PDF) and tables (CSV, LaTeX) are in {args.directory / 'report'}")


def run_bench(args: Namespace) -> int:
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
