"""Threads and cores: whether this process has more threads than cores, or shares them with other processes."""

import logging
import math
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)
INTERVAL = 60.0
"""Seconds between two looks."""
MAX_WAITING = 0.3
"""Share of the threads' time in which they wait for a core, above which a process is slowed down."""
MIN_SPEED = 0.5
"""Of the speed of the first minute."""
ADVICE = "set OMP_NUM_THREADS (docs/scale.md)"


def available_cores() -> int:
    """The cores that this process may use: its affinity, at most the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(float, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):  # no such file, or no quota: "max"
        return cores
    return max(1, min(cores, math.ceil(quota / period)))


def scheduled() -> tuple[int, int] | None:
    """Nanoseconds in which the threads of this process ran, and in which they waited for a core; None where the system
    does not tell."""
    times = []
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            times.append([int(word) for word in path.read_text().split()[:2]])
        except (OSError, ValueError):  # the thread has ended
            continue
    return (sum(run for run, _ in times), sum(wait for _, wait in times)) if times else None


class ThreadWatch:
    """Warns once in a process if its computing threads lack cores. Call `look` often."""

    warned = False

    def __init__(self, threads: int):
        self.threads, self.cores = threads, available_cores()
        if threads > self.cores:
            self.warn(f"{threads} threads on {self.cores} cores: {ADVICE} to at most {self.cores}")
        self.time, self.scheduled, self.count = time.monotonic(), scheduled(), 0.0
        self.first_speed: float | None = None

    def look(self, count: float) -> None:
        """count: work done so far, in any unit."""
        now = time.monotonic()
        if ThreadWatch.warned or now - self.time < INTERVAL:
            return
        speed, waiting = (count - self.count) / (now - self.time), self.waiting_share()
        self.first_speed = self.first_speed or speed
        self.time, self.scheduled, self.count = now, scheduled(), count
        if waiting > MAX_WAITING:
            fewer = max(1, round(self.threads * (1 - waiting)))
            advice = f"{ADVICE} to {fewer}" if fewer < self.threads else "stop some of them"
            text = f"{self.threads} threads wait {waiting:.0%} of the time for a core"
            self.warn(f"other processes use the cores too: {text}; {advice}")
        elif speed < MIN_SPEED * self.first_speed:
            drop = f"{speed / self.first_speed:.0%} of that of the first minute"
            self.warn(f"the speed has fallen to {drop}; if other processes run on this machine, {ADVICE}")

    def waiting_share(self) -> float:
        """The share of the time since the last look in which the threads waited for a core; without that of the system,
        the share of running processes that have no core."""
        before, after = self.scheduled, scheduled()
        if before is None or after is None:
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
            return max(0.0, 1 - self.cores / load) if load > self.cores + 1 else 0.0
        ran, waited = (max(0, new - old) for old, new in zip(before, after, strict=True))
        return waited / (ran + waited) if ran + waited else 0.0

    def warn(self, message: str) -> None:
        if not ThreadWatch.warned:
            logger.warning("%s", message)
        ThreadWatch.warned = True
