"""Perplexity against context: in pieces as in one go, and bins and the extrapolation point on losses made by hand."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import subquad
from subquad.config import Data
from subquad.evaluate.long_context import check_lengths, context_results, long_documents, position_losses, readable
from subquad.evaluate.results import one, select
from subquad.utils import UserError


@pytest.mark.parametrize("mixer", ["softmax", "mamba2", "gated_deltanet", "linear_attention"])
def test_pieces_with_the_state_carried_are_the_whole(make_teacher, mixer):
    teacher = make_teacher("qwen2")
    model = teacher if mixer == "softmax" else subquad.linearize(teacher, mixer).eval()
    ids = torch.randint(3, 61, (2, 50))
    found = position_losses(model, ids, piece=16)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 49)
    assert found.shape == (2, 49)
    assert torch.allclose(found, whole, atol=1e-4)


def test_bins_and_the_extrapolation_point():
    losses = torch.full((2, 63), 1.0)
    losses[:, 7:15] = 0.5
    losses[:, 31:] = 0.9
    rows = context_results("book", losses, [8, 16, 32, 64, 128])
    by_position = {row.length: row.value for row in select(rows, metric="perplexity_by_position")}
    assert by_position == pytest.approx({8: math.e, 16: math.exp(0.5), 32: math.e, 64: math.exp(0.9)}, rel=1e-6)
    assert one(rows, metric="perplexity", length=16).value == pytest.approx(math.exp((7 + 4) / 15), rel=1e-6)
    assert one(rows, metric="extrapolation_point").value == 32
    assert not select(context_results("book", torch.ones(2, 63), [8, 64]), metric="extrapolation_point")


def test_long_documents_are_whole_or_said_not_to_be(caplog, tmp_path):
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


def test_learned_positions_end():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=61)).eval()
    assert readable(gpt2, [32, 64, 128]) == [32, 64]
    assert readable(subquad.linearize(gpt2, "gla"), [32, 64, 128]) == [32, 64]


def test_rotary_positions_go_on(make_teacher):
    teacher = make_teacher()
    assert readable(teacher, [32, 4096]) == [32, 4096]
    assert readable(subquad.linearize(teacher, "gla"), [32, 4096]) == [32, 4096]


def test_lengths_are_checked():
    with pytest.raises(UserError, match="lengths"):
        check_lengths([])
    with pytest.raises(UserError, match="lengths"):
        check_lengths([512, 1])
