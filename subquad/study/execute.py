"""Executes one run from its start or last checkpoint to its end. Every engine calls `execute_run`.

Imports no torch at module level: a worker process starts its watchdog before it loads the heavy libraries.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from subquad.study.lock import StudyLock
from subquad.study.runs import ERROR, Run
from subquad.utils import quiet_libraries

if TYPE_CHECKING:
    from subquad.distill.stage_cache import StageCache
    from subquad.modeling.teachers import ModelAndTokenizer

logger = logging.getLogger(__name__)


class TeacherCache:
    """Keeps the teacher that was used last in memory."""

    def __init__(self) -> None:
        self.loaded: dict[str, ModelAndTokenizer] = {}

    def __getitem__(self, reference: str) -> "ModelAndTokenizer":
        from subquad.modeling.teachers import load_teacher

        if reference not in self.loaded:
            self.loaded.clear()
            self.loaded[reference] = load_teacher(reference)
        return self.loaded[reference]


def execute_run(run: Run, stage_cache: "StageCache", teachers: TeacherCache) -> None:
    """Runs to the end. An exception is written to `error.json` in the run's directory and not raised."""
    from subquad.distill.pipeline import distill

    (run.directory / ERROR).unlink(missing_ok=True)
    try:
        distill(run.recipe, run.directory, teachers[run.recipe.teacher], stage_cache)
    except Exception as error:
        run.fail(type(error).__name__, str(error), traceback.format_exc())
        logger.warning("%s failed: %s", run.name, run.error_line())


def worker_main(connection: Connection, lock: StudyLock, threads: int) -> None:
    """Main function of a worker process: executes runs received from `connection` until the study ends.

    lock: held as long as this process lives.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study terminates its workers
    exit_with_parent()
    quiet_libraries()
    import torch

    torch.set_num_threads(threads)
    teachers = TeacherCache()
    while True:
        try:
            run, stage_cache = connection.recv()
        except EOFError:
            return
        execute_run(run, stage_cache, teachers)
        connection.send("finished")


def exit_with_parent() -> None:
    """Starts a thread that ends this process when its parent ends, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_parent(sentinel: int = parent.sentinel) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for processes started in the context."""
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
