"""Peak memory of training steps at long contexts, each measured in its own process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch, subquad
from benchmarks.common import peak_rss
from subquad.config import EndToEndStage, HiddenStage, MatrixStage
from subquad.distill.matrix_mixing import MatrixMixing
from subquad.distill.hidden_alignment import HiddenAlignment
from subquad.distill.end_to_end import EndToEndDistillation
torch.set_num_threads(2)
stage, layers, length, student = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
teacher, _ = subquad.load_teacher("nano")
teacher.requires_grad_(False)
teacher.model.layers, teacher.config.num_hidden_layers = teacher.model.layers[:layers], layers
near_far = {"default": {"mixer": "gated_deltanet", "window": 256}}
student = subquad.linearize(teacher, layer_types=near_far if student == "near_far" else {"default": student})
if stage == "matrix":
    objective = MatrixMixing(teacher, MatrixStage(tokens=1, lr=1.0, row_chunk_size=128))
elif stage == "hidden":
    objective = HiddenAlignment(teacher, HiddenStage(tokens=1, lr=1.0), torch.arange(512)[None])
else:
    objective = EndToEndDistillation(teacher, EndToEndStage(tokens=1, lr=1.0))
    if length > 8192:
        student.train().gradient_checkpointing_enable({"use_reentrant": False})
def step(length):
    ids = torch.randint(3, 4000, (1, length))
    loss = student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).loss
    loss.backward()
    assert loss.isfinite()
    student.zero_grad()
step(64)
before = peak_rss()
step(length)
after = peak_rss()
print(after, after - before)
"""


def peak(stage: str, layers: int, length: int, student: str = "gla") -> tuple[int, int]:
    """Peak memory of a step in bytes, and its difference to the peak before the step. Stage 3 above 8,192 tokens has
    gradient checkpointing."""
    command = [sys.executable, "-c", PROGRAM, stage, str(layers), str(length), student]
    # freed memory returns to the system at once, so that fragmentation does not count
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    total, added = done.stdout.split()[-2:]
    return int(total), int(added)


@pytest.mark.slow
@pytest.mark.sample
def test_stage_3_at_8192_tokens_fits_in_4_gigabytes():
    total, _ = peak("end_to_end", 6, 8192)
    assert total < 4e9


@pytest.mark.slow
@pytest.mark.parametrize("student", ["gla", "near_far"])
@pytest.mark.parametrize("stage", ["hidden", "end_to_end"])
def test_rows_of_32768_tokens_fit_in_4_gigabytes(stage, student):
    total, _ = peak(stage, 6, 32_768, student)
    assert total < 4e9


@pytest.mark.slow
def test_stage_1_holds_the_matrices_of_one_layer():
    """Six layers need as much as one and the teacher's activations; a matrix of 6 x 2,048^2 x 4 bytes has 100 MB."""
    _, one = peak("matrix", 1, 2048)
    _, six = peak("matrix", 6, 2048)
    assert six < one + 60e6


@pytest.mark.slow
def test_stage_1_in_row_chunks_needs_less_than_a_matrix():
    """A matrix of 6 heads and 4,096 tokens has 403 MB; the loss on whole matrices holds several."""
    _, added = peak("matrix", 1, 4096)
    assert added < 403e6
