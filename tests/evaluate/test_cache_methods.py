"""Eviction by TOVA against a loop over tokens in float64, and caches of 4 bits."""

import copy
import math

import pytest
import torch

from subquad.evaluate.cache_methods import BITS, RESIDUAL_TOKENS, QuantizedCacheLayer, TovaCacheLayer, with_cache
from subquad.modeling.cache import CACHE_ARGUMENT, cache_bytes
from subquad.utils import UserError
from tests.helpers.students import all_close, in_pieces, logits
from tests.helpers.teachers import random_teacher, tiny_teacher

IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
NUMBERS = 2 * 2 * 2 * 8
"""Numbers of a cached token: keys and values of two layers with two heads of eight channels."""


def tova(teacher, capacity):
    return with_cache(teacher, lambda: TovaCacheLayer(capacity))


def rotated(x, position, theta=10000.0):
    """Rotary embedding of one head `[D]`."""
    half = len(x) // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


def normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def loop(model, ids, capacity):
    """The logits of a Llama in float64, token by token, head by head, with a set of cached tokens for each layer."""
    hidden = model.model.embed_tokens(ids)
    dropped = 0
    for layer in model.model.layers:
        x, attention, cached, outputs = normed(hidden, layer.input_layernorm), layer.self_attn, {}, []
        for t, token in enumerate(x):
            q = attention.q_proj(token).view(4, 8)
            k, v = (projection(token).view(2, 8) for projection in (attention.k_proj, attention.v_proj))
            cached[t] = [rotated(head, t) for head in k], v
            probabilities, output = dict.fromkeys(cached, 0.0), []
            for head in range(4):
                query = rotated(q[head], t)
                scores = {s: math.exp(query @ keys[head // 2] / math.sqrt(8)) for s, (keys, _) in cached.items()}
                total = sum(scores.values())
                output.append(sum(scores[s] / total * cached[s][1][head // 2] for s in cached))
                probabilities = {s: p + scores[s] / total for s, p in probabilities.items()}
            outputs.append(attention.o_proj(torch.cat(output)))
            if len(cached) > capacity:
                del cached[min(probabilities, key=probabilities.get)]
                dropped += 1
        hidden = hidden + torch.stack(outputs)
        hidden = hidden + layer.mlp(normed(hidden, layer.post_attention_layernorm))
    assert dropped == 2 * (len(ids) - capacity)
    return model.lm_head(normed(hidden, model.model.norm))


def test_eviction_equals_a_loop_over_tokens():
    teacher = tiny_teacher().double()
    for capacity in (1, 7):
        found = logits(tova(teacher, capacity), IDS[:1])
        with torch.no_grad():
            expected = loop(teacher, IDS[0], capacity)
        assert torch.allclose(found[0], expected, atol=1e-5, rtol=1e-5)  # transformers has float32 in its softmax


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gpt_neox", {}),
        ("gpt_oss", {"num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_all_agree_and_a_cache_of_the_whole_text_is_the_teacher(model_type, sizes):
    common = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    teacher = random_teacher(model_type, **common, num_attention_heads=4, **sizes)
    whole, small = tova(teacher, 40), tova(teacher, 9)
    assert all_close(logits(whole, IDS), logits(teacher, IDS))
    expected = logits(small, IDS)
    assert not all_close(expected, logits(teacher, IDS), 1e-2)
    assert all_close(in_pieces(small, IDS, [17, 1, 1, 21]), expected)
    assert {id(p) for p in small.parameters()} == {id(p) for p in teacher.parameters()}


def test_eviction_bounds_the_cache_and_rows_of_a_copy_continue_alone():
    model = tova(tiny_teacher(), 9)
    with torch.no_grad():
        cache = model(IDS[:, :30], use_cache=True)[CACHE_ARGUMENT]
    assert cache_bytes(cache) == 2 * 9 * NUMBERS * 4
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(2)
    rest = IDS[:, 30:].repeat_interleave(2, 0)
    assert all_close(logits(model, rest, past_key_values=copied)[::2], logits(model, IDS)[:, 30:])
    assert cache.get_seq_length() == 30


def test_what_cannot_be_read_is_refused():
    with pytest.raises(UserError, match="layer 0: MistralAttention has a window"):
        tova(tiny_teacher("mistral"), 9)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="got padding"):
        tova(tiny_teacher(), 9)(IDS, attention_mask=mask)


@pytest.fixture(scope="module")
def quantized():
    pytest.importorskip("optimum.quanto", reason="a cache of 4 bits needs optimum-quanto (extra: eval)")
    return with_cache(tiny_teacher(max_position_embeddings=512), QuantizedCacheLayer)


@pytest.mark.slow  # quanto compiles an extension on first use
def test_quantized_cache_is_close_and_small(quantized):
    teacher = tiny_teacher(max_position_embeddings=512)
    ids = torch.randint(3, 61, (2, 3 * RESIDUAL_TOKENS), generator=torch.Generator().manual_seed(1))
    exact, found = logits(teacher, ids), logits(quantized, ids)
    first = slice(0, RESIDUAL_TOKENS)
    assert all_close(found[:, first], exact[:, first])
    errors = (found - exact).norm(dim=-1)[:, RESIDUAL_TOKENS:] / exact.norm(dim=-1)[:, RESIDUAL_TOKENS:]
    assert 1e-3 < errors.mean() < 0.2
    with torch.no_grad():
        cache = quantized(ids, use_cache=True)[CACHE_ARGUMENT]
    overhead = 2 * 32 / 64  # a scale and a zero point in float32 for 64 numbers
    assert cache_bytes(cache) == ids.numel() * NUMBERS * (BITS + overhead) / 8
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(2)
    more = ids[:, :9].repeat_interleave(2, 0)
    continued = logits(quantized, more, past_key_values=copied)
    assert all_close(continued[::2], logits(quantized, torch.cat((ids, ids[:, :9]), 1))[:, -9:])
    assert all_close(continued[::2], continued[1::2])
    assert cache.get_seq_length() == ids.shape[1]
