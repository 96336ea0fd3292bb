"""Writes the fixtures of tests/test_upgrades.py: students and interrupted runs as this version saves them.

    python scripts/upgrade_fixtures.py tests/fixtures/NAME

Later versions must load them, with the same logits, and continue the runs to the same end, or say why not. Fixtures are
never written again; a version that changes a format adds its own.
"""

import argparse
import os
import shutil
import signal
from contextlib import chdir, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import subquad
from subquad import mixers
from subquad.config import load_recipe
from subquad.distill import trainer
from subquad.distill.interruption import Interruption
from subquad.distill.pipeline import distill
from tests.helpers.recipes import save_tiny_teacher, tiny_recipe
from tests.helpers.students import KINDS, make_student

SIZES = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "tie_word_embeddings": True}
STUDENTS = {**{name: {"default": name} for name in mixers.MIXERS}, **KINDS}
RUNS = {
    "matrix": {"mixer": "gla"},
    "hidden": {"layer_types": {"default": {"mixer": "gated_deltanet", "window": 5}, "1": "attention"}},
    "end_to_end": {"mixer": "xlstm"},
}
"""Interrupted in this stage, a run of this student."""
LENGTH, EVERY = 24, 6


def write_students(directory: Path) -> None:
    save_tiny_teacher(directory / "teacher", **SIZES)
    teacher, tokenizer = subquad.load_teacher(directory / "teacher")
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % len(tokenizer)
    expected = {"input_ids": ids}
    for name, layer_types in STUDENTS.items():
        student = make_student(teacher, layer_types=layer_types).eval()
        student.save_pretrained(directory / name)
        with torch.no_grad():
            expected[name] = student(input_ids=ids).logits[:, EVERY - 1 :: EVERY].clone()
    save_file(expected, directory / "logits.safetensors")


def write_run(directory: Path, stage: str, student: dict) -> None:
    """A run that was interrupted in the fourth step of `stage`, and `end.safetensors`, the weights at its end."""
    tiny_recipe(directory, teacher="teacher", data={"source": "text.txt", "seq_len": 32}, student=student)
    shutil.rmtree(directory / "teacher")
    save_tiny_teacher(directory / "teacher", **SIZES)
    (directory / "text.txt").write_text((directory / "text.txt").read_text()[:20_000])
    step_begin = trainer.MetricsCallback.on_step_begin

    def interrupt(self, args, state, control, **kwargs):
        if (self.stage, state.global_step) == (stage, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.MetricsCallback.on_step_begin = interrupt  # type: ignore[method-assign]
    with chdir(directory):
        with suppress(Interruption):
            distill(load_recipe("recipe.yaml"), "run")
        shutil.rmtree(f"run/checkpoints/{stage}/checkpoint-3")
        trainer.MetricsCallback.on_step_begin = step_begin  # type: ignore[method-assign]
        distill(load_recipe("recipe.yaml"), shutil.copytree("run", "end"))
        save_file(load_file("end/model.safetensors"), "end.safetensors")
        shutil.rmtree("end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    write_students(directory / "students")
    for stage, student in RUNS.items():
        write_run(directory / "runs" / stage, stage, {"calibration_tokens": None, **student})


if __name__ == "__main__":
    main()
