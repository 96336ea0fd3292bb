"""Allows one study at a time in a directory, by an operating system lock that is released when its process ends."""

import importlib
import logging
import os
import time
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from subquad.utils import UserError

logger = logging.getLogger(__name__)
TIMEOUT = 5.0
"""Seconds to wait for the workers of a killed study to exit."""


class StudyLock:
    """Locks `directory` for this process and for worker processes that receive the lock at their start. The lock is
    released when the last of these processes ends, even if it is killed.

    Raises:
        UserError: another study is running in `directory`.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / ".lock"
        self.fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not self._acquire():
            owner = path.read_text().strip() or "unknown"
            os.close(self.fd)
            raise UserError(
                f"output: another study (process {owner}) is running in {str(directory)!r}; wait until it ends, or use "
                "another directory"
            )
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)

    def _acquire(self) -> bool:
        try:
            fcntl: Any = importlib.import_module("fcntl")
        except ImportError:
            logger.warning("this system has no flock; make sure that only one study uses this directory")
            return True
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            except OSError as error:
                logger.warning(
                    "this file system has no locks (%s); make sure that only one study uses this directory",
                    error.strerror,
                )
                return True

    def __enter__(self) -> "StudyLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __getstate__(self) -> dict[str, Any]:
        # A worker process gets a duplicate, so the directory stays locked until the worker ends.
        assert self.fd is not None
        return {"fd": reduction.DupFd(self.fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fd = state["fd"].detach()
