"""`subquad eval`: validates all arguments, loads the models, evaluates them."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from subquad.config import Data, Recipe, load_recipe
from subquad.data import check_data
from subquad.evaluate.lm_eval import find_tasks
from subquad.evaluate.results import Result
from subquad.evaluate.runner import evaluate, load_eval_model
from subquad.evaluate.suites import Settings, settings_for
from subquad.evaluate.table import WIDTH, format_tables
from subquad.modeling.placement import Placement
from subquad.modeling.teachers import check_reference
from subquad.utils import UserError, install_command, needs_extra, probe_output, run_info

logger = logging.getLogger(__name__)
SEQ_LEN = 512
"""Tokens per row of a validation text given without a recipe."""


class EvalReport(NamedTuple):
    """All results, the error messages of failed jobs by job name, the header of the result file, and what was asked for
    and not measured."""

    results: list[Result]
    failed: dict[str, str]
    header: dict[str, Any]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**self.header, "failed": self.failed, "results": [result.as_dict() for result in self.results]}

    def table(self, width: int = WIDTH) -> str:
        return "\n\n".join([format_tables(self.results, width), *self.notes])


def run(
    models: Sequence[str],
    *,
    teacher: str | None = None,
    suites: Sequence[str] = ("quick",),
    output: str | None = None,
    corpus: str | None = None,
    data: str | None = None,
    tasks: Sequence[str] | None = None,
    include: str | None = None,
    limit: int | None = None,
    lengths: Sequence[int] | None = None,
    figures: bool = False,
    placement: Placement | None = None,
) -> EvalReport:
    """Evaluates models by reference; the arguments are the options of `subquad eval`.

    Raises:
        UserError: an invalid argument, a missing file, models that cannot be compared; before anything is measured.
    """
    recipe = find_recipe(models[0])
    settings = settings_for(suites)
    if lengths is not None:
        if min(lengths, default=0) < 2:
            raise UserError(f"lengths: got {list(lengths)}, expected numbers of tokens of at least 2")
        given = tuple(lengths)
        settings = replace(settings, lengths=given, cost_lengths=given, recall_lengths=given)
    if limit is not None:
        settings = replace(settings, limit=limit)
    check_output(output)
    if figures and output is None:
        raise UserError("figures: expected an output directory (--output DIR) to draw them into")
    if figures:
        with needs_extra("figures", "report"):
            import matplotlib  # noqa: F401
    teacher = teacher or (None if recipe is None else recipe.teacher)
    for reference in [*models, *([] if teacher is None else [teacher])]:
        check_reference(reference)
    settings = replace(settings, text=validation_text(corpus, recipe))
    check_data(settings.text)
    asked = settings.suites
    settings = resolve_tasks(settings, data, tasks, include)
    notes = [] if "zero-shot" in settings.suites or "zero-shot" not in asked else [no_benchmarks()]
    if output is not None:
        probe_output("output", Path(output))
    names = zip(models, short_names(models), strict=True)
    loaded = [load_eval_model(reference, name, placement) for reference, name in names]
    reference_model = None
    if teacher is not None:
        same = list(models) == [teacher]
        reference_model = (
            replace(loaded[0], name=f"{teacher} (teacher)") if same else load_eval_model(teacher, None, placement)
        )
    source = None if recipe is None else recipe.model_dump(mode="json")
    results, failed = evaluate(loaded, reference_model, settings, output, source, figures)
    return EvalReport(results, failed, {**run_info(loaded[0].model.device), "recipe": source}, tuple(notes))


def find_recipe(model: str) -> Recipe | None:
    """The `recipe.yaml` in a student's directory; None if there is none, or it cannot be read."""
    path = Path(model).expanduser() / "recipe.yaml"
    try:
        return load_recipe(path, []) if path.is_file() else None
    except (UserError, yaml.YAMLError):
        return None


def check_output(output: str | None) -> None:
    """Raises UserError if it is a file, or a directory that holds something other than an evaluation."""
    directory = None if output is None else Path(output)
    if directory is None or not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"output: {output!r} is a file, expected a directory")
    names = {path.name for path in directory.iterdir()}
    if names and not names & {"results.json", "jobs"}:
        raise UserError(f"output: {output!r} is not empty and holds no evaluation, expected a new directory")


def validation_text(source: str | None, recipe: Recipe | None) -> Data:
    """`source` as a whole; without it the recipe's validation split; without a recipe that of python-stdlib."""
    if source is not None:
        return Data(source=source, validation=None if source == "python-stdlib" else source, seq_len=SEQ_LEN)
    return Data(source="python-stdlib", seq_len=SEQ_LEN) if recipe is None else recipe.data


def resolve_tasks(settings: Settings, data: str | None, tasks: Sequence[str] | None, include: str | None) -> Settings:
    """Settings with their tasks: those named, else all in the directory `data`, else lm-eval's default tasks.

    The default tasks need a hub: without tasks and `data`, a limited evaluation leaves out zero-shot.
    """
    zero_shot = "zero-shot" in settings.suites
    if not zero_shot and "generation" not in settings.suites:
        if tasks is not None:
            given = ", ".join(settings.suites)
            raise UserError(f"tasks: got suites {given}, expected zero-shot or generation among them")
        return settings
    if tasks is None and data is None and (settings.limit is not None or not zero_shot):
        if zero_shot:
            logger.warning("%s", no_benchmarks())
        return replace(settings, suites=tuple(suite for suite in settings.suites if suite != "zero-shot"))
    if include is not None and not Path(include).is_dir():
        raise UserError(f"include path: {include!r} is not a directory")
    directories = [None if path is None else Path(path) for path in (data, include)]
    return replace(settings, tasks=tuple(find_tasks(tasks, *directories)), include=directories[1])


def no_benchmarks() -> str:
    """Why zero-shot is left out, and what it takes."""
    missing = importlib.util.find_spec("lm_eval") is None
    extra = f", and the extra: {install_command('eval')}" if missing else ""
    return (
        f"benchmarks (zero-shot) are left out: they need items, by --data DIR or --tasks NAME,NAME from the hub{extra}"
    )


def short_names(models: Sequence[str]) -> list[str]:
    """The last component of each path, with as many parent directories as are needed to tell the models apart."""
    paths = [Path(model).expanduser() for model in models]
    parts = [path.resolve().parts if path.exists() else (model,) for path, model in zip(paths, models, strict=True)]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"models: got the same model twice among {', '.join(models)}")
