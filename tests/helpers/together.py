"""Several processes that do the same at once."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 240


def run_together(count: int, action: Callable[[int], None]) -> list[int | None]:
    """The exit codes of `count` forks of this process, which wait for each other and then call `action(index)`."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)

    def start(index: int) -> None:
        barrier.wait(TIMEOUT)
        action(index)

    processes = [context.Process(target=start, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def note(log: Path) -> int:
    """Adds the id of this process to `log`, and returns how many there are, itself included."""
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(log.read_text().split())
