"""`subquad eval`: checks what was asked for before anything is loaded, loads it, measures it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from subquad.config import Data, Recipe, load_recipe
from subquad.data import check_data
from subquad.evaluate.jobs import EvalModel
from subquad.evaluate.lm_eval import find_tasks
from subquad.evaluate.long_context import check_lengths
from subquad.evaluate.results import Result
from subquad.evaluate.runner import evaluate, load_eval_model
from subquad.evaluate.suites import Settings, settings_of
from subquad.evaluate.table import tables
from subquad.modeling.teachers import check_reference
from subquad.utils import UserError, run_info

CONTEXT = 512


@dataclass(frozen=True)
class EvaluationOutcome:
    """All rows, and of parts that failed why, by name."""

    rows: list[Result]
    failed: dict[str, str]
    head: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {**self.head, "failed": self.failed, "rows": [row.as_dict() for row in self.rows]}

    def table(self) -> str:
        failed = [f"{name} failed: {why}" for name, why in self.failed.items()]
        return "\n".join([tables(self.rows), *failed])


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
) -> EvaluationOutcome:
    """Measures models by name; see `subquad eval --help`.

    Raises:
        UserError: anything that cannot be found or compared, before anything is measured.
    """
    recipe = recipe_beside(models[0])
    settings = settings_of(suites)
    if lengths is not None:
        check_lengths(lengths)
        many = tuple(lengths)
        settings = replace(settings, lengths=many, cost_lengths=many, recall_lengths=many)
    if limit is not None:
        if limit < 1:
            raise UserError(f"limit: got {limit}, expected at least 1")
        settings = replace(settings, limit=limit)
    place = check_output(output)
    if figures and place is None:
        raise UserError("figures without an output directory; expected --output DIR too")
    teacher = teacher or (None if recipe is None else recipe.teacher)
    for reference in [*models, *([teacher] if teacher is not None else [])]:
        check_reference(reference)
    settings = replace(settings, text=corpus_of(corpus, recipe))
    check_data(settings.text)
    settings = with_tasks(settings, data, tasks, include)
    same = teacher is not None and list(models) == [teacher]
    subjects = [load_eval_model(reference, name) for reference, name in zip(models, names_of(models), strict=True)]
    beside: EvalModel | None = None
    if teacher is not None:
        beside = replace(subjects[0], name=f"{teacher} (teacher)") if same else load_eval_model(teacher)
    source = None if recipe is None else recipe.model_dump(mode="json")
    rows, failed = evaluate(subjects, beside, settings, place, source, figures)
    return EvaluationOutcome(rows, failed, {**run_info(), "recipe": source})


def recipe_beside(model: str) -> Recipe | None:
    """The recipe that lies beside a student, where it can be read."""
    path = Path(model).expanduser() / "recipe.yaml"
    try:
        return load_recipe(path, []) if path.is_file() else None
    except (UserError, yaml.YAMLError):
        return None


def check_output(output: str | None) -> Path | None:
    if output is None:
        return None
    place = Path(output)
    if place.exists() and not place.is_dir():
        raise UserError(f"output {output!r} is a file; expected a directory")
    known = (place / "results.json").exists() or (place / "parts").exists()
    if place.exists() and any(place.iterdir()) and not known:
        raise UserError(f"output {output!r} is not empty and holds no evaluation; expected a new directory")
    return place


def corpus_of(source: str | None, recipe: Recipe | None) -> Data:
    """A source that is named is read whole; else the text that the recipe held out."""
    if source is not None:
        return Data(source=source, validation=None if source == "python-stdlib" else source, seq_len=CONTEXT)
    return Data(source="python-stdlib", seq_len=CONTEXT) if recipe is None else recipe.data


def with_tasks(settings: Settings, data: str | None, tasks: Sequence[str] | None, include: str | None) -> Settings:
    """The tasks that were named; without any, those of `data`; without that, in a full evaluation lm-eval's own."""
    if "zero-shot" not in settings.parts and "generation" not in settings.parts:
        if tasks is not None:
            raise UserError(f"tasks beside the parts {', '.join(settings.parts)}; expected zero-shot or generation too")
        return settings
    if tasks is None and data is None and (settings.limit is not None or "zero-shot" not in settings.parts):
        return replace(settings, parts=tuple(part for part in settings.parts if part != "zero-shot"))
    where = None if include is None else Path(include)
    if where is not None and not where.is_dir():
        raise UserError(f"include path {include!r} is not a directory")
    found = find_tasks(tasks, None if data is None else Path(data), where)
    return replace(settings, tasks=tuple(found), include=where)


def names_of(models: Sequence[str]) -> list[str]:
    """Short names: of directories and files their own, with more of their path where two would be the same."""
    paths = [Path(model).expanduser() for model in models]
    parts = [path.resolve().parts if path.exists() else (model,) for path, model in zip(paths, models, strict=True)]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same model twice among {', '.join(models)}")
