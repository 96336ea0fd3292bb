"""Processes that encode batches of documents, in order.

Not `multiprocessing`: forked, a process with threads (torch's, the tokenizer's) may hang; spawned, it runs the user's
script once more. These are Python processes of their own that read from a pipe and end with it, however their parent
ends. Knows nothing of tokens. Free of torch.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from subquad.utils import UserError

MOST = 16
"""Processes; beyond them, the one that reads is what all wait for."""
BOOT = """
import sys, types
# The packages without what their __init__ imports: torch would cost each process seconds and hundreds of megabytes.
for name, path in {packages!r}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from subquad.data.workers import serve
serve()
"""


class _Encodes(Protocol):
    def encode(self, batch: Any) -> Any: ...


def processors() -> int:
    """How many processes are of use here."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MOST)


class Workers:
    """`jobs` processes with a copy of `encoder` each; a context."""

    def __init__(self, encoder: _Encodes, jobs: int):
        self._encoder = pickle.dumps(encoder)
        here = Path(__file__).parent
        boot = BOOT.format(packages={"subquad": str(here.parent), "subquad.data": str(here)})
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # each has one processor
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._processes = [
            # A group of their own, so that Ctrl-C is their parent's to handle.
            subprocess.Popen(
                [sys.executable, "-c", boot],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,
            )
            for _ in range(jobs)
        ]
        self._fresh = set(self._processes)
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(jobs)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.wait()
        self._threads.shutdown()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """`encoder.encode` of each batch, in order; few batches are read ahead."""
        pending: deque[Future] = deque()
        for batch in batches:
            pending.append(self._threads.submit(self._encode, batch))
            if len(pending) == 2 * len(self._processes):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, batch: Any) -> Any:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process in self._fresh:
                self._fresh.discard(process)
                process.stdin.write(self._encoder)
            pickle.dump(batch, process.stdin)
            process.stdin.flush()
            value = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise RuntimeError(f"a process that tokenises ended by itself (status {process.wait()})") from None
        finally:
            self._idle.put(process)
        if isinstance(value, Exception):
            raise value
        return value


def serve() -> None:
    """What a process does: an encoder first, then batches from stdin, what comes out of each to stdout."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    encoder: _Encodes = pickle.load(sys.stdin.buffer)
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = encoder.encode(batch)
        except UserError as error:
            answer = error
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        pickle.dump(answer, out)
        out.flush()
