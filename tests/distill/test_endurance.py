"""Many stages in one process: memory, open files, hooks and threads stay as they are after the first ones."""

import gc
import logging
import statistics
import threading
from pathlib import Path

import psutil
import pytest

from subquad.config import load_recipe
from subquad.distill.pipeline import DistillationRun
from subquad.distill.processes import on_first_process, start_processes
from subquad.distill.recipe_stages import STAGE_NAMES
from subquad.ops.engine.workspace import KEPT_BYTES, MAX_VIEWS, Workspace
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")
MORE_MEGABYTES = 60


@pytest.fixture
def run(tmp_path):
    stages = {name: {"tokens": 128, "lr": 1e-4, "batch_size": 2} for name in STAGE_NAMES}
    lora = {**stages["end_to_end"], "lora": {"rank": 2, "alpha": 4}, "gradient_checkpointing": True}
    window = {"mixer": "gla", "calibration_tokens": None, "mixer_kwargs": {"window": 8}}
    path = tiny_recipe(tmp_path / "given", stages={**stages, "end_to_end": lora}, student=window)
    recipe = load_recipe(path)
    start_processes(recipe, "ddp")
    made = DistillationRun(recipe, tmp_path / "run")
    on_first_process(made.start, None)
    made.build_or_resume_student()
    return made


def held(run) -> dict[str, float]:
    """What a leak would increase, without objects that wait for the garbage collector."""
    gc.collect()
    modules = [*run.teacher.modules(), *run.student.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "megabytes": psutil.Process().memory_info().rss / 1e6,
        "files": len([*Path("/proc/self/fd").iterdir()]),
        "threads": threading.active_count(),
        "modules": len(modules),
        "hooks": sum(len(getattr(module, name)) for module in modules for name in hooks),
        "loggers": len(logging.root.handlers) + len(logging.root.manager.loggerDict),
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="lists open files by /proc")
@pytest.mark.parametrize(
    "stages",
    [pytest.param(24, marks=[pytest.mark.slow, pytest.mark.sample]), pytest.param(500, marks=pytest.mark.slow)],
)
def test_many_stages_in_one_process(stages, run):
    measured = []
    for number in range(stages):
        run.train_stage(STAGE_NAMES[number % 3])
        measured.append(held(run))
    warm, last = measured[stages // 4 : stages // 2], measured[-stages // 4 :]
    change = {key: statistics.median(m[key] for m in last) - statistics.median(m[key] for m in warm) for key in warm[0]}
    print({key: [m[key] for m in measured[:: max(1, stages // 10)]] for key in warm[0]})
    assert change.pop("megabytes") < MORE_MEGABYTES
    assert change == dict.fromkeys(change, 0)
    for buffers, views in Workspace._pool.__dict__.get("pools", {}).values():
        assert sum(buffer.nbytes for buffer in buffers.values()) <= KEPT_BYTES
        assert len(views) <= MAX_VIEWS
