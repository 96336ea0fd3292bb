"""Finished stages that several runs of a study share: trained once, then copied into every other run.

Two runs share a stage if their recipes are equal up to its end and their rows come in the same order
(`recipe_stages.stage_keys`). The student after that stage is then bitwise the same, whichever run trained it.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageCache:
    """A directory of finished stages, a subdirectory for each key.

    shared_keys: the keys of stages that several runs have; only these are stored.
    """

    directory: Path
    shared_keys: frozenset[str]

    @classmethod
    def for_runs(cls, directory: Path, keys: Iterable[Iterable[str]]) -> "StageCache":
        """keys: of the stages of each run."""
        counts = Counter(key for run_keys in keys for key in run_keys)
        return cls(directory, frozenset(key for key, count in counts.items() if count > 1))

    def has(self, key: str) -> bool:
        return (self.directory / key).is_dir()

    def save(self, key: str, finished: Path) -> None:
        """Stores a finished stage, the directory `NAME-done` of a run, if its key is shared."""
        if key in self.shared_keys and not self.has(key):
            copy_tree(finished, self.directory / key)

    def restore(self, keys: dict[str, str], run_directory: Path) -> None:
        """Copies the last stored stage of a run into its directory, unless the run has finished that stage itself.

        keys: of the run's stages by name, in order.
        """
        checkpoints = run_directory / "checkpoints"
        for name, key in reversed(keys.items()):
            finished = checkpoints / f"{name}-done"
            if finished.exists():
                return
            if self.has(key):
                checkpoints.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.directory / key / "initial.json", checkpoints)
                shutil.copy(self.directory / key / "metrics.jsonl", run_directory)
                copy_tree(self.directory / key, finished)
                return

    def prune(self, needed: Iterable[str]) -> None:
        """Removes every stage whose key is not in `needed`, and stages that a killed process left incomplete."""
        if not self.directory.is_dir():
            return
        keys = set(needed)
        for path in self.directory.iterdir():
            if path.name not in keys:
                shutil.rmtree(path, ignore_errors=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()


def copy_tree(source: Path, target: Path) -> None:
    """Copies a directory, completely or not at all, by hard links if the file system has them: nothing writes into a
    finished stage. Does nothing if another process has made the copy meanwhile."""
    partial = target.with_name(f"{target.name}-{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
