"""Directories that are whole or not used: each file's size and CRC-32 in `checksums.json`, written last."""

import json
import logging
import shutil
import zlib
from pathlib import Path

from accelerate import PartialState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from subquad.utils import write_json_atomic

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
READ_AT_ONCE = 2**22


def seal(directory: Path) -> None:
    """Writes the checksums of all files in `directory`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    write_json_atomic(directory / CHECKSUMS, {str(path.relative_to(directory)): checksum(path) for path in files})


def checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while data := file.read(READ_AT_ONCE):
            crc, size = zlib.crc32(data, crc), size + len(data)
    return [size, crc]


def damage(directory: Path, mark: str) -> str | None:
    """What is wrong with a directory; None: nothing.

    mark: the file that was written before the checksums. Earlier versions wrote no checksums.
    """
    try:
        json.loads((directory / mark).read_text())
        sealed = directory / CHECKSUMS
        for name, expected in json.loads(sealed.read_text()).items() if sealed.exists() else ():
            if checksum(directory / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{mark} or {CHECKSUMS} cannot be read: {error}"
    return None


def discard_damaged(directory: Path, mark: str) -> bool:
    """Whether a directory is whole. A damaged one, which a kill or a disk left, is removed with a warning."""
    if (problem := damage(directory, mark)) is None:
        return True
    logger.warning("%s is damaged (%s); what was saved before it is used", directory, problem)
    shutil.rmtree(directory)
    return False


def newest_checkpoint(directory: Path) -> str | None:
    """The newest whole checkpoint of a stage."""
    with PartialState().main_process_first():
        while directory.is_dir() and (path := get_last_checkpoint(directory)) is not None:
            if discard_damaged(Path(path), TRAINER_STATE_NAME):
                return path
    return None
