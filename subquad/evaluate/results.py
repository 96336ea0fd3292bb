"""Results as rows in long form, one measured number each, and what they are written into. Knows nothing of models.

`results.json` is one object: a head (versions, git commit, device, recipe) and `rows`. A row is a flat mapping with the
fields of `Row`; None is left out. pandas reads it with `pandas.DataFrame(json.load(file)["rows"])`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Result:
    """One measured number."""

    task: str
    """What was measured on: a corpus, a benchmark's task, a diagnostic."""
    metric: str
    """What was measured, in the field's names: `perplexity`, `acc`, `kl`, `overlap` ..."""
    value: float
    stderr: float | None = None
    """Standard error of `value`."""
    low: float | None = None
    """Ends of a 95% interval, where it is not `value` -+ 1.96 `stderr`."""
    high: float | None = None
    n: int | None = None
    """Items (tokens, questions, repeats) behind it."""
    length: int | None = None
    """Tokens of context."""
    batch: int | None = None
    """Rows at a time, where that matters."""
    depth: float | None = None
    """Where in the context, 0 (its start) to 1."""
    layer: int | None = None
    head: int | None = None
    model: str = ""
    """Whose number it is."""
    teacher: str | None = None
    """What it was compared with."""

    @property
    def subject(self) -> tuple[Any, ...]:
        """What was measured of whom and where: rows that have it in common are one measurement, taken twice."""
        return self.model, self.task, self.metric, self.length, self.batch, self.depth, self.layer, self.head

    def as_dict(self) -> dict[str, Any]:
        """Without what is None."""
        first = {"model": self.model, "teacher": self.teacher}
        return {name: value for name, value in {**first, **asdict(self)}.items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Result":
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def of(model: str, teacher: str | None, rows: Iterable[Result]) -> list[Result]:
    """Rows with the name of their model, and of what it was compared with, written in."""
    return [replace(row, model=model, teacher=teacher) for row in rows]


def select(rows: Iterable[Result], **wanted: Any) -> list[Result]:
    """Those rows whose fields are as wanted: `select(rows, task="lambada", metric="acc")`."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def one(rows: Sequence[Result], **wanted: Any) -> Result:
    """The one row with those fields; LookupError where there is none, or are several."""
    found = select(rows, **wanted)
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}; expected one")
    return found[0]
