"""Which runs of a study may start: not two at once that would train the same stage. Starts none itself."""

from collections.abc import Iterable

from subquad.study.execute import Task

MAX_RETRIES = 3
"""So often a run's process may die before the run counts as failed."""


class Scheduler:
    """The tasks of a study, each waiting, running or ended."""

    def __init__(self, tasks: Iterable[Task]):
        self.waiting = list(tasks)
        self.running: list[Task] = []
        self.deaths: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.running)

    def next(self) -> Task | None:
        """Starts the first that need not wait for a stage that another is training; None where there is none."""
        for task in self.waiting:
            if not self._waits(task):
                self.waiting.remove(task)
                self.running.append(task)
                return task
        return None

    def _waits(self, task: Task) -> bool:
        missing = {key for key in task.common() if not task.shared.has(key)}
        return any(missing & set(other.common()) for other in self.running)

    def end(self, task: Task) -> None:
        """Of one that ran to its end or its error."""
        self.running.remove(task)

    def on_worker_exit(self, task: Task, how: str) -> None:
        """Of one whose process was killed: it goes on from its last checkpoint, unless that happens again and again."""
        self.running.remove(task)
        name = task.run.name
        self.deaths[name] = self.deaths.get(name, 0) + 1
        if self.deaths[name] < MAX_RETRIES:
            self.waiting.insert(0, task)
        else:
            task.run.fail("WorkerDied", f"its process died {MAX_RETRIES} times, at last {how}; is there memory enough?")
