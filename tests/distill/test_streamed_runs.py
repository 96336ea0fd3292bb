"""Runs on streamed text: interrupted and resumed, with the same end as without an interruption."""

import json

import pytest
import torch
from safetensors.torch import load_file

from subquad.config import load_recipe
from subquad.data.packing import MixtureSchedule
from subquad.data.streaming import SourceStream
from subquad.distill import trainer
from subquad.distill.pipeline import distill
from subquad.distill.recipe_stages import STAGE_NAMES, StageCache, stage_keys
from subquad.utils import UserError
from tests.helpers.recipes import sentences, tiny_recipe
from tests.helpers.stage_runs import Case, train, train_in_processes

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    """Two sources, whose blocks of 5 rows do not end with steps, stages or checkpoints."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "shards").mkdir()
    for k in range(3):
        lines = [json.dumps({"text": sentences(5, 1000 * k + i)}) + "\n" for i in range(100)]
        (directory / "shards" / f"{k}.jsonl").write_text("".join(lines))
    mixture = {str(directory / "shards"): 0.7, str(directory / "text.txt"): 0.3}
    stages = {name: {"tokens": 8 * 4 * 32, "lr": 1e-3, "batch_size": 4, "micro_batch_size": 2} for name in STAGE_NAMES}
    data = {"source": mixture, "seq_len": 32, "shuffle_buffer": 5}
    return tiny_recipe(directory, data=data, stages=stages, checkpoint={"save_steps": 3})


@pytest.fixture(scope="module")
def uninterrupted(recipe_path, own_cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "uninterrupted"
    distill(load_recipe(recipe_path), output)
    return output


def same_weights(a, b):
    one, two = (load_file(path / "model.safetensors") for path in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stop_at", [("hidden", 2), ("end_to_end", 7)])
def test_interrupted_run_ends_bitwise_the_same(stop_at, uninterrupted, recipe_path, tmp_path, monkeypatch):
    """In a stage before and after its first checkpoint; the text before it is not read again."""
    end_of_step = trainer.MetricsCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        end_of_step(self, args, state, control, **kwargs)
        if (self.stage, state.global_step) == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(load_recipe(recipe_path), tmp_path / "run")
    blocks, read = [], SourceStream._read_block

    def note(self):
        read(self)
        blocks.append((self.source.name, self.block))

    monkeypatch.setattr(SourceStream, "_read_block", note)
    distill(load_recipe(recipe_path), tmp_path / "run")
    assert same_weights(tmp_path / "run", uninterrupted)
    done = 32 * STAGE_NAMES.index(stop_at[0]) + 4 * (stop_at[1] // 3 * 3)
    assert (
        min(block for name, block in blocks if name.endswith("shards")) == MixtureSchedule([7, 3]).count(0, done) // 5
    )


@pytest.mark.slow
def test_stages_of_a_study_are_shared(uninterrupted, recipe_path, tmp_path):
    """A run that takes its first stages from another one continues the text where they end."""
    recipe = load_recipe(recipe_path)
    keys = stage_keys(recipe)
    cache = StageCache(tmp_path / "cache", frozenset(list(keys.values())[:2]))
    distill(recipe, tmp_path / "first", stage_cache=cache)
    distill(recipe, tmp_path / "second", stage_cache=cache)
    assert cache.has(keys["hidden"])
    assert same_weights(tmp_path / "second", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.sample), "fsdp"])
def test_two_processes_are_resumed(parallel, recipe_path, tmp_path):
    """Interrupted within a stage, in its first steps, and after it; then refused in one process."""
    overrides = ["stages.matrix=null", "data.shuffle_buffer=3"]
    cases = {
        name: [Case(str(recipe_path), overrides, str(tmp_path / name), parallel, stop) for stop in stops]
        for name, stops in {"whole": [None], "cut": [5, None], "twice": [4, 7, None], "other": [5]}.items()
    }
    train_in_processes([case for runs in cases.values() for case in runs], tmp_path)
    whole, cut, twice = (cases[name][-1].result()["weights"] for name in ("whole", "cut", "twice"))
    for again in (cut, twice):
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(UserError, match="got 1 processes for a run that was started with 2"):
        train(cases["other"][0]._replace(parallel="ddp"))
