"""Students and runs that earlier versions saved: they load with the same logits, and continue to the same end.

scripts/upgrade_fixtures.py wrote them.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import subquad
from subquad.config import load_recipe
from subquad.distill.pipeline import distill
from tests.helpers.students import all_close

FIXTURES = Path(__file__).parent / "fixtures"
STUDENTS = sorted(path.parent for path in FIXTURES.glob("*/students/*/config.json") if path.parent.name != "teacher")
RUNS = sorted(FIXTURES.glob("*/runs/*"))


def name(path: Path) -> str:
    return f"{path.parents[1].name}-{path.name}"


@pytest.mark.parametrize("directory", STUDENTS, ids=name)
def test_students_of_earlier_versions_have_the_same_logits(directory):
    student = subquad.SubquadForCausalLM.from_pretrained(directory).eval()
    expected = load_file(directory.parent / "logits.safetensors")
    ids, found = expected["input_ids"], expected[directory.name]
    with torch.no_grad():
        logits = student(input_ids=ids).logits
    every = ids.shape[1] // found.shape[1]
    assert all_close(logits[:, every - 1 :: every], found)


@pytest.mark.parametrize("directory", RUNS, ids=name)
def test_runs_of_earlier_versions_continue(directory, tmp_path, own_cache, monkeypatch, caplog):
    """From the checkpoint of the interrupted stage, to the weights of the uninterrupted run."""
    shutil.copytree(directory, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with caplog.at_level("INFO"):
        distill(load_recipe("recipe.yaml"), "run")
    assert f"resuming from run/checkpoints/{directory.name}/checkpoint-4" in caplog.text
    found, expected = load_file("run/model.safetensors"), load_file("end.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[key] - expected[key]).abs().max() < 1e-4 for key in found)


def test_there_are_fixtures():
    assert len(STUDENTS) >= 14
    assert len(RUNS) >= 3
