"""Executes one run from its start or last checkpoint to its end. Every engine calls `execute_run`.

Imports no torch at module level: a worker process starts its watchdog before it loads the heavy libraries.
"""

import functools
import logging
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from tqdm import tqdm

from subquad import progress
from subquad.study.runs import Run
from subquad.utils import acquire, lock_of, quiet_libraries

if TYPE_CHECKING:
    from subquad.distill.recipe_stages import StageCache
    from subquad.modeling.placement import Placement
    from subquad.modeling.teachers import ModelAndTokenizer

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def teacher_in_memory(reference: str, placement: "Placement") -> "ModelAndTokenizer":
    """A process executes many runs and loads their teacher once."""
    from subquad.modeling.teachers import load_placed

    return load_placed(reference, placement)


def execute_run(run: Run, stage_cache: "StageCache") -> None:
    """Runs to the end. An exception is written to `error.json` in the run's directory and not raised."""
    from subquad.distill.pipeline import distill
    from subquad.distill.teacher_checks import teacher_placement

    run.start()
    try:
        loaded = teacher_in_memory(run.recipe.teacher, teacher_placement(run.recipe))
        distill(run.recipe, run.directory, loaded, stage_cache)
    except Exception as error:
        run.fail(type(error).__name__, str(error), traceback.format_exc())
        logger.warning("%s failed: %s", run.name, run.error_line())


def execute_in_worker(run: Run, stage_cache: "StageCache") -> None:
    """Waits for the worker of a killed study that is still executing the run: it may need seconds to exit."""
    with acquire(lock_of(run.directory)):
        pass
    execute_run(run, stage_cache)


def start_worker(parent: Connection, threads: int, variables: Mapping[str, str]) -> None:
    """Prepares a worker process, which ends when the other end of `parent` closes.

    variables: set in its environment.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its workers
    threading.Thread(target=exit_at_end_of, args=(parent,), daemon=True).start()
    os.environ.update({"OMP_NUM_THREADS": str(threads), **variables})
    progress.hide("bars", "lines")
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is ended would leak
    quiet_libraries()
    import torch

    torch.set_num_threads(threads)


def exit_at_end_of(connection: Connection) -> None:
    wait([connection])
    os._exit(1)
