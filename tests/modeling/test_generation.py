"""Cached decoding, `generate`, padding and packing, with every mixer; what `forward` and `generate` refuse."""

import copy
import itertools
from functools import partial

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, pipeline

from subquad.modeling.cache import RecurrentCacheLayer, SubquadCache, cache_bytes
from subquad.modeling.far_call import NearFarCacheLayer
from tests.helpers.students import (
    MIXERS,
    MIXERS_AND_SOFTMAX,
    check_gradient_checkpointing,
    check_padding,
    in_pieces,
    logits,
    make_student,
)
from tests.helpers.teachers import byte_tokenizer

CASES = [(mixer, {}) for mixer in MIXERS_AND_SOFTMAX] + [
    ("gla", {"short_conv": 4, "rotary": True}),
    ("linear_attention", {"normalizer": True, "qk_activation": "elu1"}),
    ("mamba2", {"discretization": "zoh"}),
    *((mixer, {"state_heads": "key_value"}) for mixer in MIXERS),
    *((mixer, {"window": 4, "sinks": 1}) for mixer in MIXERS),
    *((mixer, {"window": [3, 5], "state_heads": "key_value", "merge": "add"}) for mixer in MIXERS),
    *((mixer, {"window": [5, 2], "sinks": 1, "memory": "all"}) for mixer in ("gla", "gated_deltanet", "xlstm")),
    ("gla", {"window": ["full", 1], "merge": "fixed"}),
    ("mamba2", {"window": [6, 2], "sinks": 2, "merge": "denominator", "qk_activation": "elu1"}),
]

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(params=CASES, ids=["-".join([m, *o]) for m, o in CASES])
def student(request, make_teacher):
    """A student of a teacher with biases in all projections; with a window, beside a memory."""
    mixer, options = request.param
    return make_student(make_teacher("wide-biased-tied"), mixer, **options)


def layers_with_attention(student):
    return student.config.layers_with_attention[0]


def test_cached_decoding_equals_the_full_forward(student, ids):
    full = logits(student, ids, use_cache=False)
    cache, found = None, []
    for token in ids.split(1, dim=1):
        with torch.no_grad():
            out = student(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
        assert cache.get_seq_length() == len(found)
    for logits_of_pieces in (torch.cat(found, 1), in_pieces(student, ids, [4, 1, 6])):
        # HGRN2 with shared states norms a head of small output: 1.2e-4 in float32, 1.3e-15 in float64
        assert torch.allclose(logits_of_pieces, full, atol=2e-4)


def test_greedy_search_with_cache_equals_without(student, ids):
    cached = student.generate(ids, max_new_tokens=12, **GREEDY)
    assert cached.shape == (3, 23)
    assert torch.equal(cached, student.generate(ids, use_cache=False, max_new_tokens=12, **GREEDY))
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, logits(student, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, expected)


def test_sampling_with_cache_equals_without(student, ids):
    def sample(**kwargs):
        torch.manual_seed(0)
        return student.generate(ids, max_new_tokens=8, do_sample=True, eos_token_id=None, **kwargs)

    assert torch.equal(sample(), sample(use_cache=False))


def test_beam_search_with_cache_equals_without(student, ids):
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "num_return_sequences": 2}
    found = student.generate(ids, **settings)
    assert found.shape[0] == 6
    assert torch.equal(found, student.generate(ids, use_cache=False, **settings))


def left_padded(ids, lengths):
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def test_left_padded_generation_matches_unpadded_rows(student, ids):
    lengths = [11, 4, 1]
    padded, mask = left_padded(ids, lengths)
    together = student.generate(padded, attention_mask=mask, max_new_tokens=8, **GREEDY)[:, 11:]
    for row, length in enumerate(lengths):
        alone = student.generate(ids[row : row + 1, 11 - length :], max_new_tokens=8, **GREEDY)[0, length:]
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padding_matches_unpadded_rows_and_continues(student, ids, where):
    mask = torch.ones(3, 14, dtype=torch.long)
    for row, n in enumerate([0, 3, 6]):
        mask[row, {"left": slice(0, n), "right": slice(11 - n, 11), "middle": slice(3, 3 + n)}[where]] = 0
    check_padding(student, torch.cat([ids, torch.arange(9).view(3, 3) + 20], 1), mask, [11, 3])


