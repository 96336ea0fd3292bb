"""One process at a time executes the run of a directory."""

import os
import subprocess
import sys

import pytest

from subquad import utils
from subquad.cli import main
from subquad.config import load_recipe
from subquad.distill import pipeline, processes
from subquad.distill.pipeline import distill
from subquad.utils import UserError
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")
HOLD = """
import sys, time
from subquad.config import load_recipe
from subquad.distill import pipeline, processes
def hold(run, stage_cache):
    print("held", flush=True)
    time.sleep(600)
pipeline.execute_stages = hold
pipeline.distill(load_recipe(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    stages = {"hidden": {"tokens": 128, "lr": 1e-3, "batch_size": 2}}
    return tiny_recipe(tmp_path_factory.mktemp("locks"), stages=stages)


@pytest.mark.slow
@pytest.mark.sample
def test_a_second_run_in_a_directory_is_refused_until_the_first_is_killed(recipe_path, tmp_path, monkeypatch, capsys):
    """Before the teacher is loaded a second time."""
    output, command = tmp_path / "run", [sys.executable, "-c", HOLD, str(recipe_path), str(tmp_path / "run")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(utils, "LOCK_TIMEOUT", 0.3)
            patch.setattr(pipeline, "load_placed", lambda *args: pytest.fail("loaded"))
            for path in (output, tmp_path / "other" / ".." / "run"):
                assert main(["distill", str(recipe_path), "--output", str(path)]) == 2
                assert f"another run (process {owner.pid}) is running in" in capsys.readouterr().err
    finally:
        owner.kill()
        owner.wait()
    assert distill(load_recipe(recipe_path), output)["mixer"] == "gla"


def test_the_directory_is_read_again_under_the_lock(recipe_path, tmp_path, monkeypatch):
    """Another process may have begun another recipe, or finished this one, since it was read first."""
    read, seen = pipeline.load_finished_result, []

    def begun_meanwhile(recipe, directory):
        if seen:
            raise UserError("output: holds the run of another recipe")
        seen.append(read(recipe, directory))

    monkeypatch.setattr(pipeline, "load_finished_result", begun_meanwhile)
    monkeypatch.setattr(pipeline, "execute_stages", lambda *args: pytest.fail("executed"))
    with pytest.raises(UserError, match="another recipe"):
        distill(load_recipe(recipe_path), tmp_path / "run")
    monkeypatch.setattr(pipeline, "load_finished_result", lambda *args: seen.append({}) if len(seen) < 2 else {"kl": 1})
    assert distill(load_recipe(recipe_path), tmp_path / "run") == {"kl": 1}


def test_only_the_first_process_locks(recipe_path, tmp_path, monkeypatch):
    class Second:
        is_main_process, process_index, num_processes = False, 1, 2

        @staticmethod
        def wait_for_everyone():
            pass

        main_process_first = pipeline.ExitStack

    for module in (pipeline, processes):
        monkeypatch.setattr(module, "PartialState", Second)
    monkeypatch.setattr(pipeline, "start_processes", lambda *args: None)
    monkeypatch.setattr(pipeline, "exclusive", lambda *args: pytest.fail("locked"))
    monkeypatch.setattr(pipeline, "execute_stages", lambda *args: {"kl": os.getpid()})
    assert distill(load_recipe(recipe_path), tmp_path / "run") == {"kl": os.getpid()}
