"""Commands that read recipes: distill, study, cache-teacher, recipe."""

import json
import logging
from argparse import Namespace
from pathlib import Path

from subquad.cli.parser import Parser, count, split_list
from subquad.utils import UserError, is_first_process, quiet_libraries

RECIPE = "YAML file, or the name of a recipe of the package such as {}"
logger = logging.getLogger(__name__)


def add_commands(parser: Parser) -> None:
    demo = parser.command(
        "demo", run_demo, "Distill eight students and a control from the teacher nano, in minutes.", resumes=True
    )
    demo.option("--output -o", "DIR", "directory of the study, new or existing", type=Path, default=Path("demo"))
    distill = parser.command("distill", run_distill, "Train one student from a recipe.", resumes=True)
    distill.option("recipe", "RECIPE", RECIPE.format("smollm2-135m-budget"))
    distill.option("--output -o", "DIR", "saved student: new, or that of an unfinished run to resume", required=True)
    layouts = "with torchrun: ddp, fsdp, layers or layers+fsdp, what the processes share (docs/scale.md)"
    distill.option("--parallel", "LAYOUT", layouts, default="ddp", words=["ddp", "fsdp", "layers"])
    study = parser.command(
        "study", run_study, "Train a student for each combination of lists, and compare them.", resumes=True
    )
    study.option("recipe", "RECIPE", RECIPE.format("nano"))
    study.option("--output -o", "DIR", "directory of the study, new or existing", type=Path, required=True)
    study.option("--jobs", "N", "parallel runs on each machine", type=count, default=1)
    engines = ["local", "ray"]
    study.option("--engine", "NAME", "local, or ray: the cluster at RAY_ADDRESS", choices=engines, default="local")
    study.option(
        "--evaluate",
        "SUITES",
        "suites of `subquad eval` for all students, into DIR/evaluation (default: none)",
        default="",
    )
    study.flag("--dry-run", "print the remaining work and an estimate of its time, then exit")
    study.flag("--show", "print the table of finished runs, then exit")
    targets = parser.command(
        "cache-teacher", run_cache_teacher, "Compute the sparse targets of stage 3 of all runs.", resumes=True
    )
    targets.option("recipe", "RECIPE", f"{RECIPE.format('nano')}, also of a study")
    recipe = parser.command(
        "recipe", run_recipe, "Validate a recipe and print it with all defaults, or the JSON schema."
    )
    recipe.option("recipe", "RECIPE", RECIPE.format("nano"), nargs="?")
    recipe.flag("--schema", "print the JSON schema of recipes, for editors")
    for command in (distill, study, targets):
        command.quiet()
    for command in (distill, study, targets, recipe):
        command.option("--set", "KEY=VALUE", "override a key: stages.hidden.lr=1e-3", action="append", default=[])


def run_distill(args: Namespace) -> None:
    from subquad.config import load_recipe

    recipe = load_recipe(args.recipe, args.set)
    quiet_libraries()
    from subquad.distill.pipeline import distill
    from subquad.evaluate.table import terminal_width
    from subquad.study.progress import format_table

    result = distill(recipe, args.output, parallel=args.parallel)
    if not is_first_process():
        return
    print(format_table([result], terminal_width()))
    print(f'\nThe student is in {args.output}; try: subquad generate {args.output} "TEXT"')


def run_demo(args: Namespace) -> int:
    from subquad.cli import main

    output = str(args.output)
    return main(["study", "nano", "--output", output]) or main(["report", output])


def run_study(args: Namespace) -> int:
    from subquad.config import load_study

    recipes = load_study(args.recipe, args.set)
    quiet_libraries()
    from subquad.evaluate.table import terminal_width
    from subquad.study.grid import run_study
    from subquad.study.progress import describe_remaining_work, format_study
    from subquad.study.runs import find_runs

    if args.dry_run:
        print(describe_remaining_work(recipes, args.output, args.jobs))
        return 0
    if not args.show:
        suites = split_list(args.evaluate)
        run_study(recipes, args.output, jobs=args.jobs, engine=args.engine, suites=suites, log=logger.info)
        print()
    runs = find_runs(recipes, args.output)
    print(format_study(runs, terminal_width()))
    if not args.show:
        print(f"\nStudents, results.json and results.sqlite are in {args.output}; try: subquad report {args.output}")
    return int(any(run.state == "failed" for run in runs))


def run_cache_teacher(args: Namespace) -> None:
    from subquad.config import load_study, run_name

    recipes = load_study(args.recipe, args.set)
    quiet_libraries()
    from subquad.distill.cache_teacher import cache_teacher
    from subquad.distill.teacher_checks import teacher_placement
    from subquad.study.execute import teacher_in_memory

    stages = [recipe.stages.end_to_end for recipe in recipes]
    sparse = [r for r, s in zip(recipes, stages, strict=True) if s is not None and s.teacher_targets != "full"]
    for recipe in sparse or recipes:
        found = cache_teacher(recipe, teacher_in_memory(recipe.teacher, teacher_placement(recipe)))
        each = found["bytes"] / max(found["tokens"], 1)
        size = f"{found['tokens']:,} tokens, {found['bytes']:,} bytes, {each:.1f} bytes per token"
        outside = f", {found['outside']:.1%} of the probability left out" if found["outside"] else ""
        name = run_name(recipe, recipes)
        print(f"{name}: {found['rows']:,} rows, {size}{outside}, {found['seconds']:.1f} seconds", flush=True)


def run_recipe(args: Namespace) -> None:
    from subquad.config import load_study, schema

    if args.schema:
        print(json.dumps(schema(), indent=2))
    elif args.recipe is None:
        raise UserError("recipe: got no file, expected a YAML file or --schema")
    else:
        print("\n---\n".join(recipe.to_yaml().rstrip() for recipe in load_study(args.recipe, args.set)))
