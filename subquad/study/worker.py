"""What a process of a study's own does: runs one after the other, until the study ends, however it ends."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait

from subquad.study.lock import StudyLock
from subquad.utils import quiet_libraries


def work(connection: Connection, lock: StudyLock, threads: int) -> None:
    """Takes tasks from the study. `lock` is held as long as this process lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its workers itself
    end_with_parent()
    quiet_libraries()
    import torch

    from subquad.study.execute import TeacherCache, run_task

    torch.set_num_threads(threads)
    teachers = TeacherCache()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        run_task(task, teachers)
        connection.send("ended")


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int = parent.sentinel) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
