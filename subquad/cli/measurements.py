"""Commands that measure: eval, report, bench."""

import argparse
import json
import logging
import sys
from pathlib import Path

from subquad.cli.parser import AddCommand, split_list
from subquad.utils import UserError, quiet_libraries


def add_commands(add: AddCommand) -> None:
    command = add("eval", run_eval, "Compare models with their teacher: quality, long context and efficiency.")
    command.add_argument("models", metavar="MODEL", nargs="+", help="students or other models")
    command.add_argument(
        "--teacher", metavar="MODEL", help="reference model (default: the teacher of the first student)"
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
        help="evaluation text, used whole (default: the held-out text of the student's recipe, or of python-stdlib)",
    )
    command.add_argument("--data", metavar="DIR", help="benchmark items, NAME.jsonl or NAME.jsonl.gz")
    command.add_argument("--tasks", metavar="LIST", help="tasks of --data or of lm-eval (default: all of --data)")
    command.add_argument("--include-path", metavar="DIR", help="task definitions in lm-eval's format")
    command.add_argument("--limit", type=int, metavar="N", help="maximum number of items of each task")
    command.add_argument("--lengths", metavar="LIST", help="context lengths in tokens for long, efficiency and recall")
    command.add_argument("--figures", action="store_true", help="write plots to DIR/figures as SVG and PNG")
    command.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")

    command = add(
        "report", run_report, "Write the self-contained HTML page of a study, figures as SVG and PDF, and tables."
    )
    command.add_argument("directory", metavar="DIR", help="directory of the study")
    command.add_argument("--output", "-o", metavar="FILE", help="the page (default: DIR/report.html)")

    command = add("bench", run_bench, "Time the ops beside every peer that is installed, or see what memories hold.")
    command.add_argument(
        "what", choices=["ops", "mqar"], help="ops: forward and backward; mqar: small students of each mixer, recalling"
    )
    command.add_argument("--sizes", metavar="LIST", help="tokens, or tokens x batch, comma-separated: 2048,512x8")
    command.add_argument("--only", metavar="LIST", help="names of kinds and peers, or of mixers, comma-separated")
    command.add_argument("--seconds", type=float, default=60.0, help="about so long a size at most")
    command.add_argument("--json", metavar="FILE", help="write all figures there")
    command.add_argument("--no-memory", action="store_true", help="skip peak memory, a process for each kind and size")


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
    from subquad.report.page import write_report

    page = write_report(Path(args.directory), None if args.output is None else Path(args.output))
    print(f"{page}\nFigures (SVG, PDF) and tables (CSV, LaTeX) are in {Path(args.directory) / 'report'}")


def run_bench(args: argparse.Namespace) -> None:
    quiet_libraries()
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json: the directory of {args.json!r} does not exist; expected a file in one that does")
    if args.what == "mqar":
        run_mqar(args)
        return
    from benchmarks import ops_report as report

    try:
        sizes, names = report.parse_sizes(args.sizes or report.SIZES), report.parse_names(args.only)
    except ValueError as error:
        raise UserError(error) from None
    if not args.seconds > 0:
        raise UserError(f"--seconds: got {args.seconds}, expected more than 0")
    done = report.run(sizes, names, args.seconds, not args.no_memory, lambda text: print(text, flush=True))
    if args.json:
        Path(args.json).write_text(json.dumps(done.as_dict(), indent=1) + "\n")


def run_mqar(args: argparse.Namespace) -> None:
    """Multi-query associative recall, learned from nothing by two layers of each mixer, about a minute a line."""
    from subquad import mixers
    from subquad.analysis.mqar import mqar_results

    rows = []
    for name in split_list(args.only) if args.only else list(mixers.REGISTRY):
        for row in mqar_results([name]):
            print(f"{row.model:18} {row.task:16} {row.value:.1%} of {row.n}", flush=True)
            rows.append(row.as_dict())
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
