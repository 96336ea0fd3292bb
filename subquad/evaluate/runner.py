"""An evaluation: models side by side, part after part; finished parts are kept, so that an interrupted one goes on.

    rows = evaluate([Subject("gla", student, tokenizer)], Subject("nano", teacher, tokenizer), QUICK, "DIR")

DIR holds `parts/`, a file for each finished part, named after everything on which it depends, and `results.json` (a
head, and rows in long form of what is finished), written at the end and when interrupted; with diagnostics beside a
teacher also `matrices/`, a file a student (`chosen.unpack`).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subquad.analysis.figure_files import draw
from subquad.evaluate.jobs import MATRICES, EvalJob, EvalModel, Evaluation
from subquad.evaluate.results import Result
from subquad.evaluate.suites import Settings
from subquad.modeling.teachers import check_reference, load_teacher, resolve_reference
from subquad.utils import UserError, run_info, write_json_atomic

logger = logging.getLogger(__name__)


def load_eval_model(reference: str, name: str | None = None) -> EvalModel:
    """A model to be measured, by whatever names a teacher: nano, smollm2-135m, a directory (a student), a .gguf file, a
    hub id. Its name is that of its directory or file, unless given.

    Raises:
        UserError: nothing by that name.
    """
    check_reference(reference)
    path = resolve_reference(reference)
    model, tokenizer = load_teacher(reference)
    files = [] if path is None else [path] if path.is_file() else sorted(path.iterdir())
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if _decides(file)]
    own = Path(reference).expanduser()
    found = name or (own.resolve().name if own.exists() else reference)
    return EvalModel(found, model, tokenizer, (reference, *seen))


def _decides(file: Path) -> bool:
    return file.suffix in (".safetensors", ".gguf") or file.name in ("config.json", "tokenizer.json")


@dataclass
class ResultCache:
    """Outcomes of parts, kept in a directory (None: only in memory)."""

    directory: Path | None
    done: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def load(self, part: EvalJob) -> bool:
        """Takes an outcome from the directory; False where there is none that can be read."""
        if self.directory is None:
            return False
        try:
            self.done[part.name] = json.loads((self.directory / f"{part.key}.json").read_text())["outcome"]
        except (OSError, ValueError, KeyError):
            return False
        return True

    def run(self, part: EvalJob) -> None:
        """Computes and keeps an outcome; of a UserError only the message."""
        try:
            self.done[part.name] = part.compute()
        except UserError as error:
            self.failed[part.name] = str(error)
            return
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.directory / f"{part.key}.json", {"part": part.name, "outcome": self.done[part.name]})


def evaluate(
    subjects: Sequence[EvalModel],
    teacher: EvalModel | None,
    settings: Settings,
    output: str | Path | None = None,
    recipe: Any = None,
    figures: bool = False,
) -> tuple[list[Result], dict[str, str]]:
    """Measures models beside their teacher; returns all rows, and of parts that failed why, by name.

    output: a directory; parts that it holds already are not computed again. None: nothing is written.
    recipe: written into the head of `results.json`.
    figures: draw pictures, SVG and PNG, into `figures/` of that directory.

    Raises:
        UserError: models that cannot be compared; before anything is measured.
    """
    whole = Evaluation(subjects, teacher, settings)
    place = None if output is None else Path(output)
    finished = ResultCache(None if place is None else place / "parts")
    plan = whole.plan()
    todo = [part for part in plan if not finished.load(part)]
    if len(todo) < len(plan):
        logger.info("%d of %d parts are finished already", len(plan) - len(todo), len(plan))
    try:
        for number, part in enumerate(todo, 1):
            logger.info("[%d/%d] %s", number, len(todo), part.name)
            finished.run(part)
            if part.name in finished.failed:
                logger.warning("%s failed: %s", part.name, finished.failed[part.name])
    finally:  # not after each part: every row with an interval is drawn anew
        rows = whole.rows(finished.done)
        if place is not None:
            _write(place, rows, finished, recipe, len(plan))
            for subject in whole.students:
                kept = finished.done.get(f"{MATRICES}: {subject.name}")
                if kept is not None:
                    (place / MATRICES).mkdir(exist_ok=True)
                    write_json_atomic(place / MATRICES / f"{subject.name.replace('/', '-')}.json", {"heads": kept})
    if place is not None and figures:
        models = [(subject.name, subject.model) for subject in whole.students]
        beside = None if teacher is None else teacher.model
        draw(models, beside, whole.texts(subjects[0]), rows, place / "figures")
    return rows, finished.failed


def _write(place: Path, rows: Sequence[Result], finished: ResultCache, recipe: Any, planned: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    head = {
        **run_info(),
        "recipe": recipe,
        "parts": {"planned": planned, "finished": len(finished.done), "failed": finished.failed},
    }
    write_json_atomic(place / "results.json", {**head, "rows": [row.as_dict() for row in rows]})
