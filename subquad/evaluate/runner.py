"""Runs an evaluation job by job. Finished jobs are stored, so that an interrupted evaluation continues.

    results, failed = evaluate([EvalModel("gla", student, tokenizer)], EvalModel("nano", teacher, tokenizer), QUICK)

An output directory holds `jobs/` (one file per finished job, named by a hash of everything that its outcome depends
on) and `results.json` (a header and the results of all finished jobs), written at the end and on interruption. With
diagnostics and a teacher it also holds `matrices/` (one file per student, read by `mixing_matrices.unpack_pairs`).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subquad.evaluate.jobs import EvalJob, EvalModel, Evaluation
from subquad.evaluate.results import Result
from subquad.evaluate.suites import Settings
from subquad.modeling.teachers import check_reference, load_teacher, resolve_reference
from subquad.registry import SUITES
from subquad.utils import UserError, run_info, write_json_atomic

logger = logging.getLogger(__name__)


def load_eval_model(reference: str, name: str | None = None) -> EvalModel:
    """Loads a model to evaluate.

    Args:
        reference: any reference of a teacher (nano, smollm2-135m, a directory, a .gguf file, a hub id), or a student's
            directory.
        name: default: the name of the directory or file, else `reference`.

    Raises:
        UserError: there is no such model.
    """
    check_reference(reference)
    path = resolve_reference(reference)
    model, tokenizer = load_teacher(reference)
    files = [] if path is None else [path] if path.is_file() else sorted(path.iterdir())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if _defines_model(file)]
    given = Path(reference).expanduser()
    return EvalModel(
        name or (given.resolve().name if given.exists() else reference), model, tokenizer, (reference, *stats)
    )


def _defines_model(file: Path) -> bool:
    return file.suffix in (".safetensors", ".gguf") or file.name in ("config.json", "tokenizer.json")


@dataclass
class ResultCache:
    """Outcomes of jobs by name, stored in a directory (None: in memory only)."""

    directory: Path | None
    outcomes: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def load(self, job: EvalJob) -> bool:
        """Reads a job's outcome from the directory. Returns False if there is none."""
        if self.directory is None:
            return False
        try:
            self.outcomes[job.name] = json.loads((self.directory / f"{job.key}.json").read_text())["outcome"]
        except (OSError, ValueError, KeyError):
            return False
        return True

    def run(self, job: EvalJob) -> None:
        """Computes and stores a job's outcome. If it raises UserError, `failed` keeps the message."""
        try:
            outcome = self.outcomes[job.name] = job.compute()
        except UserError as error:
            self.failed[job.name] = str(error)
            return
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.directory / f"{job.key}.json", {"job": job.name, "outcome": outcome})


def evaluate(
    models: Sequence[EvalModel],
    teacher: EvalModel | None,
    settings: Settings,
    output: str | Path | None = None,
    recipe: Any = None,
    figures: bool = False,
) -> tuple[list[Result], dict[str, str]]:
    """Evaluates models, compared with their teacher if there is one.

    Args:
        output: a directory; jobs whose outcome it holds are not computed again. None: nothing is written.
        recipe: written into the header of `results.json`.
        figures: draw the figures of every suite that has some into `output`/figures, as SVG and PNG.

    Returns:
        All results, and the error messages of failed jobs by job name.

    Raises:
        UserError: models that cannot be compared; raised before anything is measured.
    """
    evaluation = Evaluation(models, teacher, settings)
    directory = None if output is None else Path(output)
    cache = ResultCache(None if directory is None else directory / "jobs")
    jobs = evaluation.jobs()
    todo = [job for job in jobs if not cache.load(job)]
    if len(todo) < len(jobs):
        logger.info("%d of %d jobs are finished already", len(jobs) - len(todo), len(jobs))
    try:
        for number, job in enumerate(todo, 1):
            logger.info("[%d/%d] %s", number, len(todo), job.name)
            cache.run(job)
            if job.name in cache.failed:
                logger.warning("%s failed: %s", job.name, cache.failed[job.name])
    finally:  # once, not after each job: every interval is a bootstrap
        results = evaluation.results(cache.outcomes)
        if directory is not None:
            _write_results(directory, results, cache, recipe, len(jobs))
            for suite in evaluation.suites:
                if suite.save is not None:
                    suite.save(evaluation, cache.outcomes, directory)
    if directory is not None and figures:
        (directory / "figures").mkdir(exist_ok=True)
        for draw in [suite.draw for suite in SUITES.values() if suite.draw is not None]:
            draw(evaluation, results, directory / "figures")
    return results, cache.failed


def _write_results(directory: Path, results: Sequence[Result], cache: ResultCache, recipe: Any, planned: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    header = {
        **run_info(),
        "recipe": recipe,
        "jobs": {"planned": planned, "finished": len(cache.outcomes), "failed": cache.failed},
    }
    write_json_atomic(directory / "results.json", {**header, "results": [result.as_dict() for result in results]})
