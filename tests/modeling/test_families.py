"""Reading a teacher's attention by structure, and refusing what is none."""

import pytest
import torch
from family_cases import FAMILIES, build
from modeling_cases import TEXT, logits
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
from subquad.modeling.attention.activations import attention_modules, collect_activations
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.attention.scores import attention_probabilities
from subquad.utils import UserError

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


@pytest.mark.parametrize(
    ("family", "head_dim", "qkv_bias", "output_bias"),
    [
        ("plain", 8, False, False),
        ("wide-biased-tied", 12, True, True),
        ("mistral", 8, False, False),
        ("qwen2", 8, True, False),
        ("qwen3", 12, False, False),
    ],
)
def test_attention_is_found_with_its_layout(make_teacher, family, head_dim, qkv_bias, output_bias):
    teacher = make_teacher(family)
    sites = discover_attention(teacher)
    assert [site.index for site in sites] == [0, 1]
    assert [site.module for site in sites] == [layer.self_attn for layer in teacher.model.layers]
    for site in sites:
        layout = site.spec
        assert (layout.hidden_size, layout.num_heads, layout.num_kv_heads) == (32, 4, 2)
        assert (layout.head_dim, layout.value_dim) == (head_dim, head_dim)
        assert (layout.qkv_bias, layout.output_bias) == (qkv_bias, output_bias)
        assert layout.initializer_range == 0.2


def test_a_bias_of_any_projection_counts(make_teacher):
    teacher = make_teacher()
    v = teacher.model.layers[1].self_attn.v_proj
    v.bias = torch.nn.Parameter(torch.arange(16.0))
    assert [site.spec.qkv_bias for site in discover_attention(teacher)] == [False, True]
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
        (lambda t: BertForMaskedLM(BertConfig(**TINY)), "BertSelfAttention.* looks both ways; expected causal"),
        (lambda t: euro_bert(), "EuroBertAttention.* looks both ways; expected causal attention"),
        (lambda t: LlamaModel(t.config), "LlamaModel .* no head over the vocabulary"),
        (
            lambda t: LlamaForSequenceClassification(t.config),
            "ForSequenceClassification .* no head over the vocabulary",
        ),
    ],
    ids=["BERT", "EuroBERT", "no head", "classifier"],
)
def test_what_does_not_fit_is_refused_with_what_was_missing(teacher, build, message):
    with pytest.raises(UserError, match=message):
        subquad.linearize(build(teacher), "gla")


def test_gated_queries_are_not_taken_for_more_heads(teacher):
    attention = teacher.model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(32, 64, bias=False)  # query and gate in one, as in Qwen3-Next
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be linearized: it failed while its attention was"):
        subquad.linearize(teacher, "gla")


def change(attention, forward):
    """A teacher's attention that does something else inside."""
    own = attention.forward
    attention.forward = lambda *args, **kwargs: forward(own, *args, **kwargs)


def adds_residual(own, *args, **kwargs):
    out, weights = own(*args, **kwargs)
    return out + kwargs["hidden_states"], weights


def fails(own, *args, **kwargs):
    raise RuntimeError("no such kernel\nand much more")


def normed_output(attention):
    attention.o_proj = torch.nn.Sequential(torch.nn.LayerNorm(32), attention.o_proj)


def mixed_queries(attention):
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Linear(32, 32))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda a: change(a, adds_residual), "what it returns is not what its output projection, o_proj, gives"),
        (lambda a: change(a, fails), "failed while its attention was watched: no such kernel$"),
        (normed_output, "a gate or a norm stands between"),
        (mixed_queries, "its q is not made of channels of a projection of the layer's input; its parts are "),
    ],
    ids=["residual", "failure", "norm", "two projections"],
)
def test_attention_that_does_more_is_refused(teacher, break_it, message):
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()]
    break_it(teacher.model.layers[1].self_attn)
    with pytest.raises(UserError, match=message):
        subquad.linearize(teacher, "gla")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert not any(before)
    assert teacher.config._attn_implementation == "sdpa"


BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61}
GROUPED = {**TINY, "num_key_value_heads": 2, "pad_token_id": 0}
BART = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
}
BART |= {"pad_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 64, "decoder_start_token_id": 0}
GEMMA3N = {**GROUPED, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "laurel_rank": 4}
GEMMA3N |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "altup_num_inputs": 2}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
LLAMA4 = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 40, "attention_chunk_size": 8192}
REFUSED = {
    "bloom": (BLOOM, "BloomForCausalLM cannot be linearized: "),
    "falcon": ({**TINY, "alibi": True}, "it adds more to its scores than a mask"),
    "mpt": (MPT, "Mpt.* cannot be linearized: "),
    "deepseek_v2": (GROUPED, "DeepseekV2.* cannot be linearized: it failed while its attention was watched: The size"),
    "jetmoe": ({**GROUPED, "kv_channels": 8, "num_local_experts": 4}, "its q is not made of channels of a projection"),
    "doge": (GROUPED, "it adds more to its scores than a mask"),
    "diffllama": (GROUPED, "4 attentions in 2 layers; expected one a layer|a gate or a norm stands between"),
    "bitnet": (GROUPED, "a gate or a norm stands between"),
    "mamba": (TINY, "its layers keep recurrent states of their own already"),
    "falcon_h1": (GROUPED, "its layers keep recurrent states of their own already"),
    "lfm2": ({**GROUPED, "layer_types": ["conv", "full_attention"]}, "1 attentions in 2 layers; expected one a layer"),
    "gpt2": ({**BLOOM, "add_cross_attention": True}, "its student cannot decode with a cache: "),
    "bart": (BART, "BartForCausalLM cannot be linearized: it ignores position_ids"),
    "marian": (BART, "MarianForCausalLM cannot be linearized: it ignores position_ids"),
    "gemma3n_text": (GEMMA3N, "ha(s|ve) no keys and values of (its|their) own"),
    "llama4_text": (LLAMA4, "it attends within chunks of the text"),
    "emu3": ({"text_config": GROUPED}, "AutoModelForCausalLM does not build it from a Emu3TextConfig"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_does_not_fit_is_refused_with_the_reason(family):
    sizes, message = REFUSED[family]
    try:
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    except (ValueError, AttributeError) as error:
        pytest.skip(f"this version of transformers has it not, or broken: {error}")
    with pytest.raises(UserError, match=message) as caught:
        subquad.linearize(teacher, "gla")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["codegen", "xglm"])
def test_attention_that_is_written_out_is_read(family):
    """Beside those in test_every_family.py."""
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 61, "n_positions": 64}
    xglm = {"d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4, "vocab_size": 61}
    config = AutoConfig.for_model(family, **(gpt if family == "codegen" else xglm))
    teacher = AutoModelForCausalLM.from_config(config).eval()
    student = subquad.linearize(teacher, "gla", scale_ids=TEXT)
    for recording, block in zip(
        collect_activations(teacher, attention_modules(discover_attention(teacher)), TEXT),
        student.mixer_layers,
        strict=True,
    ):
        with torch.no_grad():
            assert torch.allclose(block.mixer.o_proj(recording.heads), recording.output, atol=1e-6)
    if family == "xglm":
        own = teacher.model.layers[0].self_attn.k_proj
        assert torch.equal(student.mixer_layers[0].mixer.k_proj.weight, own.weight)
        assert torch.equal(student.mixer_layers[0].mixer.k_proj.bias, own.bias)
    assert logits(student, TEXT).isfinite().all()


@pytest.mark.parametrize("window", [None, 6, 2047])
@pytest.mark.parametrize("family", ["phimoe", "mistral", "gemma2"])
def test_window_is_found_also_where_the_text_is_too_short_to_show_it(family, window):
    """Phi-MoE tells its attention nothing of it: only the mask is made by it."""
    if family == "gemma2" and window is None:
        pytest.skip("it always has one")
    sites = discover_attention(build(family, sliding_window=window))
    assert [site.spec.window for site in sites] == [window, None if family == "gemma2" else window]


@pytest.mark.skipif("gemma4_text" not in FAMILIES, reason="this transformers has it not")
def test_layers_may_differ_in_their_heads():
    teacher = build("gemma4_text")
    assert [site.spec.head_dim for site in discover_attention(teacher)] == [8, 8, 16]
    config = subquad.linearize(teacher, "gla", scale_ids=TEXT).config
    assert config.hidden_size == 32
    assert not hasattr(config, "head_dim")


def test_a_student_is_no_teacher(teacher):
    with pytest.raises(UserError, match=r"SubquadForCausalLM .* keep recurrent states of their own already"):
        subquad.linearize(subquad.linearize(teacher, "gla"), "gla")


def test_experts_that_see_tokens_in_another_order_do_not_disturb():
    """A part of attention that gives `[tokens, channels]`, beside projections that are found."""
    teacher = build("llama")
    attention = teacher.model.layers[0].self_attn

    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.flatten(0, 1)

    attention.expert = Flat()
    own = attention.forward

    def forward(*args, **kwargs):
        attention.expert(kwargs["hidden_states"])
        return own(*args, **kwargs)

    attention.forward = forward
    assert len(discover_attention(teacher)) == 2


def test_a_teacher_in_bfloat16_is_read_as_in_float32():
    wide, narrow = build("gpt_neox"), build("gpt_neox").bfloat16()
    for a, b in zip(discover_attention(wide), discover_attention(narrow), strict=True):
        assert a.spec == b.spec
        assert all(torch.equal(a.slices[part].rows, b.slices[part].rows) for part in "qkv")
    assert logits(subquad.linearize(narrow, "gla", scale_ids=TEXT), TEXT).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["plain", "wide-biased-tied", "mistral", "qwen3"])
