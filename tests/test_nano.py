"""The nano teacher as shipped: small, trained, and using its context."""

import json
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F

import subquad
from subquad.config import EndToEndStage, HiddenStage, MatrixStage
from subquad.data.corpora import read
from subquad.data.sources import resolve
from subquad.distill.end_to_end import EndToEndDistillation
from subquad.distill.hidden_alignment import HiddenAlignment
from subquad.distill.matrix_mixing import MatrixMixing


@pytest.fixture(scope="module")
def held_out(nano):
    """`[24, 1025]` tokens of held-out files of the standard library."""
    _, tokenizer = nano
    tokens, source = [], resolve("python-stdlib", part="validation")
    for text in read(replace(source, files=tuple(sorted(source.files)))):
        tokens += [tokenizer.eos_token_id, *tokenizer(text, verbose=False).input_ids]
    windows = torch.tensor(tokens[: len(tokens) // 1025 * 1025]).view(-1, 1025)
    return windows[:: max(1, len(windows) // 24)][:24]


def test_size_of_the_weights(nano):
    model, tokenizer = nano
    package = files("subquad") / "nano"
    assert sum(len(p.read_bytes()) for p in package.iterdir()) < 8e6
    assert 2.5e6 < model.num_parameters() < 4e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings == 1024
    assert len(tokenizer) == model.config.vocab_size == 4096


def test_its_tokenizer_is_lossless(nano):
    _, tokenizer = nano
    text = 'def f(x):\n\treturn "é…\\n"  # 日本\n\n\n'
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_has_learned_to_use_context(nano, held_out):
    model, _ = nano
    losses = torch.zeros(1024)
    with torch.no_grad():
        for rows in held_out.split(4):
            logits = model(rows[:, :-1]).logits
            losses += F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").sum(0)
    losses /= len(held_out)
    late, early = losses[768:].mean().item(), losses[32:64].mean().item()
    assert late < early - 0.1, f"{late:.2f} nats at positions 768 to 1023, {early:.2f} at 32 to 63"
    summary = json.loads((files("subquad") / "nano" / "train_log.jsonl").read_text().splitlines()[-1])
    assert losses.mean().item() == pytest.approx(summary["valid_loss"], abs=0.25)


def test_it_writes_python(nano):
    model, tokenizer = nano
    ids = tokenizer("import os\nimport", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0])
    assert text.count("import") >= 2
    assert "\n" in text.removeprefix("import os\n")


@pytest.mark.parametrize("stage", ["matrix", "hidden", "end_to_end"])
@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "xlstm"])
def test_each_stage_lowers_its_own_loss_on_validation_text(stage, mixer, nano, held_out):
    """Sixteen steps on one half of the held-out text, measured on the other."""
    teacher, _ = nano
    teacher.requires_grad_(False)
    before = [p.clone() for p in teacher.parameters()]
    train, valid = held_out[:16, :128], held_out[16:, :128]
    student = subquad.linearize(teacher, mixer, scale_ids=valid)
    objective = {
        "matrix": lambda: MatrixMixing(teacher, MatrixStage(tokens=1, lr=1.0)),
        "hidden": lambda: HiddenAlignment(teacher, HiddenStage(tokens=1, lr=1.0), valid),
        "end_to_end": lambda: EndToEndDistillation(teacher, EndToEndStage(tokens=1, lr=1.0)),
    }[stage]()
    rates = {"matrix": 4e-3, "hidden": 2e-3, "end_to_end": 5e-4}
    optimizer = torch.optim.AdamW(objective.trained_parameters(student), lr=rates[stage])

    def loss(rows):
        return student(objective=objective, **objective.forward_kwargs({"input_ids": rows})).loss

    with torch.no_grad():
        fresh = loss(valid).item()
    for step in range(16):
        optimizer.zero_grad()
        loss(train[step % 8 * 2 : step % 8 * 2 + 2]).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(valid).item() < 0.97 * fresh
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