def test_mask_of_ones_equals_no_mask(student, ids):
    assert torch.equal(logits(student, ids, attention_mask=torch.ones_like(ids)), logits(student, ids))


def test_restarting_positions_separate_documents(student, ids):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], [*range(11)], [0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    found = logits(student, ids, position_ids=positions, use_cache=False)
    for row in range(3):
        starts = [*(positions[row] == 0).nonzero().flatten().tolist(), 11]
        for start, end in itertools.pairwise(starts):
            alone = logits(student, ids[row : row + 1, start:end])
            assert torch.allclose(found[row, start:end], alone[0], atol=1e-4), (row, start)


def test_cu_seq_lens_separate_documents(student, ids):
    cu_seqlens = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32)
    flat = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 6, "max_length_k": 6}
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]])
    expected = logits(student, ids[:1], position_ids=positions, use_cache=False)
    for given in ({}, {"position_ids": positions}):
        assert torch.equal(logits(student, ids[:1], use_cache=False, **flat, **given), expected)
    # positions that do not restart leave the documents separate
    continuous = logits(student, ids[:1], use_cache=False, **flat, position_ids=torch.arange(11)[None])
    assert torch.allclose(continuous[:, :4], expected[:, :4], atol=1e-4)
    changed = ids[:1].clone()
    changed[0, :5] = 7
    assert torch.equal(
        logits(student, changed, use_cache=False, **flat, position_ids=torch.arange(11)[None])[:, 5:], continuous[:, 5:]
    )


def test_packed_documents_with_right_padding(student, ids):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]).expand(3, 11)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    found = logits(student, ids, position_ids=positions, attention_mask=mask, use_cache=False)
    assert torch.allclose(found[:, :5], logits(student, ids[:, :5]), atol=1e-4)
    assert torch.allclose(found[:, 5:9], logits(student, ids[:, 5:9]), atol=1e-4)


def test_generation_continues_from_a_returned_cache(student, ids):
    settings = {**GREEDY, "return_dict_in_generate": True}
    first = student.generate(ids, max_new_tokens=5, **settings)
    turn = torch.cat([first.sequences, torch.full((3, 4), 17)], 1)
    settings["attention_mask"] = torch.ones_like(turn)
    second = student.generate(turn, max_new_tokens=5, past_key_values=first.past_key_values, **settings)
    assert torch.equal(second.sequences, student.generate(turn, max_new_tokens=5, **settings).sequences)
    assert second.past_key_values.get_seq_length() == 24


def test_cache_size_is_constant_for_mixers_and_grows_for_attention(student, ids):
    cache = student.new_cache()
    assert cache_bytes(cache) == 0
    assert cache.get_seq_length() == 0
    sizes = []
    for token in ids.split(1, dim=1):
        logits(student, token, past_key_values=cache)
        sizes.append(cache.nbytes())
    if layers_with_attention(student):  # keys and values of 2 layers, 2 heads, 12 channels and 3 rows in float32
        assert sizes == [2 * 2 * 2 * 12 * 3 * 4 * t for t in range(1, 12)]
    elif isinstance(cache.layers[0], NearFarCacheLayer):
        assert (len(set(sizes[8:])) == 1) == (None not in student.mixer_layers[0].windows)
    else:
        assert sizes[0] > 0
        assert len(set(sizes)) == 1


def test_cache_copy_reorder_select_repeat_and_reset(student, ids):
    cache = student.new_cache()
    logits(student, ids, past_key_values=cache)
    kept = copy.deepcopy(cache)
    following = torch.tensor([[7], [8], [9]])
    expected = logits(student, following, past_key_values=cache)
    assert torch.equal(logits(student, following, past_key_values=copy.deepcopy(kept)), expected)
    for change, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        changed = copy.deepcopy(kept)
        getattr(changed, change)(argument)
        assert torch.allclose(logits(student, following[rows], past_key_values=changed), expected[rows], atol=1e-5)
    if not layers_with_attention(student):
        kept.reset()
        assert kept.get_seq_length() == 0
        assert cache_bytes(kept) == 0
        assert torch.equal(logits(student, ids, past_key_values=kept), logits(student, ids))


def test_gradient_checkpointing_gives_the_same_gradients(student, ids):
    check_gradient_checkpointing(student, ids, 1e-6)


def test_training_makes_no_cache(student, ids):
    assert student.train()(input_ids=ids).past_key_values is None


