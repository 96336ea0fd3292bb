"""Commands that measure: eval, frontier, select, report, bench."""

import importlib
import json
import logging
import os
import sys
from argparse import REMAINDER, Namespace
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from subquad.cli.parser import Parser, count, counts, named, placement_of, split_list
from subquad.registry import MIXERS, SUITES
from subquad.utils import UserError, as_user_error, needs_extra, quiet_libraries

BENCHMARKS = ("ops", "decode", "decode_step", "distill", "loss", "load", "mqar", "data", "windows", "draft", "gpu")
"""Modules of `benchmarks`."""


def add_commands(parser: Parser) -> None:
    evaluate = parser.command(
        "eval", run_eval, "Compare models with their teacher: quality, long context, efficiency.", resumes=True
    )
    evaluate.option("models", "MODEL", "students or other models", nargs="+")
    evaluate.option("--teacher", "MODEL", "reference model (default: that of the first student, from its recipe.yaml)")
    suites = "quick, full, recall, diagnostics, or parts of full: language, zero-shot, generation, long, efficiency"
    names = ("quick", "full", *SUITES)
    evaluate.option("--suite", "LIST", suites, dest="suites", type=split_list, default=["quick"], words=names)
    evaluate.option("--output -o", "DIR", "directory of results.json; rerun to resume")
    corpus = "evaluation text, used whole (default: the validation text of the student's recipe, or of python-stdlib)"
    evaluate.option("--corpus", "SOURCE", corpus)
    evaluate.option("--data", "DIR", "benchmark items, NAME.jsonl or NAME.jsonl.gz")
    tasks = "tasks of --data or of lm-eval (default: all of --data; without --data, lm-eval's from the hub)"
    evaluate.option("--tasks", "LIST", tasks, type=split_list)
    evaluate.option("--include-path", "DIR", "task definitions in lm-eval's format", dest="include")
    evaluate.option("--limit", "N", "number of items of each task, evenly spaced (default: all)", type=count)
    lengths = "context lengths in tokens for long, efficiency and recall (default: see docs/evaluation.md)"
    evaluate.option("--lengths", "LIST", lengths, type=counts)
    evaluate.flag("--figures", "write plots to DIR/figures as SVG and PNG")
    evaluate.flag("--json", "print the results as JSON instead of a table")
    evaluate.placement()
    evaluate.quiet()
    frontier = parser.command(
        "frontier",
        run_frontier,
        "Compare all that shrinks a teacher's cache, at equal bytes: quality, recall, time.",
        resumes=True,
    )
    frontier.option("teacher", "TEACHER", "nano, smollm2-135m, a directory, a .gguf file or a hub id")
    frontier.option("--calibrate", "SOURCE", "text on which windows and heads are chosen", required=True)
    frontier.option("--output -o", "DIR", "directory of results, table and picture; rerun to resume", required=True)
    budgets = "numbers of tokens N, for the bytes of N + 4 tokens of the teacher's cache"
    frontier.option("--budgets", "LIST", budgets, type=counts, default=[32, 64, 96, 192, 384])
    memory = "also windows with memories: the mixer that remembers what has left some heads' windows"
    frontier.option("--budget-memory", "MIXER", memory, words=MIXERS)
    suites = "suites of `subquad eval` (default: language, long, recall; zero-shot with --data or --tasks)"
    frontier.option("--suite", "LIST", suites, dest="suites", type=split_list, words=SUITES)
    frontier.option("--corpus", "SOURCE", "evaluation text, used whole (default: the validation text of python-stdlib)")
    frontier.option("--data", "DIR", "benchmark items, NAME.jsonl or NAME.jsonl.gz")
    frontier.option("--tasks", "LIST", "tasks of --data or of lm-eval", type=split_list)
    frontier.option("--limit", "N", "number of items of each task, evenly spaced (default: all)", type=count)
    context = "tokens of long rows and prompts, which heads without a window are charged"
    frontier.option("--context", "N", context, type=count, default=2048)
    frontier.option("--recipe", "RECIPE", "also train the windows, and the recipe's own student, by this recipe")
    frontier.option("--recipe-budgets", "LIST", "those of the budgets that are trained (default: all)", type=counts)
    frontier.placement()
    frontier.quiet()
    select = parser.command("select", run_select, "Rank a teacher's key/value groups or layers.")
    select.option("teacher", "TEACHER", "nano, smollm2-135m, a directory, a .gguf file or a hub id")
    criteria = ["retrieval", "kl", "halo", "uniform"]
    select.option("--by", "NAME", "retrieval, kl, halo or uniform", choices=criteria, default="retrieval")
    select.option("--unit", "UNIT", "group or layer", choices=["group", "layer"], default="group")
    select.option("--top", "N", "number that the student keeps whole", type=count, default=8)
    select.option("--window", "N", "tokens that the others see, besides 4 sinks", type=count, default=64)
    select.option("--text", "SOURCE", "text source", default="python-stdlib")
    select.placement()
    select.flag("--json", "print the ranking and the layer types as JSON")
    select.quiet()
    report = parser.command("report", run_report, "Write the HTML page of a study, figures as SVG and PDF, and tables.")
    report.option("directory", "DIR", "directory of the study", type=Path)
    report.option("--output -o", "FILE", "the page (default: DIR/report.html)", type=Path)
    bench = parser.command("bench", run_bench, "Measure operators, decoding or training on this machine.")
    bench.option("name", "NAME", ", ".join(BENCHMARKS), choices=BENCHMARKS)
    bench.option("args", "...", "options of the benchmark; `subquad bench NAME --help` lists them", nargs=REMAINDER)


