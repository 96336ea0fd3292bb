"""The stages of a recipe: their order, steps and tokens; and the finished stages that several runs of a study share,
which are trained once, then copied into every other run."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from subquad.config import Recipe, Stage, Stages
from subquad.evaluate.perplexity import UNIGRAM_TOKENS
from subquad.registry import STAGES

STAGE_NAMES = tuple(Stages.model_fields)
"""The built-in stages, in the order in which they run."""


def recipe_stages(recipe: Recipe) -> dict[str, Stage]:
    """The stages that a recipe has, by name, in the order in which they run."""

    def position(name: str) -> tuple[float, str]:
        return STAGE_NAMES.index(name) + 1 if name in STAGE_NAMES else STAGES[name].position, name

    stages = {name: stage for name, stage in recipe.stages if stage is not None}
    return {name: stages[name] for name in sorted(stages, key=position)}


def total_steps(stage: Stage, seq_len: int) -> int:
    return math.ceil(stage.tokens / (stage.batch_size * seq_len))


def stage_rows(recipe: Recipe) -> dict[str, int]:
    """The number of rows on which each stage trains, a multiple of its batch size."""
    seq_len = recipe.data.seq_len
    return {name: total_steps(stage, seq_len) * stage.batch_size for name, stage in recipe_stages(recipe).items()}


def stage_tokens(recipe: Recipe) -> dict[str, int]:
    """The number of tokens on which each stage trains, in whole steps."""
    return {name: rows * recipe.data.seq_len for name, rows in stage_rows(recipe).items()}


def epoch_tokens(recipe: Recipe) -> int:
    """Upper limit of the tokens in an epoch: a run reads no more of the text than this."""
    return max(UNIGRAM_TOKENS, sum(stage_tokens(recipe).values()))


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """The key of each stage. Two runs whose keys are equal have bitwise equal students after that stage.

    A key is a hash of the recipe without later stages and of `epoch_tokens`, on which the order of the rows depends.
    """
    tree = recipe.without_defaults()
    keys = {}
    for name in reversed(recipe_stages(recipe)):
        text = json.dumps([tree, epoch_tokens(recipe)], sort_keys=True)
        keys[name] = hashlib.sha256(text.encode()).hexdigest()[:24]
        del tree["stages"][name]
    return dict(reversed(keys.items()))


@dataclass(frozen=True)
class StageCache:
    """A directory of finished stages, a subdirectory for each of the keys that several runs have (`stage_keys`)."""

    directory: Path
    shared_keys: frozenset[str]

    def has(self, key: str) -> bool:
        return (self.directory / key).is_dir()

    def save(self, key: str, finished: Path) -> None:
        """Stores a finished stage, the directory `NAME-done` of a run, if its key is shared."""
        if key in self.shared_keys and not self.has(key):
            copy_tree(finished, self.directory / key)

    def restore(self, keys: dict[str, str], run_directory: Path) -> None:
        """Copies the last stored stage of a run into its directory, unless the run has finished that stage itself.
        `keys` are those of the run's stages by name, in order."""
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
        for path in {*self.directory.iterdir()} - {self.directory / key for key in needed}:
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
