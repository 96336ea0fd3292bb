"""How a stage is trained: batches, processes, precision, groups, low-rank updates, averages, held-out text, mishaps."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from subquad.config import load_recipe
from subquad.distill import trainer
from subquad.distill.pipeline import distill
from subquad.utils import UserError
from tests.workshop import tiny_recipe

STAGES = ("matrix", "hidden", "end_to_end")
SIZES = {"tokens": 512, "lr": 1e-3, "batch_size": 4}


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("run"), stages={name: dict(SIZES) for name in STAGES})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def only(stage, *more):
    """Overrides that leave one stage, with further ones for it."""
    return [f"stages.{name}=null" for name in STAGES if name != stage] + [f"stages.{stage}.{text}" for text in more]


def train(recipe_path, output, *overrides):
    distill(load_recipe(recipe_path, overrides), output)
    return load_file(output / "model.safetensors")


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_near(a, b, tolerance):
    assert a.keys() == b.keys()
    far = {k: (a[k] - b[k]).abs().max().item() for k in a if not torch.allclose(a[k], b[k], atol=tolerance, rtol=1e-4)}
    assert not far


def moved(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.fixture(scope="module")
def fresh(recipe_path, tmp_path_factory):
    """The weights before anything is taught."""
    import subquad

    os.environ["SUBQUAD_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    recipe = load_recipe(recipe_path)
    teacher, _ = subquad.load_teacher(recipe.teacher)
    return subquad.linearize(teacher, "gla").state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_same_in_one_piece_or_in_micro_batches(stage, recipe_path, tmp_path):
    whole = train(recipe_path, tmp_path / "whole", *only(stage))
    assert_near(whole, train(recipe_path, tmp_path / "micro", *only(stage, "micro_batch_size=1")), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES[:-1], pytest.param(STAGES[-1], marks=pytest.mark.sample)])
def test_two_processes_end_where_one_does(stage, recipe_path, tmp_path):
    """The same global batch over two gloo processes: every loss goes through the wrapped model's forward."""
    one = train(recipe_path, tmp_path / "one", *only(stage))
    output = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    command += ["-m", "subquad.cli", "distill", str(recipe_path), "--output", str(output)]
    for override in only(stage):
        command += ["--set", override]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_near(one, load_file(output / "model.safetensors"), 2e-5)


def test_too_many_processes_for_a_batch_are_refused():
    stage = load_stage(batch_size=4)
    assert trainer.rows_of_a_process(stage, 2) == (2, 2)
    with pytest.raises(UserError, match="batch_size: got 4, expected a multiple of the 3 processes"):
        trainer.rows_of_a_process(stage, 3)
    assert trainer.rows_of_a_process(load_stage(batch_size=8, micro_batch_size=2), 2) == (4, 2)


def load_stage(**values):
    from subquad.config import Hidden

    return Hidden(tokens=1, lr=1.0, **values)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_near_and_its_weights_stay_float32(stage, recipe_path, tmp_path):
    wide = train(recipe_path, tmp_path / "wide", *only(stage))
    narrow = train(recipe_path, tmp_path / "narrow", "precision=bfloat16", *only(stage))
    assert all(w.dtype == torch.float32 for w in narrow.values())
    assert moved(wide, narrow)
    last = metrics(tmp_path / "wide")[-1]["loss"], metrics(tmp_path / "narrow")[-1]["loss"]
    assert math.isclose(*last, rel_tol=0.05)


def test_frozen_groups_do_not_move_and_rates_are_their_own(recipe_path, tmp_path, fresh):
    frozen = [f"param_groups.{name}.frozen=true" for name in ("backbone", "embeddings", "attention_projections")]
    taught = train(recipe_path, tmp_path / "out", *only("end_to_end", *frozen))
    names = moved(taught, {k: v for k, v in fresh.items() if k in taught})
    assert names
    assert all(".mixer." in name and not any(f".{p}_proj" in name for p in "qkvo") for name in names)
    slow = train(recipe_path, tmp_path / "slow", *only("end_to_end", "param_groups.attention_projections.lr=1e-9"))
    q = next(name for name in slow if name.endswith("mixer.q_proj.weight"))
    assert 0 < (slow[q] - fresh[q]).abs().max() < 1e-7
    everything = [f"param_groups.{name}.frozen=true" for name in ("mixer", "attention_projections")]
    with pytest.raises(UserError, match="is frozen"):
        train(recipe_path, tmp_path / "nothing", *only("hidden", *everything))


