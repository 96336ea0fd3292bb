"""Less common uses: rows of padding only, masks with holes, long and short prompts, other dtypes, copies, shards, a
resized vocabulary, compilation."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.architectures import build_teacher
from tests.helpers.students import MIXERS, all_close, check_padding, in_pieces, logits, make_student, reloaded
from tests.helpers.teachers import tiny_teacher

LAYER_TYPES = {
    "gated_deltanet": {"default": {"mixer": "gated_deltanet", "short_conv": 4}},
    "xlstm": {"default": "xlstm"},
    "normalized": {"default": {"mixer": "linear_attention", "normalizer": True, "qk_activation": "elu1"}},
    "hybrid": {"default": "mamba2", "1": "attention"},
    "window": {"default": "metala", "1": {"mixer": "attention", "window": 5, "sinks": 2}},
    "softmax": {"default": "softmax"},
    "near_far": {
        "default": {"mixer": "gated_deltanet", "window": 5, "sinks": 2},
        "1": {"mixer": "mamba2", "window": [3, 7], "merge": "add", "state_heads": "key_value"},
    },
    "denominator": {
        "default": {"mixer": "gla", "window": 4, "merge": "denominator", "qk_activation": "elu1"},
        "1": {"mixer": "xlstm", "window": [3, 6], "sinks": 1, "memory": "all"},
    },
}
CASES = [("llama", layer_types) for layer_types in LAYER_TYPES]
CASES += [("gpt2", "hybrid"), ("gemma3_text", "window"), ("mistral", "softmax"), ("gemma3_text", "near_far")]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def student(request):
    name, layer_types = request.param
    return make_student(build_teacher(name), layer_types=LAYER_TYPES[layer_types])


@pytest.fixture
def ids():
    return torch.randint(3, 61, (3, 17), generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------- masks


def test_row_of_padding_only_continues_and_leaves_other_rows(student, ids):
    mask = torch.ones_like(ids)
    mask[1], mask[2, :4] = 0, 0
    cache = student.new_cache()
    found = logits(student, ids, attention_mask=mask, past_key_values=cache)
    assert found.isfinite().all()
    assert all_close(found[0], logits(student, ids[:1])[0])
    assert all_close(found[2, 4:], logits(student, ids[2:, 4:])[0])
    longer = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], 1)
    more = logits(student, ids[:, :5], attention_mask=longer, past_key_values=cache)
    assert all_close(more[1], logits(student, ids[1:2, :5])[0])
    generated = student.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(generated[0], student.generate(ids[:1], **GREEDY)[0])


def test_padding_anywhere_matches_unpadded_rows(student, ids):
    mask = (torch.rand(3, 17, generator=torch.Generator().manual_seed(1)) > 0.4).long()
    check_padding(student, ids, mask, [5, 1, 1, 5, 5])


def test_bool_and_float_masks(student, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = logits(student, ids, attention_mask=mask)
    assert torch.equal(logits(student, ids, attention_mask=mask.bool()), expected)
    assert torch.equal(logits(student, ids, attention_mask=mask.float()), expected)


def test_inputs_embeds_with_padding(student, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    embedded = student.get_input_embeddings()(ids)
    assert torch.equal(logits(student, None, inputs_embeds=embedded), logits(student, ids))
    found = logits(student, None, inputs_embeds=embedded, attention_mask=mask)
    assert all_close(found[mask.bool()], logits(student, ids, attention_mask=mask)[mask.bool()])
    generated = student.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    assert torch.equal(generated, student.generate(ids, attention_mask=mask, **GREEDY)[:, 17:])


# ---------------------------------------------------------------------- prompts


def test_prompts_of_one_token_and_without_tokens(student, ids):
    generated = student.generate(ids[:1, :1], **GREEDY)
    assert torch.equal(generated, student.generate(ids[:1, :1], use_cache=False, **GREEDY))
    assert student.generate(bos_token_id=1, **GREEDY).shape == (1, 5)


@pytest.mark.parametrize("layer_types", ["gated_deltanet", "hybrid", "window", "near_far"])
def test_prompt_of_5000_tokens(layer_types):
    teacher = build_teacher("llama", max_position_embeddings=8192)
    student = make_student(teacher, layer_types=LAYER_TYPES[layer_types])
    long = torch.randint(3, 61, (1, 5000), generator=torch.Generator().manual_seed(5))
    generated = student.generate(long, **GREEDY)
    assert torch.equal(generated, student.generate(long, use_cache=False, **GREEDY))


def test_generate_arguments(student, ids):
    sampled = student.generate(ids, num_return_sequences=2, **{**GREEDY, "do_sample": True})
    assert sampled.shape == (6, 21)
    assert student.generate(ids, **{**GREEDY, "max_new_tokens": None, "max_length": 20}).shape == (3, 20)
    expected = student.generate(ids[:1], **GREEDY)
    assert torch.equal(student.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY), expected)


def test_logits_to_keep(student, ids):
    assert all_close(logits(student, ids, logits_to_keep=1), logits(student, ids)[:, -1:])


# ---------------------------------------------------------------------- copies, dtypes, files


def test_deepcopy_and_pickle(student, ids):
    copied = copy.deepcopy(student)
    expected = logits(student, ids)
    assert torch.equal(logits(copied, ids), expected)
    assert copied.mixer_layers[0] in list(copied.modules())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(logits(student, ids), expected)
    assert pickle.loads(pickle.dumps(student.config)).to_dict() == student.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(student, ids, dtype):
    converted = copy.deepcopy(student).to(dtype)
    found = logits(converted, ids)
    assert found.dtype == dtype
    assert found.isfinite().all()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert converted.generate(ids, attention_mask=mask, **GREEDY).shape == (3, 21)
    if dtype == torch.float64:
        assert all_close(in_pieces(converted, ids, [5, 1, 11]), found, 1e-5)


def test_sharded_checkpoint_and_loading_options(student, ids, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = logits(student, ids)
    for options in ({}, {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"}):
        assert all_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, **options), ids), expected), options
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.generate(ids, **GREEDY).shape == (3, 21)


def test_resized_vocabulary_saves_loads_and_trains(student, ids, tmp_path):
    resized = copy.deepcopy(student)
    resized.resize_token_embeddings(70)
    found = logits(resized, ids)
    assert found.shape == (3, 17, 70)
    assert all_close(found[..., :61], logits(student, ids))
    assert resized.config.vocab_size == 70
    loaded = reloaded(resized, tmp_path)
    assert all_close(logits(loaded, ids), found)
    loaded.resize_token_embeddings(80)
    assert loaded(input_ids=ids, labels=ids + 15).loss.isfinite()
    assert student.config.vocab_size == 61


def test_set_input_and_output_embeddings(student, ids):
    other = copy.deepcopy(student)
    table = torch.nn.Embedding(61, 32)
    other.set_input_embeddings(table)
    assert other.get_input_embeddings() is other.base.get_input_embeddings() is table
    head = torch.nn.Linear(32, 61, bias=False)
    other.set_output_embeddings(head)
    assert other.get_output_embeddings() is other.base.get_output_embeddings() is head


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer_types", [pytest.param("gated_deltanet", marks=pytest.mark.sample), "window", "near_far"]
)
def test_compiled_student_has_the_same_logits(ids, layer_types):
    student = make_student(build_teacher("llama"), layer_types=LAYER_TYPES[layer_types])
    compiled = torch.compile(student, backend="eager")
    assert all_close(logits(compiled, ids), logits(student, ids))


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_tokens(mixer):
    """A call without tokens changes nothing: what follows is predicted as without it."""
    student = make_student(tiny_teacher(), layer_types={"default": mixer}).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        cache = student.new_cache()
        for piece in (ids[:, :0], ids[:, :4], ids[:, :0], ids[:, 4:]):
            out = student(input_ids=piece, past_key_values=cache)
        assert all_close(out.logits, student(input_ids=ids).logits[:, 4:])
