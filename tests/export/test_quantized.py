"""`scripts/quantized.py`: a model with the weights of a GGUF file, and torchao's, which leave the gates alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import subquad
from scripts.quantized import as_gguf, recall, with_torchao
from subquad.export import convert, export
from tests.helpers.exports import REGULAR, saved_student
from tests.helpers.ops import error
from tests.helpers.recipes import sentences
from tests.helpers.students import logits

IDS = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(3))


def test_weights_are_those_of_the_file(tmp_path):
    saved_student(tmp_path, REGULAR, tie_word_embeddings=True)
    export(tmp_path / "student", tmp_path / "student.gguf", "gguf", "q8_0")
    from_file = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="student.gguf", dtype=torch.float32).eval()
    model = convert(subquad.load_teacher(tmp_path / "student")[0], "qwen3_5")
    changed, size = as_gguf(model, "q8_0")
    assert error(logits(changed, IDS), logits(from_file, IDS)) < 1e-5
    assert error(logits(changed, IDS), logits(model, IDS)) > 1e-3
    overhead = (tmp_path / "student.gguf").stat().st_size - size  # names and tokens
    assert 0 < overhead < 20_000


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_changes_linear_layers_but_not_gates(bits, tmp_path):
    pytest.importorskip("torchao")
    saved_student(tmp_path, REGULAR, intermediate_size=64)
    model = convert(subquad.load_teacher(tmp_path / "student")[0], "qwen3_5")
    changed, size = with_torchao(model, bits)
    gate, projection = (changed.model.layers[0].linear_attn.get_submodule(f"in_proj_{name}") for name in ("a", "qkv"))
    assert type(gate.weight) is torch.nn.Parameter
    assert type(projection.weight) is not torch.nn.Parameter
    assert size < sum(p.numel() for p in model.parameters()) * 4
    assert 0 < error(logits(changed, IDS), logits(model, IDS)) < (0.1 if bits == 8 else 0.9)


def test_recall_of_coarse_weights_differs(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("scripts.quantized.LENGTH", 192)
    student, tokenizer = subquad.load_teacher(saved_student(tmp_path, REGULAR, intermediate_size=64))
    model = convert(student, "qwen3_5")
    haystack = torch.tensor(tokenizer(sentences(400, 3)).input_ids)
    share, loglikelihood = recall(model, tokenizer, haystack)
    assert 0 <= int(share.rstrip("%")) <= 100
    assert recall(with_torchao(model, 4)[0], tokenizer, haystack)[1] != loglikelihood
