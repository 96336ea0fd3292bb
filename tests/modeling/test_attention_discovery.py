"""Discovery of a teacher's attention, and errors for models whose attention is not supported."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

import subquad
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.attention.scores import AttentionProbabilities
from subquad.utils import UserError
from tests.helpers.architectures import ARCHITECTURES, build_teacher
from tests.helpers.students import SCALE_IDS, logits
from tests.helpers.teachers import layer_activations

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


@pytest.mark.parametrize(
    ("architecture", "head_dim", "qkv_bias", "output_bias"),
    [
        ("plain", 8, False, False),
        ("wide-biased-tied", 12, True, True),
        ("mistral", 8, False, False),
        ("qwen2", 8, True, False),
        ("qwen3", 12, False, False),
    ],
)
def test_discovered_attention_has_the_right_spec(make_teacher, architecture, head_dim, qkv_bias, output_bias):
    teacher = make_teacher(architecture)
    attention_layers = discover_attention(teacher)
    assert [info.index for info in attention_layers] == [0, 1]
    assert [info.module for info in attention_layers] == [layer.self_attn for layer in teacher.model.layers]
    for info in attention_layers:
        spec = info.spec
        assert (spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (32, 4, 2)
        assert (spec.head_dim, spec.value_dim) == (head_dim, head_dim)
        assert (spec.qkv_bias, spec.output_bias) == (qkv_bias, output_bias)
        assert spec.initializer_range == 0.2


def test_bias_of_one_projection_is_found(make_teacher):
    teacher = make_teacher()
    v = teacher.model.layers[1].self_attn.v_proj
    v.bias = torch.nn.Parameter(torch.arange(16.0))
    assert [info.spec.qkv_bias for info in discover_attention(teacher)] == [False, True]
    student = subquad.linearize(teacher, "gla")
    mixer = student.mixer_layers[1].mixer
    expected = torch.cat([torch.arange(8.0)] * 2 + [torch.arange(8.0, 16)] * 2)
    assert torch.equal(mixer.v_proj.bias, expected)
    assert not mixer.q_proj.bias.any()


def euro_bert():
    sizes = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
    try:
        config = EuroBertConfig(**TINY, **sizes)
    except Exception as error:
        pytest.skip(f"EuroBertConfig itself is broken in this version (5.4): {error}")
    return EuroBertForMaskedLM(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: BertForMaskedLM(BertConfig(**TINY)), "BertSelfAttention.* bidirectional attention"),
        (lambda t: euro_bert(), "EuroBertAttention.* bidirectional attention"),
        (lambda t: LlamaModel(t.config), "LlamaModel .* no language modeling head"),
        (lambda t: LlamaForSequenceClassification(t.config), "Classification .* no language modeling head"),
    ],
    ids=["BERT", "EuroBERT", "no head", "classifier"],
)
def test_models_other_than_causal_lms_are_refused(teacher, build, message):
    with pytest.raises(UserError, match=message):
        subquad.linearize(build(teacher), "gla")


def test_gated_queries_are_refused(teacher):
    attention = teacher.model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(32, 64, bias=False)  # query and gate in one, as in Qwen3-Next
    with pytest.raises(UserError, match=r"LlamaForCausalLM .* failed during tracing"):
        subquad.linearize(teacher, "gla")


def wrap_forward(attention, wrapper):
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: wrapper(forward, *args, **kwargs)


def add_residual(forward, *args, **kwargs):
    out, weights = forward(*args, **kwargs)
    return out + kwargs["hidden_states"], weights


def fail(forward, *args, **kwargs):
    raise RuntimeError("no such kernel\nand more lines")


def add_norm_before_output(attention):
    attention.o_proj = torch.nn.Sequential(torch.nn.LayerNorm(32), attention.o_proj)


def add_second_query_projection(attention):
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Linear(32, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: wrap_forward(a, add_residual), "does not return the output of its projection o_proj"),
        (lambda a: wrap_forward(a, fail), "failed during tracing: no such kernel$"),
        (add_norm_before_output, "no projection takes the output of attention"),
        (add_second_query_projection, "its q is not made of channels of a projection"),
    ],
    ids=["residual", "failure", "norm", "two projections"],
)
def test_attention_with_other_computations_is_refused(teacher, change, message):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    change(teacher.model.layers[1].self_attn)
    with pytest.raises(UserError, match=message):
        subquad.linearize(teacher, "gla")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert teacher.config._attn_implementation == "sdpa"


BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61}
GROUPED = {**TINY, "num_key_value_heads": 2, "pad_token_id": 0}
BART = {"vocab_size": 61, "d_model": 32, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"decoder_ffn_dim": 40, "max_position_embeddings": 64}
BART |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
GEMMA3N = {**GROUPED, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "laurel_rank": 4}
GEMMA3N |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "altup_num_inputs": 2}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
LLAMA4 = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 40, "attention_chunk_size": 8192}
REFUSED = {
    "bloom": (BLOOM, "BloomForCausalLM cannot be linearized: "),
    "falcon": ({**TINY, "alibi": True}, "more than a mask is added to its scores"),
    "mpt": (MPT, "Mpt.* cannot be linearized: "),
    "deepseek_v2": (GROUPED, "DeepseekV2.* failed during tracing: The size"),
    "jetmoe": ({**GROUPED, "kv_channels": 8, "num_local_experts": 4}, "its q is not made of channels of a projection"),
    "doge": (GROUPED, "more than a mask is added to its scores"),
    "diffllama": (GROUPED, "4 attention calls in 2 layers|no projection takes the output of attention"),
    "bitnet": (GROUPED, "no projection takes the output of attention"),
    "mamba": (TINY, "its layers are recurrent already"),
    "falcon_h1": (GROUPED, "its layers are recurrent already"),
    "lfm2": ({**GROUPED, "layer_types": ["conv", "full_attention"]}, "1 attention calls in 2 layers"),
    "gpt2": ({**BLOOM, "add_cross_attention": True}, "its student cannot decode with a cache: "),
    "bart": (BART, "BartForCausalLM cannot be linearized: it ignores position_ids"),
    "marian": (BART, "MarianForCausalLM cannot be linearized: it ignores position_ids"),
    "gemma3n_text": (GEMMA3N, "ha(s|ve) no keys and values of (its|their) own"),
    "llama4_text": (LLAMA4, "chunked attention"),
    "emu3": ({"text_config": GROUPED}, "does not build it from a Emu3TextConfig"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_unsupported_architecture_is_refused(architecture):
    sizes, message = REFUSED[architecture]
    try:
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    except (ValueError, AttributeError) as error:
        pytest.skip(f"not in this version of transformers, or broken: {error}")
    with pytest.raises(UserError, match=message) as caught:
        subquad.linearize(teacher, "gla")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["codegen", "xglm"])
def test_attention_without_the_attention_interface(architecture):
    """Further architectures than those in test_architectures.py."""
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 61, "n_positions": 64}
    xglm = {"d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4, "vocab_size": 61}
    config = AutoConfig.for_model(architecture, **(gpt if architecture == "codegen" else xglm))
    teacher = AutoModelForCausalLM.from_config(config).eval()
    student = subquad.linearize(teacher, "gla", scale_ids=SCALE_IDS)
    recorded = layer_activations(teacher, discover_attention(teacher), SCALE_IDS)
    for activations, layer in zip(recorded, student.mixer_layers, strict=True):
        with torch.no_grad():
            assert torch.allclose(layer.mixer.o_proj(activations.head_outputs), activations.output, atol=1e-6)
    if architecture == "xglm":
        k_proj = teacher.model.layers[0].self_attn.k_proj
        assert torch.equal(student.mixer_layers[0].mixer.k_proj.weight, k_proj.weight)
        assert torch.equal(student.mixer_layers[0].mixer.k_proj.bias, k_proj.bias)
    assert logits(student, SCALE_IDS).isfinite().all()


@pytest.mark.parametrize("window", [None, 6, 2047])
@pytest.mark.parametrize("architecture", ["phimoe", "mistral", "gemma2"])
def test_window_longer_than_the_traced_text_is_found(architecture, window):
    """Phi-MoE passes the window to the mask only, not to the attention function."""
    if architecture == "gemma2" and window is None:
        pytest.skip("it always has a window")
    attention_layers = discover_attention(build_teacher(architecture, sliding_window=window))
    assert [info.spec.window for info in attention_layers] == [window, None if architecture == "gemma2" else window]


@pytest.mark.skipif("gemma4_text" not in ARCHITECTURES, reason="not in this version of transformers")
def test_layers_with_different_head_sizes():
    teacher = build_teacher("gemma4_text")
    assert [info.spec.head_dim for info in discover_attention(teacher)] == [8, 8, 16]
    config = subquad.linearize(teacher, "gla", scale_ids=SCALE_IDS).config
    assert config.hidden_size == 32
    assert not hasattr(config, "head_dim")


def test_student_as_teacher_is_refused(teacher):
    with pytest.raises(UserError, match=r"SubquadForCausalLM .* recurrent already"):
        subquad.linearize(subquad.linearize(teacher, "gla"), "gla")


def test_submodule_that_flattens_the_tokens_is_ignored():
    """An expert inside attention that returns `[tokens, channels]`."""
    teacher = build_teacher("llama")
    attention = teacher.model.layers[0].self_attn

    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.flatten(0, 1)

    attention.expert = Flat()

    def call_expert(forward, *args, **kwargs):
        attention.expert(kwargs["hidden_states"])
        return forward(*args, **kwargs)

    wrap_forward(attention, call_expert)
    assert len(discover_attention(teacher)) == 2


def test_discovery_in_bfloat16_equals_float32():
    wide, narrow = build_teacher("gpt_neox"), build_teacher("gpt_neox").bfloat16()
    for a, b in zip(discover_attention(wide), discover_attention(narrow), strict=True):
        assert a.spec == b.spec
        assert all(torch.equal(a.slices[part].rows, b.slices[part].rows) for part in "qkv")
    assert logits(subquad.linearize(narrow, "gla", scale_ids=SCALE_IDS), SCALE_IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["plain", "wide-biased-tied", "mistral", "qwen3"])
def test_attention_probabilities_reproduce_the_teachers_heads(make_teacher, ids, architecture):
    """The targets of stage 1, with a sliding window too."""
    teacher = make_teacher(architecture)
    attention_layers = discover_attention(teacher)
    implementation = teacher.config._attn_implementation
    activations = layer_activations(teacher, attention_layers, ids)
    for info, layer in zip(attention_layers, activations, strict=True):
        attention = info.module
        probabilities = AttentionProbabilities(attention, info.spec.window, 0, layer.args, layer.kwargs)
        P = probabilities()
        assert P.shape == (3, 4, 11, 11)
        some = probabilities(slice(4, 9))
        assert torch.allclose(some, P[:, :, 4:9], atol=1e-6)
        assert torch.allclose(P.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.equal(P, P.tril())
        v = attention.v_proj(layer.hidden_states).unflatten(-1, (2, -1)).repeat_interleave(2, dim=2)
        heads = torch.einsum("bhij,bjhv->bihv", P, v)
        assert torch.allclose(heads.flatten(-2), layer.head_outputs, atol=1e-5)
        assert torch.allclose(attention.o_proj(layer.head_outputs), layer.output, atol=1e-5)
    assert teacher.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
