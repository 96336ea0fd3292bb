"""Commands that read recipes: distill, study, recipe."""

import argparse
import json
from pathlib import Path
from typing import Any

from subquad.cli.parser import AddCommand, split_list
from subquad.utils import UserError, quiet_libraries


def add_commands(add: AddCommand) -> None:
    def add_recipe(command: argparse.ArgumentParser, **recipe: Any) -> None:
        command.add_argument("recipe", metavar="RECIPE", help="YAML file", **recipe)
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a key, as in stages.hidden.lr=1e-3",
        )

    def add_output(command: argparse.ArgumentParser, text: str) -> None:
        command.add_argument("--output", "-o", required=True, metavar="DIR", help=text)

    command = add("distill", run_distill, "Train one student from a recipe. The output directory is the saved student.")
    add_recipe(command)
    add_output(command, "new directory, or that of an unfinished run to resume")

    command = add(
        "study", run_study, "Train a student for each combination of a recipe's lists, and print their table."
    )
    add_recipe(command)
    add_output(command, "directory of the study, new or existing")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel runs on each machine (default: 1)")
    command.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="ray: use the Ray cluster at RAY_ADDRESS"
    )
    command.add_argument(
        "--evaluate",
        metavar="SUITES",
        help="suites of `subquad eval` to run on all finished students, into DIR/evaluation",
    )
    mode = command.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run", action="store_true", help="print the remaining work and an estimate of its time, then exit"
    )
    mode.add_argument("--show", action="store_true", help="print the table of finished runs, then exit")

    command = add("recipe", run_recipe, "Validate a recipe and print it with all defaults.")
    add_recipe(command, nargs="?")
    command.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")


def run_distill(args: argparse.Namespace) -> None:
    from subquad.config import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    quiet_libraries()
    from subquad.distill.pipeline import distill
    from subquad.study.table import format_table

    print(format_table([distill(recipe, args.output)]))
    print(f'\nThe student is in {args.output}; try: subquad generate {args.output} "Once upon a time"')


def run_study(args: argparse.Namespace) -> int:
    from subquad.config import load_study

    recipes = load_study(args.recipe, args.set)
    quiet_libraries()
    from subquad.study.grid import run_study
    from subquad.study.progress import describe_remaining_work
    from subquad.study.runs import find_runs
    from subquad.study.table import format_study

    output = Path(args.output)
    if args.dry_run:
        print(describe_remaining_work(recipes, output, args.jobs))
        return 0
    if not args.show:
        suites = split_list(args.evaluate or "")
        run_study(recipes, output, jobs=args.jobs, engine=args.engine, suites=suites, log=print_above_progress)
        print()
    runs = find_runs(recipes, output)
    print(format_study(runs))
    if not args.show:
        print(f"\nStudents, results.json and results.sqlite are in {output}; try: subquad report {output}")
    return int(any(run.state == "failed" for run in runs))


def print_above_progress(line: str) -> None:
    """Prints a line without breaking progress bars."""
    from tqdm.auto import tqdm

    with tqdm.external_write_mode():
        print(line, flush=True)


def run_recipe(args: argparse.Namespace) -> None:
    from subquad.config import load_study, schema

    if args.schema:
        print(json.dumps(schema(), indent=2))
    elif args.recipe is None:
        raise UserError("recipe: got no file, expected a YAML file or --schema")
    else:
        print("\n---\n".join(recipe.to_yaml().rstrip() for recipe in load_study(args.recipe, args.set)))
