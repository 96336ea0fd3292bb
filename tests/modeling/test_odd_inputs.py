"""What a user may do to a student besides the usual: rows of padding alone, masks with holes, long and short prompts,
other dtypes, copies, shards, another vocabulary, compilation."""

import copy
import pickle

import pytest
import torch
from family_cases import build
from modeling_cases import TEXT, logits, shaken
from transformers import AutoModelForCausalLM

import subquad

PLANS = {
    "gated_deltanet": {"default": {"mixer": "gated_deltanet", "short_conv": 4}},
    "xlstm": {"default": "xlstm"},
    "normalized": {"default": {"mixer": "linear_attention", "normalizer": True, "qk_activation": "elu1"}},
    "hybrid": {"default": "mamba2", "1": "attention"},
    "window": {"default": "metala", "1": {"mixer": "attention", "window": 5, "sinks": 2}},
    "softmax": {"default": "softmax"},
}
CASES = [("llama", plan) for plan in PLANS] + [("gpt2", "hybrid"), ("gemma3_text", "window"), ("mistral", "softmax")]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def student(request):
    name, plan = request.param
    return shaken(subquad.linearize(build(name), layer_types=PLANS[plan], scale_ids=TEXT))


@pytest.fixture
def ids():
    return torch.randint(3, 61, (3, 17), generator=torch.Generator().manual_seed(5))


def near(found, expected, tolerance=1e-4):
    return float((found - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))


# ---------------------------------------------------------------------- masks


def test_a_row_of_padding_alone_disturbs_nothing_and_may_go_on(student, ids):
    mask = torch.ones_like(ids)
    mask[1], mask[2, :4] = 0, 0
    cache = student.new_cache()
    found = logits(student, ids, attention_mask=mask, past_key_values=cache)
    assert found.isfinite().all()
    assert near(found[0], logits(student, ids[:1])[0])
    assert near(found[2, 4:], logits(student, ids[2:, 4:])[0])
    longer = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], 1)
    more = logits(student, ids[:, :5], attention_mask=longer, past_key_values=cache)
    assert near(more[1], logits(student, ids[1:2, :5])[0])
    written = student.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(written[0], student.generate(ids[:1], **GREEDY)[0])


def test_holes_anywhere_with_positions_and_without_at_once_and_in_pieces(student, ids):
    mask = (torch.rand(3, 17, generator=torch.Generator().manual_seed(1)) > 0.4).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = student.new_cache()
    cuts = [(0, 5), (5, 6), (6, 7), (7, 12), (12, 17)]
    pieces = [logits(student, ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache) for a, b in cuts]
    ways = {
        "mask": logits(student, ids, attention_mask=mask),
        "positions": logits(student, ids, attention_mask=mask, position_ids=positions),
        "ones at padding": logits(student, ids, attention_mask=mask, position_ids=positions.masked_fill(mask == 0, 1)),
        "pieces": torch.cat(pieces, 1),
    }
    for row in range(3):
        real = mask[row].bool()
        alone = logits(student, ids[row : row + 1, real])[0]
        for way, found in ways.items():
            assert near(found[row, real], alone), way


