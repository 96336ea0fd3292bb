"""One study at a time in a directory: the operating system's own lock on a file, which a killed process cannot keep."""

import importlib
import logging
import os
import time
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from subquad.utils import UserError

logger = logging.getLogger(__name__)
PATIENCE = 5.0
"""Seconds that the workers of a study that was killed have to notice it."""


class StudyLock:
    """Holds `directory` for this process and for those to which the lock is handed at their start; it is free again
    when the last of them has ended, however it ended.

    Raises:
        UserError: another study is at work there.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / ".lock"
        self.fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not self._take():
            holder = path.read_text().strip() or "unknown"
            os.close(self.fd)
            raise UserError(
                f"another study is at work in {str(directory)!r} (process {holder}); wait for its end, or choose "
                "another directory"
            )
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)

    def _take(self) -> bool:
        try:
            fcntl: Any = importlib.import_module("fcntl")
        except ImportError:
            logger.warning("this system has no flock; nothing keeps a second study from this directory")
            return True
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            except OSError as error:
                logger.warning("this file system has no locks (%s); see to it that one study runs here", error.strerror)
                return True

    def __enter__(self) -> "StudyLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __getstate__(self) -> dict[str, Any]:
        # A worker that outlives its study for a moment still holds the directory.
        assert self.fd is not None
        return {"fd": reduction.DupFd(self.fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fd = state["fd"].detach()