def test_recorded_attention_is_reproduced_by_its_matrix(make_teacher, ids, family):
    """What stage 1 aims at: the teacher's probabilities, sliding window included, give the teacher's heads."""
    teacher = make_teacher(family)
    sites = discover_attention(teacher)
    chosen = teacher.config._attn_implementation
    for site, recording in zip(sites, collect_activations(teacher, attention_modules(sites), ids), strict=True):
        attention = site.module
        P = attention_probabilities(attention, site.spec.window, 0, recording.args, recording.kwargs)
        assert P.shape == (3, 4, 11, 11)
        some = attention_probabilities(attention, site.spec.window, 0, recording.args, recording.kwargs, slice(4, 9))
        assert torch.allclose(some, P[:, :, 4:9], atol=1e-6)
        assert torch.allclose(P.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.equal(P, P.tril())
        v = attention.v_proj(recording.hidden_states).unflatten(-1, (2, -1)).repeat_interleave(2, dim=2)
        heads = torch.einsum("bhij,bjhv->bihv", P, v)
        assert torch.allclose(heads.flatten(-2), recording.heads, atol=1e-5)
        assert torch.allclose(attention.o_proj(recording.heads), recording.output, atol=1e-5)
    assert teacher.config._attn_implementation == chosen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["plain", "wide-biased-tied", "mistral", "qwen2", "qwen3"])
def test_softmax_student_gives_the_teachers_logits(make_teacher, ids, family, implementation):
    teacher = make_teacher(family)
    teacher.set_attn_implementation(implementation)
    student = subquad.linearize(teacher, "softmax")
    assert torch.equal(logits(student, ids), logits(teacher, ids))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 7:] = 0
    expected = logits(teacher, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    real = mask.bool()
    assert torch.allclose(logits(student, ids, attention_mask=mask)[real], expected[real], atol=1e-5)
