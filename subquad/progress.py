"""Progress of long jobs: a bar with speed and time left on a terminal, else a line in the log now and then.

    with progress.bar(len(layers), "calibrating", unit="layers") as bar:
        bar.update()

The lines are of the logger `subquad.progress`. Imports no torch.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, Self

logger = logging.getLogger(__name__)
FIRST_LINE, INTERVAL = 10.0, 30.0
"""Seconds until the first line, and between the others."""
_shown = {"bars": True, "lines": True}


class Progress(Protocol):
    """What `bar` returns: a bar of tqdm, or `Lines`."""

    def update(self, n: int = 1) -> Any: ...
    def set_postfix_str(self, text: str, refresh: bool = True) -> Any: ...
    def close(self) -> Any: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> Any: ...


def bar(
    total: int | None, label: str, unit: str, *, initial: int = 0, delay: float = 0.0, hide: bool = False
) -> Progress:
    """Shows the progress of `total` steps (None: unknown).

    Args:
        unit: of a step, such as "tok".
        initial: steps that were done before.
        delay: seconds before a bar appears.
        hide: show nothing, as in all processes but the first.
    """
    from tqdm.auto import tqdm

    settings = {"unit_scale": True, "dynamic_ncols": True, "leave": False}
    disable = True if hide or not _shown["bars"] else None  # None: unless stderr is a terminal
    shown = tqdm(total=total, desc=label, unit=f" {unit}", initial=initial, delay=delay, disable=disable, **settings)
    return shown if not shown.disable else Lines(total, label, unit, initial, hide or not _shown["lines"])


class Lines:
    """`gla hidden: 62% of 40.0k tok, loss 0.301, 812 tok/s, 0:00:19 left`, after `FIRST_LINE` and each `INTERVAL`
    seconds."""

    def __init__(self, total: int | None, label: str, unit: str, initial: int, hide: bool):
        self.total, self.label, self.unit, self.initial, self.hide = total, label, unit, initial, hide
        self.count, self.detail = initial, ""
        self.start = time.perf_counter()
        self.next = self.start + FIRST_LINE

    def update(self, n: int = 1) -> None:
        self.count += n
        now = time.perf_counter()
        if now >= self.next and not self.hide and self.count != self.total:
            logger.info("%s", self.line(now - self.start))
            self.next = now + INTERVAL

    def line(self, seconds: float) -> str:
        from tqdm import tqdm

        rate, size = (self.count - self.initial) / seconds, tqdm.format_sizeof
        parts = [f"{size(self.count)} {self.unit}", self.detail, f"{size(rate)} {self.unit}/s"]
        if self.total is not None:
            total = size(self.total) if self.total >= 1000 else self.total
            parts[0] = f"{self.count / self.total:.0%} of {total} {self.unit}"
            parts.append(f"{timedelta(seconds=round((self.total - self.count) / rate))} left" if rate else "")
        return f"{self.label}: " + ", ".join(filter(None, parts))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.detail = text

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def hidden(*kinds: str) -> Iterator[None]:
    """Inside, no "bars", "lines" or both: what a caller reports in another way."""
    before = dict(_shown)
    hide(*kinds)
    try:
        yield
    finally:
        _shown.update(before)


def hide(*kinds: str) -> None:
    """As `hidden`, until the process ends."""
    _shown.update(dict.fromkeys(kinds, False))


def announce(message: str, *values: object) -> None:
    """Logs what begins now, where lines are shown."""
    if _shown["lines"]:
        logger.info(message, *values)
