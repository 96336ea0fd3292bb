"""Losses in chunks against one pass; results by length from known losses; document selection."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import subquad
from subquad.config import Data
from subquad.evaluate.long_context import (
    context_results,
    long_documents,
    position_losses,
    supported_lengths,
)
from subquad.evaluate.results import select
from tests.helpers.results import select_one


@pytest.mark.parametrize("mixer", ["softmax", "mamba2", "gated_deltanet", "linear_attention"])
def test_chunked_losses_equal_one_pass(make_teacher, mixer):
    teacher = make_teacher("qwen2")
    model = teacher if mixer == "softmax" else subquad.linearize(teacher, mixer).eval()
    ids = torch.randint(3, 61, (2, 50))
    found = position_losses(model, ids, chunk_tokens=16)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 49)
    assert found.shape == (2, 49)
    assert torch.allclose(found, whole, atol=1e-4)


def test_perplexity_by_position_and_degradation_length():
    losses = torch.full((2, 63), 1.0)
    losses[:, 7:15] = 0.5
    losses[:, 31:] = 0.9
    results = context_results("book", losses, [8, 16, 32, 64, 128])
    by_position = {result.length: result.value for result in select(results, metric="perplexity_by_position")}
    assert by_position == pytest.approx({8: math.e, 16: math.exp(0.5), 32: math.e, 64: math.exp(0.9)}, rel=1e-6)
    assert select_one(results, metric="perplexity", length=16).value == pytest.approx(math.exp((7 + 4) / 15), rel=1e-6)
    assert select_one(results, metric="degradation_length").value == 32
    assert not select(context_results("book", torch.ones(2, 63), [8, 64]), metric="degradation_length")


def test_long_documents_are_whole_or_a_warning_is_logged(caplog, tmp_path):
    tokenizer = subquad.load_teacher("nano")[1]
    corpus = Data(source="python-stdlib")
    rows = long_documents(corpus, tokenizer, 2048, 3)
    assert rows.shape == (3, 2048)
    eos = tokenizer.eos_token_id
    assert not (rows[:, 1:] == eos).any()
    assert not caplog.records
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"x{n} = {n}\n" * 9}) + "\n" for n in range(99)))
    across = long_documents(Data(source=str(short), validation=str(short)), tokenizer, 1024, 2)
    assert across.shape == (2, 1024)
    assert (across == eos).any()
    assert "reading across documents" in caplog.text


def test_learned_positions_limit_lengths():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=61)).eval()
    assert supported_lengths(gpt2, [32, 64, 128]) == [32, 64]
    assert supported_lengths(subquad.linearize(gpt2, "gla"), [32, 64, 128]) == [32, 64]


def test_rotary_positions_do_not_limit_lengths(make_teacher):
    teacher = make_teacher()
    assert supported_lengths(teacher, [32, 4096]) == [32, 4096]
    assert supported_lengths(subquad.linearize(teacher, "gla"), [32, 4096]) == [32, 4096]
