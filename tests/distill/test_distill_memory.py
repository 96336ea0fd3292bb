"""What a run holds at long contexts, measured in processes of their own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch, subquad
from subquad.ops.bench import peak_rss
from subquad.config import EndToEnd, Matrix
from subquad.distill.stages import EndToEndDistillation, MatrixMixing
torch.set_num_threads(2)
stage, layers, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
teacher, _ = subquad.load_teacher("nano")
teacher.requires_grad_(False)
kept = teacher.model.layers[:layers]
teacher.model.layers, teacher.config.num_hidden_layers = kept, layers
student = subquad.linearize(teacher, "gla")
if stage == "matrix":
    objective = MatrixMixing(teacher, Matrix(tokens=1, lr=1.0, rows=128))
else:
    objective = EndToEndDistillation(teacher, EndToEnd(tokens=1, lr=1.0))
def step(length):
    ids = torch.randint(3, 4000, (1, length))
    loss = student(objective=objective, **objective.targets({"input_ids": ids})).loss
    loss.backward()
    assert loss.isfinite()
    student.zero_grad()
step(64)
before = peak_rss()
step(length)
after = peak_rss()
print(after, after - before)
"""


def peak(stage: str, layers: int, length: int) -> tuple[int, int]:
    """Bytes at the peak of a step, and above what was there before it."""
    command = [sys.executable, "-c", PROGRAM, stage, str(layers), str(length)]
    # What is freed goes back to the system at once, so that the peak is what is held and not what is scattered.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, above = done.stdout.split()[-2:]
    return int(whole), int(above)


@pytest.mark.slow
@pytest.mark.sample
def test_stage_3_at_8192_tokens_fits_in_4_gigabytes():
    whole, _ = peak("end_to_end", 6, 8192)
    assert whole < 4e9


@pytest.mark.slow
def test_matrices_of_stage_1_do_not_add_up_over_layers():
    """Six layers hold what one does, but for the teacher's activations; a matrix, 6 x 2,048^2 x 4 bytes, is 100 MB."""
    _, one = peak("matrix", 1, 2048)
    _, six = peak("matrix", 6, 2048)
    assert six < one + 60e6


@pytest.mark.slow
def test_stage_1_in_row_blocks_needs_less_than_a_matrix():
    """A matrix of 6 heads and 4,096 tokens has 403 MB, and a loss on it whole holds several."""
    _, above = peak("matrix", 1, 4096)
    assert above < 403e6