def run_eval(args: Namespace) -> int:
    """Exit code 1 if any part failed."""
    quiet_libraries()
    from subquad.evaluate import command
    from subquad.evaluate.table import terminal_width

    others = ("json", "device", "dtype", "attn")
    options = {name: value for name, value in vars(args).items() if name not in others}
    options["placement"] = placement_of(args)
    if args.json:  # nothing else may be on stdout
        logging.getLogger("subquad").handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    stdout = redirect_stdout(sys.stderr) if args.json else nullcontext()  # lm-eval prints too
    with stdout, nullcontext() if args.corpus is None else named("--corpus"):
        outcome = command.run(**options)
    print(json.dumps(outcome.as_dict(), indent=2) if args.json else outcome.table(terminal_width()))
    if args.output:
        stream = sys.stderr if args.json else sys.stdout
        print(f"\nAll results are in {Path(args.output) / 'results.json'}", file=stream)
    if outcome.failed:
        count = len(outcome.failed)
        print(f"subquad: {count} part{'s' * (count > 1)} failed: {', '.join(outcome.failed)}", file=sys.stderr)
    return int(bool(outcome.failed))


def run_frontier(args: Namespace) -> None:
    from subquad.config import load_recipe

    recipe = None if args.recipe is None else load_recipe(args.recipe)
    quiet_libraries()
    from subquad.evaluate.table import terminal_width
    from subquad.study import frontier

    others = ("recipe", "device", "dtype", "attn")
    options = {name: value for name, value in vars(args).items() if name not in others}
    options["placement"] = placement_of(args)
    print(frontier.run(**options, recipe=recipe).table(terminal_width()))
    print(f"\nresults.json, table.csv and frontier.svg are in {args.output}")


def run_select(args: Namespace) -> None:
    quiet_libraries()
    from subquad.config import Data
    from subquad.data import check_data, spread_rows
    from subquad.modeling.attention.discovery import discover_attention
    from subquad.modeling.teachers import check_reference, load_placed
    from subquad.selection.ranking import kept_layer_types, rank_groups
    from subquad.selection.texts import HAYSTACK

    check_reference(args.teacher, "teacher")
    placement, text = placement_of(args), Data(source=args.text, seq_len=HAYSTACK[1])
    with named("--text"):
        check_data(text)
        teacher, tokenizer = load_placed(args.teacher, placement)
        haystack = spread_rows(text, tokenizer, *HAYSTACK).flatten()
    layers = discover_attention(teacher)
    options = {"keep": args.top, "window": args.window, "attention_layers": layers}
    ranking = rank_groups(teacher, tokenizer, haystack, args.by, args.unit, **options)
    types = kept_layer_types(ranking[: args.top], [info.spec.num_kv_heads for info in layers], args.window)
    if args.json:
        print(json.dumps({"ranking": [unit._asdict() for unit in ranking], "layer_types": types}, indent=2))
        return
    print(f"{'layer':>5} {'group':>6} {'score':>9}")
    for unit in ranking[: args.top]:
        print(f"{unit.layer:5d} {'all' if unit.kv_head is None else unit.kv_head:>6} {unit.score:9.4f}")
    print(f"\nFor --layer-types, and for student.layer_types in a recipe:\n{json.dumps(types)}")


def run_report(args: Namespace) -> None:
    quiet_libraries()
    with needs_extra("report", "report"):
        from subquad.report.page import write_report

    with as_user_error(f"{args.directory}: cannot be drawn; one of its result files may be damaged"):
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
