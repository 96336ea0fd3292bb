"""Worker processes that encode batches of documents in order. Imports no torch.

`multiprocessing` is not used: a forked process with threads (torch's, the tokenizer's) may hang, and a spawned one runs
the user's script again. These are plain Python processes that read from a pipe and exit when it closes, however their
parent exits.
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

MAX_WORKERS = 16
"""With more workers, reading is the bottleneck."""
BOOT = """
import sys, types
# Empty packages in place of those whose __init__ imports torch, which costs seconds and hundreds of megabytes.
for name, path in {packages!r}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from subquad.data.workers import serve
serve()
"""


class _Encoder(Protocol):
    def encode(self, batch: Any) -> Any: ...


def usable_processors() -> int:
    """The number of useful worker processes on this machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MAX_WORKERS)


class Workers:
    """A context with `jobs` processes, each with a copy of `encoder`."""

    def __init__(self, encoder: _Encoder, jobs: int):
        self._encoder = pickle.dumps(encoder)
        directory = Path(__file__).parent
        boot = BOOT.format(packages={"subquad": str(directory.parent), "subquad.data": str(directory)})
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # one processor per worker
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._processes = [
            # A process group of their own, so that only the parent handles Ctrl-C.
            subprocess.Popen(
                [sys.executable, "-c", boot],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,
            )
            for _ in range(jobs)
        ]
        self._without_encoder = set(self._processes)
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
        """`encoder.encode` of each batch, in order; reads at most two batches per process ahead."""
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
            if process in self._without_encoder:
                self._without_encoder.discard(process)
                process.stdin.write(self._encoder)
            pickle.dump(batch, process.stdin)
            process.stdin.flush()
            value = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise RuntimeError(f"a tokenizing process exited with status {process.wait()}") from None
        finally:
            self._idle.put(process)
        if isinstance(value, Exception):
            raise value
        return value


def serve() -> None:
    """Runs in a worker: reads an encoder and then batches from stdin, and writes each result or exception to stdout."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the results
    encoder: _Encoder = pickle.load(sys.stdin.buffer)
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: Any = encoder.encode(batch)
        except UserError as error:
            result = error
        except Exception:
            result = RuntimeError(traceback.format_exc())
        pickle.dump(result, out)
        out.flush()
