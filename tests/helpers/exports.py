"""Tiny exportable students with random mixer parameters, and a subprocess without Subquad that runs exported models."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import subquad
from subquad import SubquadForCausalLM
from subquad.export.granite_hybrid import has_group_norm
from tests.helpers.ops import error
from tests.helpers.processes import run_python
from tests.helpers.recipes import save_tiny_teacher
from tests.helpers.students import logits, make_student
from tests.helpers.teachers import SIZES, random_teacher

PURE = {"default": "gated_deltanet"}
MAMBA2 = {"default": "mamba2"}
KDA = {"default": "kda"}
REGULAR = {"default": "gated_deltanet", "1,3": "attention"}
IRREGULAR = {"default": "gated_deltanet", "0,3": "attention"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
needs_group_norm = pytest.mark.skipif(
    not has_group_norm(), reason="Granite 4 in this version of transformers has one norm for all heads"
)
EXPORTED = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16, "max_position_embeddings": 512}


def teacher_of(architecture: str, seed: int = 0, **changes):
    """A `random_teacher`, without the sizes that are None in `changes`."""
    sizes = {name: value for name, value in {**EXPORTED, **changes}.items() if value is not None}
    return random_teacher(architecture, seed, **sizes)


def student_of(
    architecture: str = "llama", layers: dict | None = None, target: str = "qwen3_5", **changes
) -> SubquadForCausalLM:
    teacher = teacher_of(architecture, **changes)
    return make_student(teacher, layer_types=layers or PURE, export_target=target)


def saved_student(directory: Path, layers: dict | None = None, target: str = "qwen3_5", **changes) -> Path:
    """Saves a teacher, and a student with its tokenizer, below `directory`; returns the student's directory."""
    save_tiny_teacher(directory / "teacher", **{"num_hidden_layers": 4, "head_dim": 32, **changes})
    teacher, tokenizer = subquad.load_teacher(directory / "teacher")
    student = make_student(teacher, layer_types=layers or PURE, export_target=target)
    student.save_pretrained(directory / "student")
    tokenizer.save_pretrained(directory / "student")
    return directory / "student"


SCRIPT = """
import sys
sys.modules["subquad"] = sys.modules["fla"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)

def run(directory):
    ids, padded, mask, dtype = torch.load(directory + "/inputs.pt")
    model = AutoModelForCausalLM.from_pretrained(directory + "/served", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(directory + "/served")
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache, steps = None, []
        for piece in ids.split([5] + [1] * (ids.shape[1] - 5), dim=1):
            result = model(input_ids=piece, use_cache=True, past_key_values=cache)
            cache = result["cache"] if "cache" in result else result["past_key_values"]
            steps.append(result.logits)
        batch = model(input_ids=padded, attention_mask=mask).logits
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    single = model.generate(ids[:1, :6], **greedy)
    batched = model.generate(padded, attention_mask=mask, **greedy)
    outputs = whole, torch.cat(steps, 1), batch, single, batched, tokenizer("The old fox.").input_ids
    torch.save(outputs, directory + "/outputs.pt")

for directory in sys.argv[1:]:
    run(directory)
"""


def run_without_subquad(
    inputs: dict[Path, tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype = torch.float32
) -> list[tuple]:
    """Runs the models in `directory / "served"` in a process that can import neither subquad nor fla.

    inputs: (ids, padded ids, mask of the padded ids) by directory.

    Returns, for each directory: logits of the ids in one forward and with a cache, logits of the padded batch, greedy
    continuations of one row and of the padded batch, and the tokens of a sentence.
    """
    for directory, tensors in inputs.items():
        torch.save((*tensors, dtype), directory / "inputs.pt")
    run_python("-c", SCRIPT, *inputs)
    return [torch.load(directory / "outputs.pt") for directory in inputs]


def left_padded(ids: Tensor, lengths: list[int], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of `ids` cut to `lengths` and padded on the left, and their mask."""
    padded, mask = torch.full_like(ids, pad), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, -length:], mask[row, -length:] = ids[row, :length], 1
    return padded, mask


def check_served(directories: list[Path]) -> None:
    """Checks that the model in `directory / "served"` gives the outputs of the student in `directory / "student"`: in
    one forward, with a cache, with left padding, and in greedy generation."""
    ids = torch.randint(3, 300, (2, 70), generator=torch.Generator().manual_seed(3))
    padded, mask = left_padded(ids, [70, 41], pad=0)
    outputs = run_without_subquad(dict.fromkeys(directories, (ids, padded, mask)))
    for directory, (whole, steps, batch, single, batched, tokens) in zip(directories, outputs, strict=True):
        student, tokenizer = subquad.load_teacher(directory / "student")
        expected = logits(student, ids)
        assert error(whole, expected) < 1e-5
        assert error(steps, expected) < 1e-5
        expected = logits(student, padded, attention_mask=mask)
        assert error(batch[mask.bool()], expected[mask.bool()]) < 1e-5
        greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        assert torch.equal(single, student.generate(ids[:1, :6], **greedy))
        assert torch.equal(batched, student.generate(padded, attention_mask=mask, **greedy))
        assert tokens == tokenizer("The old fox.").input_ids
