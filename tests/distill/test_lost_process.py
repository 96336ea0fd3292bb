"""One of two processes of torchrun is killed: the other ends too, and the same command continues to the same end."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file

from subquad.distill.logging_callbacks import read_jsonl
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_other_process_ends_and_the_run_continues(rank, tmp_path):
    stages = {"hidden": {"tokens": 200 * 4 * 32, "lr": 1e-3, "batch_size": 4}}
    recipe = tiny_recipe(tmp_path / "given", stages=stages, checkpoint={"save_steps": 10})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(output):
        command = [*torchrun, "-m", "subquad.cli", "distill", str(recipe), "--output", str(output)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    whole = start(tmp_path / "whole")
    assert (whole.wait(300), whole.stderr.close())[0] == 0
    output = tmp_path / "run"
    lost = start(output)
    while lost.poll() is None and len(read_jsonl(output / "metrics.jsonl")) < 3:
        time.sleep(0.02)
    workers = psutil.Process(lost.pid).children(recursive=True)
    (killed,) = (worker for worker in workers if worker.environ().get("RANK") == rank)
    killed.send_signal(signal.SIGKILL)
    _, message = lost.communicate(timeout=60)
    assert lost.returncode != 0, message
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert not (output / "result.json").exists()
    assert any((output / "checkpoints" / "hidden").glob("checkpoint-*"))
    continued = start(output)
    _, message = continued.communicate(timeout=300)
    assert continued.returncode == 0, message
    found, expected = (load_file(path / "model.safetensors") for path in (output, tmp_path / "whole"))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
