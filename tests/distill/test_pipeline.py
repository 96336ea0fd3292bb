"""A whole run on a tiny teacher: its files, what continues it, what it refuses, and that a kill costs nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from subquad import mixers
from subquad.config import load_recipe
from subquad.distill import pipeline, trainer
from subquad.distill.pipeline import distill
from subquad.distill.progress import read_jsonl
from subquad.utils import UserError
from tests.workshop import tiny_recipe


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def undisturbed(recipe_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "undisturbed"
    os.environ["SUBQUAD_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    row = distill(load_recipe(recipe_path), output)
    return output, row


def weights(output):
    return load_file(output / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_output_is_a_loadable_student_with_its_papers(undisturbed, recipe_path):
    output, row = undisturbed
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("The red fox", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert load_recipe(output / "recipe.yaml") == load_recipe(recipe_path)
    result = json.loads((output / "result.json").read_text())
    assert result["row"] == row
    assert {"subquad", "torch", "transformers", "python"} <= result["versions"].keys()
    assert result["device"]
    assert not (output / "checkpoints").exists()
    assert 0 < row["perplexity"] < 400
    assert row["tokens"] == 512 + 768 + 768
    assert row["kl"] < row["kl_at_init"]
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [m["stage"] for m in metrics] == sorted((m["stage"] for m in metrics), key=pipeline.ORDER.index)
    assert [m["step"] for m in metrics if m["stage"] == "hidden"] == list(range(1, 13))
    assert all(m["tokens"] == m["step"] * 64 and m["tokens_per_second"] > 0 for m in metrics)


def test_a_finished_run_is_not_repeated(undisturbed, recipe_path, monkeypatch):
    output, row = undisturbed
    monkeypatch.setattr(pipeline, "load_teacher", lambda *a: pytest.fail("loaded a teacher for a finished run"))
    assert distill(load_recipe(recipe_path), output) == row


def test_one_seed_one_result(undisturbed, recipe_path, tmp_path):
    distill(load_recipe(recipe_path), tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(undisturbed[0]))
    distill(load_recipe(recipe_path, ["seed=1"]), tmp_path / "other")
    assert not same(weights(tmp_path / "other"), weights(undisturbed[0]))


@pytest.mark.parametrize("stop_at", [("matrix", 2), ("matrix", 7), ("hidden", 1), ("hidden", 11), ("end_to_end", 4)])
def test_an_interrupted_run_ends_bitwise_the_same(stop_at, undisturbed, recipe_path, tmp_path, monkeypatch):
    """Stopped behind a step of a stage, with a checkpoint every 3 steps, and run again."""
    output = tmp_path / "interrupted"
    end_of_step = trainer.Progress.on_step_end

    def stop(self, args, state, control, **kwargs):
        end_of_step(self, args, state, control, **kwargs)
        if self.label.endswith(stop_at[0]) and state.global_step == stop_at[1]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Progress, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(load_recipe(recipe_path), output)
    assert not (output / "result.json").exists()
    repeated = []
    begin = trainer.Progress.on_train_begin

    def count(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        repeated.append((self.label.split()[-1], state.global_step))

    monkeypatch.setattr(trainer.Progress, "on_train_begin", count)
    distill(load_recipe(recipe_path), output)
    assert repeated[0] == (stop_at[0], stop_at[1] // 3 * 3)
    assert same(weights(output), weights(undisturbed[0]))
    steps = [(m["stage"], m["step"]) for m in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())]
    assert len(steps) == len(set(steps)) == 8 + 12 + 12


def test_a_checkpoint_cut_off_by_a_kill_is_not_used(tmp_path):
    whole, cut, empty = (tmp_path / f"checkpoint-{n}" for n in (3, 6, 9))
    for path in (whole, cut, empty):
        path.mkdir()
    (whole / "trainer_state.json").write_text('{"global_step": 3}')
    (cut / "trainer_state.json").write_text('{"global_step": 6, "log_hist')
    assert trainer.newest_checkpoint(tmp_path) == whole
    assert not cut.exists()
    assert not empty.exists()
    assert trainer.newest_checkpoint(tmp_path / "nothing") is None


def test_another_recipe_in_the_same_directory_is_refused(undisturbed, recipe_path):
    with pytest.raises(UserError, match="another recipe"):
        distill(load_recipe(recipe_path, ["seed=7"]), undisturbed[0])


def test_a_directory_of_something_else_is_refused(recipe_path, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        distill(load_recipe(recipe_path), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        distill(load_recipe(recipe_path), tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_context_past_the_teachers_is_refused(recipe_path, tmp_path):
    with pytest.raises(UserError, match="reads at most 64 tokens"):
        distill(load_recipe(recipe_path, ["data.seq_len=128"]), tmp_path / "out")


@pytest.mark.parametrize("stages", ["matrix", "hidden", "end_to_end"])
def test_each_stage_alone(stages, recipe_path, tmp_path):
    drop = [f"stages.{name}=null" for name in pipeline.ORDER if name != stages]
    row = distill(load_recipe(recipe_path, drop), tmp_path / "out")
    assert row["tokens"] == (512 if stages == "matrix" else 768)


@pytest.mark.parametrize("mixer", [m for m in mixers.names() if m != "gla"])
def test_every_mixer_goes_through_all_stages(mixer, recipe_path, tmp_path):
    copy = "true" if mixer != "softmax" else "false"
    row = distill(load_recipe(recipe_path, [f"student.mixer={mixer}", f"student.copy_qkv={copy}"]), tmp_path / "out")
    assert row["mixer"] == mixer
    assert row["kl"] < row["kl_at_init"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.sample if s == "hidden" else ()) for s in pipeline.ORDER]
)
def test_killed_at_random_in_a_stage_and_run_again_ends_bitwise_the_same(stage, undisturbed, recipe_path, tmp_path):
    """SIGKILL to the real command, three times while it is in this stage, wherever it happens to be."""
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "subquad.cli", "distill", str(recipe_path), "--output", str(output)]
    generator = random.Random(stage)

    def steps():
        return [m["step"] for m in read_jsonl(output / "metrics.jsonl") if m["stage"] == stage]

    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        reached = len(steps())
        deadline = time.monotonic() + 120
        while process.poll() is None and len(steps()) <= reached and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same(weights(output), weights(undisturbed[0]))
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    shutil.rmtree(output)


def test_a_kill_in_the_middle_of_a_save_loses_nothing(undisturbed, recipe_path, tmp_path, monkeypatch):
    """The second checkpoint of a stage is cut off behind its weights: the first is used, and the end is the same."""
    output, saved = tmp_path / "cut", []
    save_state = trainer.StageTrainer._save_optimizer_and_scheduler

    def cut(self, folder):
        saved.append(folder)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save_state(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StageTrainer, "_save_optimizer_and_scheduler", cut)
        with pytest.raises(KeyboardInterrupt):
            distill(load_recipe(recipe_path), output)
    assert len(list((output / "checkpoints" / "matrix").glob("checkpoint-*"))) == 2
    distill(load_recipe(recipe_path), output)
    assert same(weights(output), weights(undisturbed[0]))
