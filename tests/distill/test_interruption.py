"""SIGINT and SIGTERM while a stage trains: a checkpoint, an exit code, and the same end after the same command."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file

from subquad.config import load_recipe
from subquad.distill import interruption, trainer
from subquad.distill.interruption import Interruption, StopRequest
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.pipeline import distill
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("interruption"))


@pytest.fixture(scope="module")
def uninterrupted(recipe_path, own_cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "uninterrupted"
    distill(load_recipe(recipe_path), output)
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["matrix", "hidden", "end_to_end"])
def test_a_signal_saves_a_checkpoint(number, stage, uninterrupted, recipe_path, tmp_path, monkeypatch):
    """It arrives in step 4; checkpoints are otherwise saved every 3 steps."""
    before = signal.getsignal(number)
    begin, resumed = trainer.MetricsCallback.on_train_begin, []

    def send(self, args, state, control, **kwargs):
        if (self.stage, state.global_step) == (stage, 3):
            os.kill(os.getpid(), number)

    def note(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        resumed.append((self.stage, state.global_step))

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsCallback, "on_step_begin", send, raising=False)
        with pytest.raises(Interruption) as stopped:
            distill(load_recipe(recipe_path), tmp_path / "run")
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert (tmp_path / "run" / "checkpoints" / stage / "checkpoint-4" / "trainer_state.json").exists()
    monkeypatch.setattr(trainer.MetricsCallback, "on_train_begin", note)
    distill(load_recipe(recipe_path), tmp_path / "run")
    assert resumed[0] == (stage, 4)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "run", uninterrupted))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    steps = [(m["stage"], m["step"]) for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [(m["stage"], m["step"]) for m in read_jsonl(uninterrupted / "metrics.jsonl")]


def test_a_second_signal_stops_at_once(monkeypatch):
    stop, clock = StopRequest(), [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])

    def interrupt_twice():
        with stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)  # the first again, as by Slurm and torchrun
            clock[0] += interruption.REPEAT_SECONDS
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        interrupt_twice()
    assert type(stopped.value) is KeyboardInterrupt


def test_the_first_signal_of_a_process_may_follow_that_of_another():
    stop = StopRequest()

    def interrupt_after_another_process():
        with stop.listening():
            stop.signal = signal.SIGTERM  # agreed on at the end of a step
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interruption):
        interrupt_after_another_process()


def test_ignored_signals_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the workers of a study
    try:
        with StopRequest().listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def listen():
        with StopRequest().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.slow
@pytest.mark.sample
def test_the_command_says_how_to_continue(recipe_path, uninterrupted, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "subquad.cli", "distill", str(recipe_path), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = output / "metrics.jsonl"
    while process.poll() is None and not read_jsonl(metrics):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.endswith("subquad: interrupted; the same command continues it\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, expected = (load_file(path / "model.safetensors") for path in (output, uninterrupted))
    assert all(found[name].equal(expected[name]) for name in expected)
