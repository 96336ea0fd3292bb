"""One run of a study, from its start or where it stopped to its end or its error. What an engine calls, anywhere."""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from subquad.distill.pipeline import distill, stage_keys
from subquad.distill.stage_cache import StageCache
from subquad.modeling.teachers import Loaded, load_teacher
from subquad.study.runs import ERROR, Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A run that is to be done, with the stages that it has in common with others."""

    run: Run
    shared: StageCache

    def common(self) -> list[str]:
        """Keys of its stages that other runs have too, in order."""
        return [key for key in stage_keys(self.run.recipe).values() if key in self.shared.wanted]


class TeacherCache:
    """The teacher that was used last, loaded once."""

    def __init__(self) -> None:
        self.held: dict[str, Loaded] = {}

    def __getitem__(self, reference: str) -> Loaded:
        if reference not in self.held:
            self.held.clear()
            self.held[reference] = load_teacher(reference)
        return self.held[reference]


def run_task(task: Task, teachers: TeacherCache) -> None:
    """Takes a run to its end. Whatever goes wrong with it stays in its directory, as `error.json`."""
    run = task.run
    (run.directory / ERROR).unlink(missing_ok=True)
    try:
        distill(run.recipe, run.directory, teachers[run.recipe.teacher], task.shared)
    except Exception as error:
        run.fail(type(error).__name__, str(error), traceback.format_exc())
        logger.warning("%s failed: %s: %s", run.name, type(error).__name__, str(error).partition("\n")[0])


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
