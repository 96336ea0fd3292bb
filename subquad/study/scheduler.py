"""Decides which runs of a study may start: no two runs that would train the same shared stage at once."""

from collections.abc import Iterable

from subquad.distill.recipe_stages import stage_keys
from subquad.distill.stage_cache import StageCache
from subquad.study.runs import Run

MAX_WORKER_EXITS = 3
"""Worker exits after which a run counts as failed."""


class Scheduler:
    """The runs of a study, each waiting, running or ended. Starts no process."""

    def __init__(self, runs: Iterable[Run], stage_cache: StageCache):
        self.waiting = list(runs)
        self.running: list[Run] = []
        self.stage_cache = stage_cache
        self.worker_exits: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether any run is waiting or running."""
        return bool(self.waiting or self.running)

    def next(self) -> Run | None:
        """Marks the first waiting run that is not blocked as running and returns it; None if there is none."""
        for run in self.waiting:
            if not self._is_blocked(run):
                self.waiting.remove(run)
                self.running.append(run)
                return run
        return None

    def shared_keys(self, run: Run) -> list[str]:
        """Keys of the run's stages that other runs share, in stage order."""
        return [key for key in stage_keys(run.recipe).values() if key in self.stage_cache.shared_keys]

    def _is_blocked(self, run: Run) -> bool:
        missing = {key for key in self.shared_keys(run) if not self.stage_cache.has(key)}
        return any(missing & set(self.shared_keys(other)) for other in self.running)

    def end(self, run: Run) -> None:
        """Records that a run finished or failed."""
        self.running.remove(run)

    def on_worker_exit(self, run: Run, reason: str) -> None:
        """Queues a run whose process was killed again, to resume from its last checkpoint; fails it after
        `MAX_WORKER_EXITS` exits."""
        self.running.remove(run)
        self.worker_exits[run.name] = self.worker_exits.get(run.name, 0) + 1
        if self.worker_exits[run.name] < MAX_WORKER_EXITS:
            self.waiting.insert(0, run)
        else:
            run.fail(
                "WorkerDied", f"its process exited {MAX_WORKER_EXITS} times, last {reason}; is there enough memory?"
            )