# ---------------------------------------------------------------------- refused inputs


@pytest.mark.parametrize("mixer", ["gla", "softmax"])
def test_dynamic_cache_is_refused(teacher, ids, mixer):
    student = make_student(teacher, mixer)
    for run in (student, partial(student.generate, max_new_tokens=2)):
        with pytest.raises(TypeError, match=r"(cache|past_key_values): got DynamicCache"):
            run(input_ids=ids, past_key_values=DynamicCache())


def test_cache_of_other_layer_types_is_refused(teacher, ids):
    other = make_student(teacher, "softmax").new_cache()
    with pytest.raises(TypeError, match="got DynamicLayer for layer 0"):
        make_student(teacher, "gla")(input_ids=ids, past_key_values=other)
    with pytest.raises(TypeError, match="recurrent mixer"):
        make_student(teacher, "softmax")(
            input_ids=ids, past_key_values=SubquadCache([RecurrentCacheLayer(), RecurrentCacheLayer()])
        )


@pytest.mark.parametrize("implementation", ["static", "offloaded_static", "quantized", "offloaded"])
def test_cache_implementation_is_refused(teacher, ids, implementation):
    student = make_student(teacher, "gla")
    with pytest.raises(ValueError, match="cache_implementation"):
        student.generate(ids, cache_implementation=implementation, max_new_tokens=2)


@pytest.mark.parametrize("layers", [{"default": "gla"}, {"default": "gla", "1": "attention"}], ids=["gla", "hybrid"])
def test_pipeline_equals_generate(make_teacher, layers):
    student = make_student(make_teacher(vocab_size=256), layer_types=layers)
    tokenizer = byte_tokenizer()
    write = pipeline("text-generation", model=student, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "pad_token_id": 0, **GREEDY}
    texts = ["def f(x):", "x", "class A"]
    found = [row[0]["generated_text"] for row in write(texts, batch_size=3, **settings)]
    for text, generated in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert generated == tokenizer.decode(student.generate(ids, **settings)[0], skip_special_tokens=True)


@pytest.mark.skipif(not hasattr(GenerationConfig(), "prefill_chunk_size"), reason="not in this version of transformers")
@pytest.mark.parametrize(
    "layers", ["gated_deltanet", {"default": "gla", "1": {"mixer": "attention", "window": 5}}], ids=str
)
def test_chunked_prefill_equals_whole_prompt(teacher, ids, layers):
    layers = layers if isinstance(layers, dict) else {"default": layers}
    student = make_student(teacher, layer_types=layers)
    padded, mask = left_padded(ids, [11, 4, 7])
    settings = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    whole = student.generate(padded, **settings)
    for size in (1, 4, 11, 20):
        assert torch.equal(student.generate(padded, prefill_chunk_size=size, **settings), whole), size


def test_wrong_masks_and_offsets_are_refused(teacher, ids):
    student = make_student(teacher, "gla")
    with pytest.raises(ValueError, match="attention_mask: got 4 dimensions"):
        student(input_ids=ids, attention_mask=torch.ones(3, 1, 11, 11))
    with pytest.raises(ValueError, match=r"attention_mask: got \[3, 7\], expected \[3, 11\]"):
        student(input_ids=ids, attention_mask=torch.ones(3, 7))
    for rows, lengths in ((3, [0, 11]), (1, [0, 4]), (1, [2, 11])):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q: got \["):
            student(input_ids=ids[:rows], cu_seq_lens_q=torch.tensor(lengths))
    with pytest.raises(ValueError, match="input_ids"):
        student()


def test_hybrid_cache_counts_tokens_in_both_kinds_of_layer(teacher, ids):
    student = make_student(teacher, layer_types={"0": "gla", "1": "attention"})
    cache = student.new_cache()
    assert isinstance(cache.layers[0], RecurrentCacheLayer)
    assert torch.allclose(logits(student, ids, past_key_values=cache), logits(student, ids), atol=1e-4)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 11
    assert torch.allclose(in_pieces(student, ids, [4, 1, 6]), logits(student, ids), atol=1e-4)
    padded, mask = left_padded(ids, [11, 4, 1])
    found = student.generate(padded, attention_mask=mask, max_new_tokens=4, **GREEDY)
    assert torch.equal(found[1, 11:], student.generate(ids[1:2, 7:], max_new_tokens=4, **GREEDY)[0, 4:])
