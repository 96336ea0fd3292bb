"""Executes one run from its start or last checkpoint to its end. Every engine calls `execute_run`.

Imports no torch at module level: a worker process starts its watchdog before it loads the heavy libraries.
"""

import logging
import os
import signal
import threading
import traceback
from collections.abc import Mapping
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


worker_teachers = TeacherCache()
"""Of a worker process, which executes many runs."""


def execute_run(run: Run, stage_cache: "StageCache", teachers: TeacherCache = worker_teachers) -> None:
    """Runs to the end. An exception is written to `error.json` in the run's directory and not raised."""
    from subquad.distill.pipeline import distill

    (run.directory / ERROR).unlink(missing_ok=True)
    try:
        distill(run.recipe, run.directory, teachers[run.recipe.teacher], stage_cache)
    except Exception as error:
        run.fail(type(error).__name__, str(error), traceback.format_exc())
        logger.warning("%s failed: %s", run.name, run.error_line())


def start_worker(lock: StudyLock, parent: Connection, threads: int, variables: Mapping[str, str]) -> None:
    """Prepares a worker process, which ends when the other end of `parent` closes.

    lock: held as long as this process lives. variables: set in its environment.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its workers
    threading.Thread(target=exit_at_end_of, args=(parent,), daemon=True).start()
    os.environ.update({"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **variables})
    quiet_libraries()
    import torch

    torch.set_num_threads(threads)


def exit_at_end_of(connection: Connection) -> None:
    wait([connection])
    os._exit(1)
