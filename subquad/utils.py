"""What every package here uses: user-facing errors, the cache directory, run info, files, locks, modes, a divergence.

Imports no torch, so that commands which need none start at once.
"""

import difflib
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, device, nn

logger = logging.getLogger(__name__)
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn at import about optional parts they lack; `transformers` imports torchao where it is installed."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for a killed process to exit."""


class UserError(ValueError):
    """An error that the user can fix: an unknown name, a missing file, an invalid value.

    The message has one line for each problem. A line says what was wrong and what was expected, with the nearest valid
    name where there is one. The command line prints it on stderr without a traceback and exits with code 2.
    """

    def __init__(self, *problems: object):
        self.problems = tuple(" ".join(str(problem).split()) for problem in problems)
        super().__init__("\n".join(self.problems))


def nearest(name: object, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'gla'?`, or all valid names where none is close."""
    names = list(valid)
    # Matching ignores case; of two equally close names the first given wins.
    folded = {n.casefold(): n for n in reversed(names)}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; expected one of {', '.join(names)}" if names else ""


def nearest_path(path: str) -> str:
    """The end of a message about a path that does not exist: `; did you mean 'demo/gla'?`, or nothing where no file or
    directory has a similar name."""
    found = Path()
    for part in Path(path).expanduser().parts:
        if not (found / part).exists():
            names = sorted(entry.name for entry in found.iterdir()) if found.is_dir() else []
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
            if not close:
                return ""
            found /= close[0]
        else:
            found /= part
    return f"; did you mean {str(found)!r}?"


def check_directory(path: str | os.PathLike) -> None:
    """Raises UserError, with the nearest existing path, if there is nothing at `path`."""
    if not Path(path).expanduser().exists():
        raise UserError(f"{os.fspath(path)!r}: no such directory{nearest_path(os.fspath(path))}")


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """For the imports in its block: UserError that names the extra of this package where a module is missing.

    A directory of a module's name, which Python imports as an empty package, counts as missing."""
    try:
        yield
    except ImportError as error:
        if error.path is not None:  # the module was found and is broken
            raise
        raise UserError(f"{what} needs {error.name}, which is missing; {install_command(extra)}") from None


def install_command(extra: str) -> str:
    """How to install an extra of this package, which no index has yet."""
    return f'pip install ".[{extra}]" in a clone of Subquad'


def is_first_process() -> bool:
    """Whether this process is the first, or the only one, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def cache_dir() -> Path:
    """`$SUBQUAD_CACHE`, else `subquad` in the user's cache directory."""
    chosen = os.environ.get("SUBQUAD_CACHE")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "subquad")).expanduser()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the CPU or another device, which no model and no file is to blame
    for."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)  # type: ignore[arg-type]


@contextmanager
def as_user_error(failure: str, of_cause: bool = False) -> Iterator[None]:
    """UserError, `failure` and the first line of the error (or of its cause, if there is one), where its block fails.
    A UserError and a lack of memory are raised as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = (of_cause and error.__cause__) or error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(f"{failure}: {lines[0]}") from error


def device_name(device: "device | None" = None) -> str:
    """The name of the GPU, or the number of the CPU's threads. device: None: the GPU if there is one."""
    import torch

    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"


def run_info(device: "device | None" = None) -> dict[str, Any]:
    """The header of every result file: package versions, commit, and device (None: the GPU if there is one)."""
    import torch
    import transformers

    import subquad

    versions = {package.__name__: package.__version__ for package in (subquad, torch, transformers)}
    return {
        "versions": {**versions, "python": platform.python_version()},
        "commit": git_commit(),
        "device": device_name(device),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from; None where it is installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def probe_output(option: str, path: Path) -> None:
    """Raises UserError, before any work is done, unless the directory `path` can be made and written."""
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".subquad-{os.getpid()}"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option}: {str(path)!r} cannot be written: {error.strerror}") from error
    finally:
        for directory in made:
            with suppress(OSError):
                directory.rmdir()


@contextmanager
def saving(directory: Path, what: str, remove: bool = True) -> Iterator[None]:
    """For the writes in its block. remove: what is half written is removed, so that what was saved before is used.

    Raises:
        UserError: the disk is full or fails. The message has the path, the free space and the reason.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError for a full disk
        if remove:
            shutil.rmtree(directory, ignore_errors=True)
        free = shutil.disk_usage(next(path for path in directory.absolute().parents if path.exists())).free
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{directory}: {what} cannot be saved ({free / 1e6:,.0f} MB are free; {reason}); make space and repeat the "
            "command"
        ) from error


@contextmanager
def exclusive(lock: Path, what: str, directory: Path) -> Iterator[None]:
    """Allows one `what` (a study, a run) at a time in `directory`: `lock` is held until the block or the process ends,
    even by a kill.

    Raises:
        UserError: another process holds it.
    """
    from filelock import Timeout

    owner = lock.with_name(lock.name.removesuffix(".lock") + ".owner")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = acquire(lock, LOCK_TIMEOUT)
    except Timeout:
        process = owner.read_text().strip() if owner.exists() else "unknown"
        raise UserError(
            f"output: another {what} (process {process}) is running in {str(directory)!r}; wait until it ends, or use "
            "another directory"
        ) from None
    with held:
        with suppress(OSError):
            owner.write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            with suppress(OSError):
                owner.unlink()


def lock_of(directory: Path) -> Path:
    """The lock of a run, beside its directory, which holds nothing else than the student at the end."""
    resolved = directory.resolve()
    return resolved.with_name(f".{resolved.name}.lock")


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)


def acquire(path: Path, timeout: float = -1) -> AbstractContextManager[object]:
    """Locks `path` until the end of a `with` block; Timeout if another process keeps it for `timeout` seconds."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(path).acquire(timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        logger.warning("%s: this file system has no locks (%s); make sure that one process uses it", path, error)
        return nullcontext()


def tensor_digest(tensors: "Iterable[Tensor]") -> str:
    """SHA-256 of the bytes of all tensors in order."""
    import torch

    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def eval_mode(model: "nn.Module") -> Iterator[None]:
    """Puts `model` into evaluation mode; on exit, every module returns to the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def kl_divergence(p: "Tensor", log_p: "Tensor", log_q: "Tensor") -> "Tensor":
    """KL(p || q) in nats, `[...]`, from p and both logarithms, `[..., vocab]`. A token with probability 0 in p adds 0,
    also where it has probability 0 in q."""
    return (p * (log_p - log_q)).masked_fill_(log_p == -math.inf, 0).sum(-1)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides the import-time warnings of `NOISY_LOGGERS`; restores their levels on exit."""
    levels = {logger: logger.level for logger in map(logging.getLogger, NOISY_LOGGERS)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def quiet_libraries() -> None:
    """Limits the log output of other libraries to errors. Call it before they are used."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