def test_low_rank_updates_are_merged(recipe_path, tmp_path, fresh):
    taught = train(recipe_path, tmp_path / "out", *only("hidden", "lora={rank: 2, alpha: 4}"))
    assert taught.keys() <= fresh.keys()
    for name in taught:
        update = taught[name] - fresh[name]
        if any(name.endswith(f"{p}_proj.weight") for p in "qkvo"):
            assert 0 < torch.linalg.matrix_rank(update.double(), atol=1e-6) <= 2, name


def test_an_average_is_what_it_says_and_survives_an_interruption(recipe_path, tmp_path, monkeypatch):
    plain = train(recipe_path, tmp_path / "plain", *only("hidden"))
    averaged = train(recipe_path, tmp_path / "averaged", *only("hidden", "ema_decay=0.5"))
    assert moved(plain, averaged)
    end_of_step = trainer.Progress.on_step_end

    def stop(self, args, state, control, **kwargs):
        end_of_step(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Progress, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe_path, tmp_path / "cut", *only("hidden", "ema_decay=0.5"))
    again = train(recipe_path, tmp_path / "cut", *only("hidden", "ema_decay=0.5"))
    assert not moved(averaged, again)


def test_validation_loss_is_measured_and_the_best_weights_kept(recipe_path, tmp_path):
    """At a rate that ruins the student, the best weights are the first that were measured."""
    wild = ["lr=0.3", "lr_scheduler=constant", "warmup=0.0", "max_grad_norm=1e6"]
    sets = ["evaluation.eval_steps=1", "checkpoint.save_steps=1", "checkpoint.save_total_limit=9"]
    best = train(
        recipe_path, tmp_path / "best", *only("hidden", *wild), *sets, "evaluation.load_best_model_at_end=true"
    )
    last = train(recipe_path, tmp_path / "last", *only("hidden", *wild), *sets)
    losses = {m["step"]: m["validation_loss"] for m in metrics(tmp_path / "last") if "validation_loss" in m}
    assert len(losses) == 4
    assert min(losses, key=losses.get) != 4
    assert moved(best, last)
    assert (tmp_path / "best" / "loss.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(stage, recipe_path, tmp_path):
    wild = ["lr=1e30", "lr_scheduler=constant", "warmup=0.0", "max_grad_norm=1e30"]
    with pytest.raises(UserError, match=rf"stage {stage}, step [234]: the (loss|gradient) is not finite") as caught:
        train(recipe_path, tmp_path / "out", *only(stage, *wild), "checkpoint.save_steps=1")
    assert "layer" in str(caught.value)
    assert (tmp_path / "out" / "checkpoints" / stage / "checkpoint-1" / "model.safetensors").exists()


def test_the_whole_layer_may_be_what_is_compared(recipe_path, tmp_path, fresh):
    taught = train(recipe_path, tmp_path / "out", *only("hidden", "target=decoder_layer"))
    names = moved(taught, {k: v for k, v in fresh.items() if k in taught})
    assert any("mlp" in name for name in names)
    assert not any("embed" in name for name in names)
    rows = metrics(tmp_path / "out")
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    "text", ["divergence=reverse", "divergence=jsd", "data=teacher_generated", "gradient_checkpointing=true"]
)
def test_other_ways_to_the_end(text, recipe_path, tmp_path):
    taught = train(recipe_path, tmp_path / "out", *only("end_to_end", text, "ce_weight=0"))
    plain = train(recipe_path, tmp_path / "plain", *only("end_to_end", "ce_weight=0"))
    assert bool(moved(taught, plain)) == (text != "gradient_checkpointing=true")
    if text == "data=teacher_generated":
        again = train(recipe_path, tmp_path / "again", *only("end_to_end", text, "ce_weight=0"))
        assert not moved(taught, again)


def test_warm_up_stable_decay(recipe_path, tmp_path):
    train(
        recipe_path, tmp_path / "out", *only("hidden", "lr_scheduler=wsd", "warmup=0.25", "decay=0.25", "tokens=1024")
    )
    rates = [m["lr"] for m in metrics(tmp_path / "out")]
    assert len(rates) == 8
    assert rates[0] < rates[2] == rates[3] == rates[4] == 1e-3
    assert rates[-1] < 1e-3


def test_a_plan_of_layers_is_taught(recipe_path, tmp_path):
    row = distill(load_recipe(recipe_path, ["student.layer_types={default: gla, '1': attention}"]), tmp_path / "out")
    assert row["mixer"] == "hybrid"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [layer["mixer"] for layer in config["layer_specs"]] == ["gla", "attention"]
