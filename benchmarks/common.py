"""What the benchmarks share: options, interleaved timing, peak memory, and a description of the machine."""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from subquad.utils import UserError

ROOT = Path(__file__).parents[1]
Call = Callable[[], object]


class Parser(argparse.ArgumentParser):
    """Shows a module's docstring as its help. Raises `UserError` for invalid options."""

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(f"benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run_as_script(main: Callable[[], int]) -> NoReturn:
    """Exits with the code of `main`, or with 2 and one line on stderr for a `UserError`."""
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"got {value}, expected more than 0")
    return value


def output_file(text: str) -> Path:
    """An option's path of a new file; its directory must exist, so that a run does not fail when it is finished."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the directory of {text!r} does not exist; expected a file in one that does")
    return path


def write_json(path: Path | None, results: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def time_interleaved(calls: dict[str, Call], samples: int = 9, seconds: float = 30.0) -> dict[str, list[float]]:
    """Milliseconds of each call. The calls alternate until each has its samples or the time is over (at least three).

    The first round is a warm-up and is not counted.
    """
    times = {name: [_milliseconds(call)] for name, call in calls.items()}
    # A call that takes longer than all others together keeps the time of its warm-up.
    quick = [name for name in calls if times[name][0] < 1e3 * seconds / 10]
    start, order = time.perf_counter(), random.Random(0)
    for name in quick:
        times[name].clear()
    for i in range(samples):
        # In random order, since a call after one with large tensors finds cold caches and returned pages.
        for name in order.sample(quick, len(quick)):
            times[name].append(_milliseconds(calls[name]))
        if i >= 2 and time.perf_counter() - start > seconds:
            break
    return times


def _milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes.

    On Linux it is read from /proc, since `ru_maxrss` starts at the resident size of the parent process.
    """
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, str | int]:
    """Processor, threads and versions of this machine."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_words(description: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in description.items())


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (header, *cells)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)