def test_mask_may_be_bool_or_float(student, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = logits(student, ids, attention_mask=mask)
    assert torch.equal(logits(student, ids, attention_mask=mask.bool()), expected)
    assert torch.equal(logits(student, ids, attention_mask=mask.float()), expected)


def test_embeddings_with_padding(student, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    embedded = student.get_input_embeddings()(ids)
    found = logits(student, None, inputs_embeds=embedded, attention_mask=mask)
    assert near(found[mask.bool()], logits(student, ids, attention_mask=mask)[mask.bool()])
    written = student.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    assert torch.equal(written, student.generate(ids, attention_mask=mask, **GREEDY)[:, 17:])


# ---------------------------------------------------------------------- prompts


def test_prompts_of_one_token_and_of_none(student, ids):
    written = student.generate(ids[:1, :1], **GREEDY)
    assert torch.equal(written, student.generate(ids[:1, :1], use_cache=False, **GREEDY))
    assert student.generate(bos_token_id=1, **GREEDY).shape == (1, 5)


@pytest.mark.parametrize("plan", ["gated_deltanet", "hybrid", "window"])
def test_a_prompt_of_five_thousand_tokens(plan):
    student = shaken(subquad.linearize(build("llama", max_position_embeddings=8192), layer_types=PLANS[plan]))
    long = torch.randint(3, 61, (1, 5000), generator=torch.Generator().manual_seed(5))
    written = student.generate(long, **GREEDY)
    assert torch.equal(written, student.generate(long, use_cache=False, **GREEDY))


def test_settings_of_generate(student, ids):
    sampled = student.generate(ids, num_return_sequences=2, **{**GREEDY, "do_sample": True})
    assert sampled.shape == (6, 21)
    assert student.generate(ids, **{**GREEDY, "max_new_tokens": None, "max_length": 20}).shape == (3, 20)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        student.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY)


def test_only_the_last_logits_are_made_where_asked_for(student, ids):
    assert near(logits(student, ids, logits_to_keep=1), logits(student, ids)[:, -1:])


# ---------------------------------------------------------------------- copies, dtypes, files


def test_a_copy_is_a_student_of_its_own(student, ids):
    twin = copy.deepcopy(student)
    expected = logits(student, ids)
    assert torch.equal(logits(twin, ids), expected)
    assert twin.mixer_layers[0] in list(twin.modules())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(student, ids), expected)
    assert pickle.loads(pickle.dumps(student.config)).to_dict() == student.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(student, ids, dtype):
    turned = copy.deepcopy(student).to(dtype)
    found = logits(turned, ids)
    assert found.dtype == dtype
    assert found.isfinite().all()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert turned.generate(ids, attention_mask=mask, **GREEDY).shape == (3, 21)
    if dtype == torch.float64:
        cache = turned.new_cache()
        pieces = [logits(turned, piece, past_key_values=cache) for piece in ids.split([5, 1, 11], 1)]
        assert near(torch.cat(pieces, 1), found, 1e-5)


def test_shards_and_the_ways_to_load_them(student, ids, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = logits(student, ids)
    for options in ({}, {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"}):
        assert near(logits(AutoModelForCausalLM.from_pretrained(tmp_path, **options), ids), expected), options
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.generate(ids, **GREEDY).shape == (3, 21)


def test_another_vocabulary_is_saved_and_learned_from(student, ids, tmp_path):
    resized = copy.deepcopy(student)
    resized.resize_token_embeddings(70)
    found = logits(resized, ids)
    assert found.shape == (3, 17, 70)
    assert near(found[..., :61], logits(student, ids))
    assert resized.config.vocab_size == 70
    resized.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert near(logits(loaded, ids), found)
    loaded.resize_token_embeddings(80)
    assert loaded(input_ids=ids, labels=ids + 15).loss.isfinite()
    assert student.config.vocab_size == 61


def test_embeddings_can_be_replaced(student, ids):
    other = copy.deepcopy(student)
    table = torch.nn.Embedding(61, 32)
    other.set_input_embeddings(table)
    assert other.get_input_embeddings() is other.base.get_input_embeddings() is table
    head = torch.nn.Linear(32, 61, bias=False)
    other.set_output_embeddings(head)
    assert other.get_output_embeddings() is other.base.get_output_embeddings() is head


@pytest.mark.slow
@pytest.mark.parametrize("plan", [pytest.param("gated_deltanet", marks=pytest.mark.sample), "window"])
def test_compiled_student_gives_the_same(ids, plan):
    student = shaken(subquad.linearize(build("llama"), layer_types=PLANS[plan], scale_ids=TEXT))
    compiled = torch.compile(student, backend="eager")
    assert near(logits(compiled, ids), logits(student, ids))
