"""Faults of a disk while a run trains: what was saved before is used, and the run ends as an undisturbed one."""

import json
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from subquad.config import load_recipe
from subquad.distill import checkpoints, pipeline, trainer
from subquad.distill.interruption import Interruption
from subquad.distill.pipeline import distill
from subquad.utils import UserError
from tests.helpers.disks import full_disk
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")
STAGE, STEPS = "end_to_end", 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A checkpoint every 3 steps; the two newest are kept."""
    path = tiny_recipe(tmp_path_factory.mktemp("faults"), checkpoint={"save_steps": 3, "save_total_limit": 2})
    return load_recipe(path)


@pytest.fixture(scope="module")
def undisturbed(recipe, own_cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "run"
    distill(recipe, output)
    return load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def interrupted_run(recipe, own_cache, tmp_path_factory):
    """A run that was interrupted in step 7 of the last stage: it has the checkpoints 6 and 7."""
    output = tmp_path_factory.mktemp("interrupted") / "run"

    def interrupt(self, args, state, control, **kwargs):
        if (self.stage, state.global_step) == (STAGE, 6):
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.MetricsCallback, "on_step_begin", interrupt, raising=False)
        with pytest.raises(Interruption):
            distill(recipe, output)
    return output


@pytest.fixture
def run(interrupted_run, tmp_path):
    return shutil.copytree(interrupted_run, tmp_path / "run")


def ends_undisturbed(recipe, run, undisturbed) -> bool:
    distill(recipe, run)
    found = load_file(run / "model.safetensors")
    return found.keys() == undisturbed.keys() and all(found[name].equal(undisturbed[name]) for name in found)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        *((flip, name) for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")),
        *((cut, name) for name in ("model.safetensors", "trainer_state.json")),
        *((remove, name) for name in ("scheduler.pt", "trainer_state.json")),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used(recipe, run, undisturbed, caplog, file, harm):
    harm(run / "checkpoints" / STAGE / "checkpoint-7" / file)
    with caplog.at_level("INFO"):
        assert ends_undisturbed(recipe, run, undisturbed)
    assert "checkpoint-7 is damaged" in caplog.text
    assert f"resuming from {run / 'checkpoints' / STAGE / 'checkpoint-6'}" in caplog.text


@pytest.mark.parametrize(
    ("harm", "file"), [(flip, "model.safetensors"), (cut, "done.json"), (remove, "config.json"), (flip, "done.json")]
)
def test_the_stage_before_a_damaged_one_is_used(recipe, run, undisturbed, caplog, file, harm):
    shutil.rmtree(run / "checkpoints" / STAGE)
    harm(run / "checkpoints" / "hidden-done" / file)
    with caplog.at_level("INFO"):
        assert ends_undisturbed(recipe, run, undisturbed)
    assert "hidden-done is damaged" in caplog.text
    assert "resuming after stage matrix" in caplog.text


def test_a_checkpoint_without_checksums_is_that_of_an_earlier_version(recipe, run, undisturbed, caplog):
    (run / "checkpoints" / STAGE / "checkpoint-7" / checkpoints.CHECKSUMS).unlink()
    with caplog.at_level("INFO"):
        assert ends_undisturbed(recipe, run, undisturbed)
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("size", [5_000, 60_000, 150_000])
def test_a_full_disk_while_a_checkpoint_is_saved(recipe, run, undisturbed, size):
    """The system refuses to write a file beyond `size` bytes, in whichever file that is."""
    with full_disk(size), pytest.raises(UserError, match=rf"{run}.*MB are free"):
        distill(recipe, run)
    assert ends_undisturbed(recipe, run, undisturbed)


@pytest.mark.parametrize("name", ["save_files", "save_stage"])
def test_a_full_disk_at_the_end(recipe, run, undisturbed, monkeypatch, name):
    write = pipeline.write_json_atomic

    def full(path, value):
        if path.name in ("result.json", "done.json"):
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_json_atomic", full)
        if name == "save_files":
            patch.setattr(pipeline.DistillationRun, "save_stage", lambda *args, **kwargs: None)
        with pytest.raises(UserError, match=r"cannot be saved .*No space left on device"):
            distill(recipe, run)
    assert ends_undisturbed(recipe, run, undisturbed)


def test_a_clock_that_jumps(recipe, run, undisturbed, monkeypatch):
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600.0 * next(jumps))
    assert ends_undisturbed(recipe, run, undisturbed)
    assert json.loads((run / "result.json").read_text())["result"]["seconds"] > 0


@pytest.mark.parametrize(
    ("stage", "options", "hint"),
    [
        ("hidden", {}, "stages.hidden.micro_batch_size to 1,"),
        ("hidden", {"micro_batch_size": 1}, "data.seq_len to 16"),
        ("matrix", {"micro_batch_size": 1}, "stages.matrix.row_chunk_size to 512"),
        ("end_to_end", {"micro_batch_size": 1}, "stages.end_to_end.gradient_checkpointing to true"),
    ],
)
def test_a_lack_of_memory_names_what_to_lower(tmp_path, monkeypatch, stage, options, hint):
    stages = {stage: {"tokens": 512, "lr": 1e-3, "batch_size": 2, **options}}
    recipe = load_recipe(tiny_recipe(tmp_path, stages=stages))

    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trainer.Trainer, "training_step", fail)
    with pytest.raises(UserError, match=rf"stage {stage}, step 1: out of memory with . rows of 32 tokens.*{hint}"):
        distill(recipe, tmp_path / "run")
