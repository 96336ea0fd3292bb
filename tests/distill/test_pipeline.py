"""Whole runs on a tiny teacher: their files, resuming after interruptions and kills, refused directories."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from subquad import mixers
from subquad.config import load_recipe
from subquad.distill import objective, pipeline, trainer
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.pipeline import distill
from subquad.distill.recipe_stages import STAGE_NAMES
from subquad.modeling import linearize
from subquad.modeling.attention.discovery import discover_attention
from subquad.study.runs import find_runs
from subquad.utils import UserError
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def uninterrupted(recipe_path, own_cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "uninterrupted"
    result = distill(load_recipe(recipe_path), output)
    return output, result


def weights(output):
    return load_file(output / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_output_is_a_loadable_student_with_its_files(uninterrupted, recipe_path):
    output, result = uninterrupted
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("The red fox", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert load_recipe(output / "recipe.yaml") == load_recipe(recipe_path)
    saved = json.loads((output / "result.json").read_text())
    assert saved["result"] == result
    assert {"subquad", "torch", "transformers", "python"} <= saved["versions"].keys()
    assert saved["device"]
    assert not (output / "checkpoints").exists()
    assert 0 < result["perplexity"] < 400
    assert result["tokens"] == 512 + 768 + 768
    assert result["kl"] < result["kl_at_init"]
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [m["stage"] for m in metrics] == sorted((m["stage"] for m in metrics), key=STAGE_NAMES.index)
    assert [m["step"] for m in metrics if m["stage"] == "hidden"] == list(range(1, 13))
    assert all(m["tokens"] == m["step"] * 64 and m["tokens_per_second"] > 0 for m in metrics)


def test_saved_configuration_makes_caches_and_names_no_path(uninterrupted, recipe_path):
    """`Trainer` turns caches off, and `transformers` notes from which directory a teacher came."""
    text = (uninterrupted[0] / "config.json").read_text()
    assert json.loads(text)["use_cache"] is True
    assert str(recipe_path.parent) not in text


def test_finished_run_is_not_repeated(uninterrupted, recipe_path, monkeypatch):
    output, result = uninterrupted
    monkeypatch.setattr(pipeline, "load_placed", lambda *a: pytest.fail("loaded a teacher for a finished run"))
    assert distill(load_recipe(recipe_path), output) == result


def test_recipe_keeps_groups_whole(recipe_path, tmp_path):
    changes = ["student={layer_types: {default: {mixer: attention, window: 8}}, keep_groups: 1, keep_by: kl}"]
    stages = ["stages.matrix=null", "stages.end_to_end=null", "stages.hidden.tokens=64"]
    result = distill(load_recipe(recipe_path, [*changes, *stages]), tmp_path / "s")
    assert result["mixer"] == "hybrid-keep-1"
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert sorted(str(window) for layer in student.mixer_layers for window in layer.windows) == ["8", "8", "8", "None"]


def test_attention_is_discovered_once(recipe_path, tmp_path, monkeypatch):
    calls = []

    def count(model):
        calls.append(model)
        return discover_attention(model)

    for module in (pipeline, objective, linearize):
        monkeypatch.setattr(module, "discover_attention", count)
    distill(load_recipe(recipe_path), tmp_path / "out")
    assert len(calls) == 1


def test_weights_depend_on_the_seed_alone(uninterrupted, recipe_path, tmp_path):
    distill(load_recipe(recipe_path), tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(uninterrupted[0]))
    distill(load_recipe(recipe_path, ["seed=1"]), tmp_path / "other")
    assert not same(weights(tmp_path / "other"), weights(uninterrupted[0]))


@pytest.mark.parametrize("stop_at", [("matrix", 2), ("matrix", 7), ("hidden", 1), ("hidden", 11), ("end_to_end", 4)])
def test_interrupted_run_ends_bitwise_the_same(stop_at, uninterrupted, recipe_path, tmp_path, monkeypatch):
    """A run stopped after a step of a stage, with a checkpoint every 3 steps, is resumed."""
    output = tmp_path / "interrupted"
    end_of_step = trainer.MetricsCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        end_of_step(self, args, state, control, **kwargs)
        if self.stage == stop_at[0] and state.global_step == stop_at[1]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(load_recipe(recipe_path), output)
    assert not (output / "result.json").exists()
    resumed = []
    begin = trainer.MetricsCallback.on_train_begin

    def count(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        resumed.append((self.stage, state.global_step))

    monkeypatch.setattr(trainer.MetricsCallback, "on_train_begin", count)
    distill(load_recipe(recipe_path), output)
    assert resumed[0] == (stop_at[0], stop_at[1] // 3 * 3)
    assert same(weights(output), weights(uninterrupted[0]))
    steps = [(m["stage"], m["step"]) for m in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())]
    assert len(steps) == len(set(steps)) == 8 + 12 + 12


def test_incomplete_checkpoint_is_removed(tmp_path):
    complete, cut, empty = (tmp_path / f"checkpoint-{n}" for n in (3, 6, 9))
    for path in (complete, cut, empty):
        path.mkdir()
    (complete / "trainer_state.json").write_text('{"global_step": 3}')
    (cut / "trainer_state.json").write_text('{"global_step": 6, "log_hist')
    assert trainer.newest_checkpoint(tmp_path) == str(complete)
    assert not cut.exists()
    assert not empty.exists()
    assert trainer.newest_checkpoint(tmp_path / "nothing") is None


def test_a_run_is_finished_whatever_its_recipe_leaves_out(uninterrupted, recipe_path, tmp_path):
    output, result = shutil.copytree(uninterrupted[0], tmp_path / "old"), uninterrupted[1]
    written = yaml.safe_load((output / "recipe.yaml").read_text())
    del written["report_to"], written["precision"]  # as if they were new
    (output / "recipe.yaml").write_text(yaml.safe_dump(written))
    assert distill(load_recipe(recipe_path), output) == result
    assert find_runs([load_recipe(recipe_path)], tmp_path)[0].directory == output
    assert find_runs([load_recipe(recipe_path, ["seed=7"])], tmp_path)[0].directory != output


def test_directory_of_another_recipe_is_refused(uninterrupted, recipe_path):
    with pytest.raises(UserError, match="another recipe: seed is 0 there and 7 here; expected"):
        distill(load_recipe(recipe_path, ["seed=7"]), uninterrupted[0])


def test_directory_with_other_files_is_refused(recipe_path, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        distill(load_recipe(recipe_path), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        distill(load_recipe(recipe_path), tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_seq_len_above_the_teachers_maximum_is_refused(recipe_path, tmp_path):
    with pytest.raises(UserError, match=r"data.seq_len: got 128, expected at most 64"):
        distill(load_recipe(recipe_path, ["data.seq_len=128"]), tmp_path / "out")


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_each_stage_alone(stage, recipe_path, tmp_path):
    drop = [f"stages.{name}=null" for name in STAGE_NAMES if name != stage]
    result = distill(load_recipe(recipe_path, drop), tmp_path / "out")
    assert result["tokens"] == (512 if stage == "matrix" else 768)


@pytest.mark.parametrize("mixer", [m for m in mixers.names() if m != "gla"])
def test_every_mixer_trains_in_all_stages(mixer, recipe_path, tmp_path):
    copy = "true" if mixer != "softmax" else "false"
    result = distill(load_recipe(recipe_path, [f"student.mixer={mixer}", f"student.copy_qkv={copy}"]), tmp_path / "out")
    assert result["mixer"] == mixer
    assert result["kl"] < result["kl_at_init"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.sample if s == "hidden" else ()) for s in STAGE_NAMES]
)
def test_killed_run_ends_bitwise_the_same(stage, uninterrupted, recipe_path, tmp_path):
    """SIGKILL to the command, three times at random points of this stage."""
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
    assert same(weights(output), weights(uninterrupted[0]))
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    shutil.rmtree(output)


def test_interrupted_save_of_a_checkpoint_ends_bitwise_the_same(uninterrupted, recipe_path, tmp_path, monkeypatch):
    """The second checkpoint of a stage has its weights only: the first is used."""
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
    assert same(weights(output), weights(uninterrupted[0]))
