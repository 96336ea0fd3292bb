"""Stages that several runs of a study begin with: trained once, kept, and put in place in every other run.

Two runs have a stage in common where their recipes are the same up to its end and their rows come in the same order:
then the student behind it is the same to the bit, whoever trained it.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from subquad.config import Recipe
from subquad.distill.progress import read_jsonl
from subquad.utils import write_text_atomic

ORDER = ("matrix", "hidden", "end_to_end")


def stage_key(recipe: Recipe, name: str, epoch_tokens: int) -> str:
    """Of everything that decides the student behind a stage: the recipe without later stages, and the tokens of an
    epoch, on which the order of the rows depends."""
    tree = recipe.model_dump(mode="json")
    for later in ORDER[ORDER.index(name) + 1 :]:
        tree["stages"][later] = None
    text = json.dumps([tree, epoch_tokens], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class StageCache:
    """A directory of finished stages, one below each key.

    wanted: the keys that are worth keeping, since several runs have them.
    """

    directory: Path
    wanted: frozenset[str]

    @classmethod
    def among(cls, directory: Path, keys: Iterable[Iterable[str]]) -> "StageCache":
        """Of runs with these keys: what more than one of them has."""
        counts = Counter(key for own in keys for key in own)
        return cls(directory, frozenset(key for key, count in counts.items() if count > 1))

    def has(self, key: str) -> bool:
        return (self.directory / key).is_dir()

    def save(self, key: str, name: str, output: Path) -> None:
        """Keeps the stage `name` that the run in `output` has just finished, whole or not at all."""
        if key not in self.wanted or self.has(key):
            return
        work = self.directory / f"{key}-{os.getpid()}.part"
        shutil.rmtree(work, ignore_errors=True)
        copy_tree(output / "checkpoints" / f"{name}-done", work / "student")
        shutil.copy(output / "checkpoints" / "initial.json", work)
        upto = ORDER[: ORDER.index(name) + 1]
        write_lines(work / "metrics.jsonl", [r for r in read_jsonl(output / "metrics.jsonl") if r["stage"] in upto])
        try:
            work.rename(self.directory / key)
        except OSError:  # another run has just kept the same
            shutil.rmtree(work, ignore_errors=True)

    def restore(self, keys: dict[str, str], output: Path) -> None:
        """Puts the furthest stage that is kept (`keys`: of the run's stages by name, in order) into the run in
        `output`, unless that has come as far by itself."""
        checkpoints = output / "checkpoints"
        for name, key in reversed(keys.items()):
            if (checkpoints / f"{name}-done").exists():
                return
            if self.has(key):
                break
        else:
            return
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.directory / key / "initial.json", checkpoints)
        write_lines(output / "metrics.jsonl", read_jsonl(self.directory / key / "metrics.jsonl"))
        work = checkpoints / f"{name}-done.part"
        shutil.rmtree(work, ignore_errors=True)
        copy_tree(self.directory / key / "student", work)
        work.rename(checkpoints / f"{name}-done")
        for earlier in ORDER[: ORDER.index(name) + 1]:
            shutil.rmtree(checkpoints / earlier, ignore_errors=True)

    def prune(self, needed: Iterable[str]) -> None:
        """Removes what no unfinished run needs, and what a kill left half written."""
        if not self.directory.is_dir():
            return
        kept = set(needed)
        for path in self.directory.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def copy_tree(source: Path, target: Path) -> None:
    """Files are shared with the copy, where the file system can: nothing writes into a finished stage."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link)
