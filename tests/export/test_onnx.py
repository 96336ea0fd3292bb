"""Export to ONNX: the files, and the model in onnxruntime against the student."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import subquad
from subquad.export import export
from subquad.modeling.export_target import ExportError
from tests.helpers.exports import saved_student
from tests.helpers.students import MIXERS

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
NEW_TOKENS = 24


def greedy(directory, ids: list[int], count: int) -> list[int]:
    """What a user's program does: the prompt token by token, then the most likely tokens."""
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = json.loads((directory / "subquad.json").read_text())["states"]
    values = {name: torch.zeros(shape).numpy() for name, shape in shapes.items()}
    written: list[int] = []
    for position in range(len(ids) + count - 1):
        token = ids[position] if position < len(ids) else written[-1]
        values |= {"input_ids": torch.tensor([[token]]).numpy(), "position_ids": torch.tensor([[position]]).numpy()}
        logits, *states = session.run(None, values)
        values |= dict(zip(shapes, states, strict=True))
        if position >= len(ids) - 1:
            written.append(int(logits[0, 0].argmax()))
    return written


@pytest.mark.parametrize(
    "mixer",
    [
        pytest.param(name, marks=() if name == "gated_deltanet" else [pytest.mark.slow, pytest.mark.sample])
        for name in MIXERS
    ],
)
def test_greedy_tokens_in_onnxruntime(mixer, tmp_path):
    directory = saved_student(tmp_path, {"default": mixer}, target=None)
    assert "as onnx in" in export(directory, tmp_path / "onnx", "onnx")
    student, tokenizer = subquad.load_teacher(directory)
    ids = tokenizer("The old fox sees").input_ids
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    expected = student.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert greedy(tmp_path / "onnx", ids, NEW_TOKENS) == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx")("The old fox sees").input_ids == ids


def test_what_grows_with_the_text_is_refused(tmp_path):
    directory = saved_student(tmp_path, {"default": "gla", "1": "attention"}, target=None)
    with pytest.raises(ExportError, match="layer 1 keeps attention, whose cache grows"):
        export(directory, tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()
