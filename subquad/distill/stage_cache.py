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

from subquad.distill.logging_callbacks import read_jsonl, write_jsonl


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

    def save(self, keys: dict[str, str], name: str, run_directory: Path) -> None:
        """Stores the finished stage `name` of a run if its key is shared, completely or not at all.

        keys: of the run's stages by name, in order.
        """
        key, stages = keys[name], list(keys)[: list(keys).index(name) + 1]
        if key not in self.shared_keys or self.has(key):
            return
        partial = self.directory / f"{key}-{os.getpid()}.part"
        shutil.rmtree(partial, ignore_errors=True)
        link_tree(run_directory / "checkpoints" / f"{name}-done", partial / "student")
        shutil.copy(run_directory / "checkpoints" / "initial.json", partial)
        metrics = read_jsonl(run_directory / "metrics.jsonl")
        write_jsonl(partial / "metrics.jsonl", [record for record in metrics if record["stage"] in stages])
        try:
            partial.rename(self.directory / key)
        except OSError:  # another run has stored the same stage
            shutil.rmtree(partial, ignore_errors=True)

    def restore(self, keys: dict[str, str], run_directory: Path) -> None:
        """Copies the last stored stage of a run into its directory, unless the run has finished that stage itself.

        keys: of the run's stages by name, in order.
        """
        checkpoints = run_directory / "checkpoints"
        for name, key in reversed(keys.items()):
            if (checkpoints / f"{name}-done").exists():
                return
            if self.has(key):
                break
        else:
            return
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.directory / key / "initial.json", checkpoints)
        write_jsonl(run_directory / "metrics.jsonl", read_jsonl(self.directory / key / "metrics.jsonl"))
        partial = checkpoints / f"{name}-done.part"
        shutil.rmtree(partial, ignore_errors=True)
        link_tree(self.directory / key / "student", partial)
        partial.rename(checkpoints / f"{name}-done")
        for stage in list(keys)[: list(keys).index(name) + 1]:
            shutil.rmtree(checkpoints / stage, ignore_errors=True)

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


def link_tree(source: Path, target: Path) -> None:
    """Copies a directory by hard links if the file system has them: nothing writes into a finished stage."""

    def link(source_file: str, target_file: str) -> None:
        try:
            os.link(source_file, target_file)
        except OSError:
            shutil.copy2(source_file, target_file)

    shutil.copytree(source, target, copy_function=link)
