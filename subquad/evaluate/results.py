"""Results in long form: one measured number per record. Imports no torch.

`results.json` is an object with a header (versions, git commit, device, recipe) and `results`, a list of flat objects
with the fields of `Result`, without those that are None: `pandas.DataFrame(json.load(file)["results"])`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

ALL_TASKS = "all tasks"
"""The `task` of results over several tasks."""


@dataclass(frozen=True)
class Result:
    """One measured number."""

    task: str
    """What was measured on: a text, a benchmark, a group of diagnostics."""
    metric: str
    """`perplexity`, `acc`, `kl` ...; docs/evaluation.md and docs/analysis.md define all of them."""
    value: float
    stderr: float | None = None
    """Standard error of `value`."""
    low: float | None = None
    """Lower end of the 95% interval, if it is not `value` - 1.96 `stderr`."""
    high: float | None = None
    n: int | None = None
    """Number of items (tokens, questions, repeats)."""
    length: int | None = None
    """Context length in tokens."""
    batch: int | None = None
    """Batch size."""
    depth: float | None = None
    """Position in the context, from 0 (its start) to 1."""
    layer: int | None = None
    head: int | None = None
    model: str = ""
    teacher: str | None = None
    """The model that it was compared with."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that identifies the measurement; results with equal keys are duplicates."""
        return self.model, self.task, self.metric, self.length, self.batch, self.depth, self.layer, self.head

    @property
    def column(self) -> tuple[str, int | None, int | None]:
        """Its column in a table with a line per model: metric, length and batch size."""
        return self.metric, self.length, self.batch

    def as_dict(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {"model": self.model, "teacher": self.teacher, **asdict(self)}
        return {name: value for name, value in values.items() if value is not None}


def label_results(model: str, teacher: str | None, results: Iterable[Result]) -> list[Result]:
    """The results with the fields `model` and `teacher` set."""
    return [replace(result, model=model, teacher=teacher) for result in results]


def select(results: Iterable[Result], **fields: Any) -> list[Result]:
    """The results with these field values: `select(results, task="lambada", metric="acc")`."""
    return [result for result in results if all(getattr(result, name) == value for name, value in fields.items())]
