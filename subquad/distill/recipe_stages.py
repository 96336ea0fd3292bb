"""The stages of a recipe: their order, steps and tokens, and the keys by which runs share finished stages."""

import hashlib
import json
import math

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
