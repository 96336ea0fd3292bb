"""The command line: `subquad --help` is its map. The only place that prints."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subquad.utils import UserError, quiet_libraries

CALIBRATION = 2048
"""Tokens of text that `linearize --calibrate` reads."""

MAP = """\
Turn a pretrained Transformer into a subquadratic language model, and see what that keeps, costs and wins.

  teach      distill    one student, from a recipe
             study      all students of a recipe with lists, and a table of them
             recipe     a recipe with every default written out, or the schema of all
  make       linearize  a fresh student, not yet taught
  look       mixers     what can stand in the place of attention
             inspect    a saved student: its layers, options, parameters, and what it holds a sequence
  use        generate   let a model write on
             export     a student as a model for transformers, vLLM, SGLang or llama.cpp
  measure    eval       what students kept of their teacher, what they lost, and what they cost
             report     a study on one page: tables, curves, what the best student keeps and costs
             bench      the ops beside their peers on this machine

A recipe's teacher, and MODEL below, may be: nano, smollm2-135m, a directory, a .gguf file, or a hub id.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit code 2 and one line on stderr for each mistake of the user, 130 for an interruption."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    set_up_messages()
    try:
        return args.run(args) or 0
    except UserError as error:
        print("subquad:", "\n  ".join(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("subquad: interrupted; the same command continues it", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


class Parser(argparse.ArgumentParser):
    """Mistakes in one line, without the usage."""

    def error(self, message: str):
        print(f"{self.prog}: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="subquad", description=MAP, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(name: str, run, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    for name, run, summary in (
        ("distill", run_distill, "Teach one student as a recipe says. The output directory is the loadable student."),
        ("study", run_study, "Teach every student of a recipe whose keys hold lists, and print their table."),
    ):
        command = add(name, run, summary)
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        command.add_argument("--output", "-o", required=True, metavar="DIR", help="new, or of a run to be continued")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="put over the recipe: stages.hidden.lr=1e-3"
        )
        if name == "study":
            add_study(command)
    command = add("report", run_report, "Draw a study: one page that needs no network, figures as SVG and PDF, tables.")
    command.add_argument("directory", metavar="DIR", help="of a study")
    command.add_argument("--output", "-o", metavar="FILE", help="the page; DIR/report.html unless given")
    command = add("recipe", run_recipe, "Print a recipe with every default written out, after checking it.")
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put over the recipe")
    command.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for an editor")
    command = add("linearize", run_linearize, "Replace a teacher's attention and save the student, not yet taught.")
    command.add_argument("teacher", metavar="TEACHER")
    command.add_argument("--mixer", help="one of `subquad mixers`, for every layer; gated_deltanet if nothing is said")
    command.add_argument(
        "--layers", metavar="YAML", help="a plan in its place, such as '{default: gla, 0-3: attention}'"
    )
    command.add_argument("--output", "-o", required=True, metavar="DIR", help="a new directory")
    command.add_argument("--no-copy", action="store_true", help="do not copy the teacher's q, k, v and o")
    command.add_argument(
        "--calibrate", metavar="CORPUS", help="a source of text by which gates, activations and scales are set"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the mixer")
    command.add_argument("--export", choices=["qwen3_5", "bamba"], help="keep within what `subquad export` can write")
    add("mixers", run_mixers, "List the mixers, their sources and their options.")
    command = add("inspect", run_inspect, "Say what a saved student is and what it holds a sequence.")
    command.add_argument("directory", metavar="DIR", help="a saved student")
    command = add("generate", run_generate, "Let a model write on from a text.")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("text", metavar="TEXT")
    command.add_argument("--tokens", type=int, default=64, help="at most so many new tokens")
    command.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--chat", action="store_true", help="TEXT is a message; use the model's chat template")
    command = add("export", run_export, "Write a student as a model that runs where Subquad is not installed.")
    command.add_argument("directory", metavar="DIR", help="a saved student")
    formats = ["qwen3_5", "gguf", "bamba"]
    command.add_argument("--format", required=True, choices=formats, help="a directory; gguf: a file")
    command.add_argument("--output", "-o", required=True, metavar="OUT", help="a new directory or file")
    command.add_argument("--type", choices=["f32", "f16", "q8_0"], help="of the numbers in a GGUF file; f16 if unsaid")
    add_eval(add("eval", run_eval, "Measure models beside their teacher: quality, long context and cost."))
    command = add("bench", run_bench, "Time the ops beside every peer that is installed, or see what memories hold.")
    command.add_argument(
        "what", choices=["ops", "mqar"], help="ops: forward and backward; mqar: small students of each mixer, recalling"
    )
    command.add_argument("--sizes", metavar="LIST", help="tokens, or tokens x batch, comma-separated: 2048,512x8")
    command.add_argument("--only", metavar="LIST", help="names of kinds and peers, or of mixers, comma-separated")
    command.add_argument("--seconds", type=float, default=60.0, help="about so long a size at most")
    command.add_argument("--json", metavar="FILE", help="write all figures there")
    command.add_argument("--no-memory", action="store_true", help="skip peak memory, a process for each kind and size")
    return parser


def add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once on a machine, in processes")
    command.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="ray: on the machines of the cluster at RAY_ADDRESS"
    )
    command.add_argument(
        "--evaluate", metavar="LIST", help="suites of `subquad eval` for all finished students, into DIR/evaluation"
    )
    instead = command.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="say what there is to do and how long it takes; do nothing"
    )
    instead.add_argument("--show", action="store_true", help="print the table of what is there; do nothing")


def add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", metavar="MODEL", nargs="+", help="students, or any models")
    command.add_argument(
        "--teacher", metavar="T", help="what they are compared with; else as the student's recipe says"
    )
    command.add_argument(
        "--suite",
        default="quick",
        metavar="LIST",
        help="quick, full, recall, diagnostics, or parts of full: language, zero-shot, generation, long, efficiency",
    )
    command.add_argument("--output", "-o", metavar="DIR", help="for results.json; run again, it is continued")
    command.add_argument(
        "--corpus",
        metavar="SOURCE",
        help="text to be read, all of it; else what the student's recipe held out, or python-stdlib's held-out files",
    )
    command.add_argument("--data", metavar="DIR", help="items of benchmarks, NAME.jsonl or NAME.jsonl.gz")
    command.add_argument("--tasks", metavar="LIST", help="names of such files, or of lm-eval's tasks; all of --data")
    command.add_argument("--include-path", metavar="DIR", help="task definitions of lm-eval's own kind")
    command.add_argument("--limit", type=int, metavar="N", help="items of a task")
    command.add_argument("--lengths", metavar="LIST", help="tokens of context of long, efficiency and recall: 512,1024")
    command.add_argument("--figures", action="store_true", help="draw pictures into DIR/figures, SVG and PNG")
    command.add_argument("--json", action="store_true", help="print results as JSON, not as a table")


def set_up_messages() -> None:
    """Our own messages on stdout, bare; of the libraries only what is wrong."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("subquad")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    quiet_libraries()


def run_distill(args: argparse.Namespace) -> None:
    from subquad.config import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    from subquad.distill.pipeline import distill
    from subquad.study.table import format_table

    row = distill(recipe, args.output)
    print(format_table([row]))
    print(f'\nThe student is in {args.output}; try: subquad generate {args.output} "Once upon a time"')


def run_study(args: argparse.Namespace) -> int:
    from subquad.config import load_study

    recipes = load_study(args.recipe, args.set)
    from subquad.study.grid import describe_remaining_work, run_study
    from subquad.study.runs import find_runs
    from subquad.study.table import format_study

    output = Path(args.output)
    if args.dry_run:
        print(describe_remaining_work(recipes, output, args.jobs))
        return 0
    if not args.show:
        suites = names_in(args.evaluate or "")
        run_study(recipes, output, jobs=args.jobs, engine=args.engine, suites=suites, log=say)
        print()
    runs = find_runs(recipes, output)
    print(format_study(runs))
    if not args.show:
        print(f"\nStudents, results.json and results.sqlite are in {output}; try: subquad report {output}")
    return int(any(run.state == "failed" for run in runs))


def say(line: str) -> None:
    """Above a progress bar, where there is one."""
    from tqdm.auto import tqdm

    with tqdm.external_write_mode():
        print(line, flush=True)


def run_report(args: argparse.Namespace) -> None:
    from subquad.report.page import write_report

    page = write_report(Path(args.directory), None if args.output is None else Path(args.output))
    print(f"{page}\nFigures (SVG, PDF) and tables (CSV, LaTeX) are in {Path(args.directory) / 'report'}")


def run_recipe(args: argparse.Namespace) -> None:
    from subquad.config import load_study, schema

    if args.schema:
        print(json.dumps(schema(), indent=2))
    elif args.recipe is None:
        raise UserError("no recipe given; expected a YAML file, or --schema")
    else:
        print("\n---\n".join(recipe.to_yaml().rstrip() for recipe in load_study(args.recipe, args.set)))


def run_linearize(args: argparse.Namespace) -> None:
    import torch

    from subquad.config import Data
    from subquad.data import check_data, token_rows
    from subquad.modeling.linearize import linearize
    from subquad.modeling.model_card import write_model_card
    from subquad.modeling.teachers import check_reference, load_teacher

    layers = plan_of(args)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {args.output!r} exists and is not empty; expected a new directory")
    check_reference(args.teacher)
    if args.calibrate is not None:
        if args.no_copy:
            raise UserError("--calibrate beside --no-copy; random projections have nothing to be calibrated by")
        check_data(Data(source=args.calibrate))
    teacher, tokenizer = load_teacher(args.teacher)
    tokens = None
    if args.calibrate is not None:
        rows = token_rows(Data(source=args.calibrate, seq_len=256), tokenizer, "train", limit=CALIBRATION)
        tokens = torch.stack([rows[i]["input_ids"] for i in range(len(rows))])
    given = {"copy_qkv": not args.no_copy, "calibration_ids": tokens, "seed": args.seed, "export_target": args.export}
    student = linearize(teacher, layer_types=layers, **given)
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)
    name = Path(args.teacher).name if Path(args.teacher).expanduser().exists() else args.teacher
    write_model_card(output, student.config, name)  # type: ignore[arg-type]
    what = args.mixer or ("hybrid" if args.layers else "gated_deltanet")
    print(f"{what} student of {args.teacher}: {student.num_parameters():,} parameters, in {args.output}")


def plan_of(args: argparse.Namespace) -> dict[str, Any]:
    """The layer plan that --layers, or --mixer and --option, give; its entries checked before a teacher is loaded."""
    from subquad.config import yaml_tree
    from subquad.modeling.layer_types import resolve_layer_type

    if args.layers is not None:
        if args.mixer is not None or args.option:
            raise UserError("--layers says the mixers and their options; leave out --mixer and --option")
        layers = yaml_tree.parse_value(args.layers, "--layers")
        if not isinstance(layers, dict) or not layers:
            raise UserError(
                f"--layers: got {args.layers!r}, expected a mapping such as '{{default: gla, 1: attention}}'"
            )
        for key, entry in layers.items():
            if not isinstance(entry, str | dict):
                raise UserError(
                    f"--layers: {key}: got {entry!r}, expected a mixer's name or a mapping with its options"
                )
            resolve_layer_type(entry, f"--layers: {key}")
        return layers
    chosen: dict[str, Any] = {"mixer": args.mixer or "gated_deltanet"}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text}: expected NAME=VALUE")
        chosen[name] = yaml_tree.parse_value(value, f"--option {text}")
    return {"default": resolve_layer_type(chosen, "--mixer")}


def run_inspect(args: argparse.Namespace) -> None:
    from subquad.modeling.summary import read_config, summary

    print(summary(read_config(args.directory)))


def run_export(args: argparse.Namespace) -> None:
    from subquad.export import export

    print(export(args.directory, args.output, args.format, args.type))


def run_mixers(args: argparse.Namespace) -> None:
    from dataclasses import fields

    from subquad.mixers.options import OPTIONS, SOFTMAX

    for name, options in OPTIONS.items():
        print(f"{name}\n  {options.source}")
        print("  options: " + ", ".join(f"{field.name}={field.default}" for field in fields(options)))
    print(f"{SOFTMAX}\n  The control: the teacher's own attention, kept.")


def run_generate(args: argparse.Namespace) -> None:
    import torch

    from subquad.modeling.teachers import check_reference, load_teacher

    check_reference(args.model)
    if args.tokens < 1:
        raise UserError(f"--tokens: got {args.tokens}, expected at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature: got {args.temperature}, expected 0 or more")
    model, tokenizer = load_teacher(args.model)
    torch.manual_seed(args.seed)
    text = args.text
    if args.chat:
        if not tokenizer.chat_template:
            raise UserError(f"{args.model} has no chat template; leave out --chat")
        message = [{"role": "user", "content": args.text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    fed = tokenizer(text, add_special_tokens=not args.chat).input_ids
    if not fed:
        fed = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    if not fed:
        raise UserError("TEXT is empty and the model has no token to begin with; expected some text")
    ids = torch.tensor([fed], device=model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, pad_token_id=pad, **sampling
    )
    print(tokenizer.decode(out[0, len(fed) if args.chat else 0 :], skip_special_tokens=True))


def run_eval(args: argparse.Namespace) -> None:
    from subquad.evaluate import command

    if args.json:  # nothing else on stdout
        logging.getLogger("subquad").handlers[0].setStream(sys.stderr)  # type: ignore[attr-defined]
    results = command.run(
        args.models,
        teacher=args.teacher,
        suites=names_in(args.suite),
        output=args.output,
        corpus=args.corpus,
        data=args.data,
        tasks=None if args.tasks is None else names_in(args.tasks),
        include=args.include_path,
        limit=args.limit,
        lengths=None if args.lengths is None else [number_in(n, "--lengths") for n in names_in(args.lengths)],
        figures=args.figures,
    )
    print(json.dumps(results.as_dict(), indent=2) if args.json else results.table())
    if args.output:
        print(f"\nAll rows are in {Path(args.output) / 'results.json'}", file=sys.stderr if args.json else sys.stdout)


def names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def number_in(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{option}: got {text!r}, expected a whole number") from None


def run_bench(args: argparse.Namespace) -> None:
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
    for name in names_in(args.only) if args.only else list(mixers.REGISTRY):
        for row in mqar_results([name]):
            print(f"{row.model:18} {row.task:16} {row.value:.1%} of {row.n}", flush=True)
            rows.append(row.as_dict())
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
