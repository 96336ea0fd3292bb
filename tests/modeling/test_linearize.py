"""`linearize`: what is copied, what is random, what is kept, and that the teacher is unchanged."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import subquad
from subquad import SubquadForCausalLM, mixers
from subquad.modeling.attention.activations import record_modules
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.layers import MixerLayer
from subquad.modeling.linearize import sample_tokens
from subquad.utils import UserError
from tests.helpers.students import MIXERS, MIXERS_AND_SOFTMAX, SCALE_IDS, checksum, logits, reloaded


@pytest.mark.parametrize("mixer", MIXERS_AND_SOFTMAX)
@pytest.mark.parametrize("copy_qkv", [True, False], ids=["copied", "random"])
def test_teacher_is_unchanged(make_teacher, mixer, copy_qkv):
    teacher = make_teacher("wide-biased-tied").train()
    teacher.model.layers[0].eval()  # modules in different modes
    teacher.model.layers[1].self_attn.requires_grad_(False)
    before = checksum(teacher), teacher.config.to_dict(), copy.deepcopy(teacher.generation_config.to_dict())
    modes = [m.training for m in teacher.modules()]
    trained = [p.requires_grad for p in teacher.parameters()]
    student = subquad.linearize(teacher, mixer, copy_qkv)
    assert (checksum(teacher), teacher.config.to_dict(), teacher.generation_config.to_dict()) == before
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == trained
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    storages = {p.data_ptr() for p in teacher.parameters()}
    assert not any(p.data_ptr() in storages for p in student.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_passed_attention_layers_give_the_same_student(make_teacher, ids, monkeypatch):
    teacher = make_teacher("qwen3")
    expected = subquad.linearize(teacher, "gla", calibration_ids=ids)
    attention_layers = discover_attention(teacher)
    monkeypatch.setattr("subquad.modeling.linearize.discover_attention", None)  # it is not called again
    student = subquad.linearize(teacher, "gla", calibration_ids=ids, attention_layers=attention_layers)
    assert student.config.to_dict() == expected.config.to_dict()
    assert checksum(student) == checksum(expected)
    with pytest.raises(ValueError, match="attention_layers"):
        subquad.linearize(make_teacher("qwen3"), "gla", attention_layers=attention_layers)


@pytest.mark.parametrize("mixer", MIXERS)
def test_projections_are_random_without_copy_qkv(make_teacher, mixer):
    teacher = make_teacher("wide-biased-tied")
    student = subquad.linearize(teacher, mixer, copy_qkv=False, scale_ids=SCALE_IDS)
    copied = subquad.linearize(teacher, mixer, scale_ids=SCALE_IDS)
    for mixer_layer, other in zip(student.mixer_layers, copied.mixer_layers, strict=True):
        for part, projection in mixer_layer.mixer.projections().items():
            assert not torch.isclose(projection.weight, other.mixer.projections()[part].weight).float().mean() > 0.01
            assert float(projection.weight.detach().std()) == pytest.approx(0.2, rel=0.15)
            assert not projection.bias.any()
        assert torch.equal(mixer_layer.mixer.o_norm, other.mixer.o_norm)


@pytest.mark.parametrize("copy_qkv", [True, False], ids=["copied", "random"])
@pytest.mark.parametrize("mixer", MIXERS_AND_SOFTMAX)
@pytest.mark.parametrize("family", ["plain", "wide-biased-tied"])
def test_everything_outside_attention_is_identical(make_teacher, family, mixer, copy_qkv):
    teacher = make_teacher(family)
    student = subquad.linearize(teacher, mixer, copy_qkv, scale_ids=SCALE_IDS)
    outside = {k: v for k, v in teacher.state_dict().items() if ".self_attn." not in k}
    found = {k.removeprefix("base."): v for k, v in student.state_dict().items() if ".self_attn." not in k}
    assert found.keys() == outside.keys()
    assert all(torch.equal(found[k], v) for k, v in outside.items())
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == teacher.config.tie_word_embeddings


def test_resized_embeddings_and_replaced_head_are_kept(teacher, ids):
    """`transformers` does not mark modules that are added later as initialized."""
    teacher.resize_token_embeddings(70)
    teacher.lm_head = torch.nn.Linear(32, 70, bias=False)
    teacher.model.norm = type(teacher.model.norm)(32)
    torch.nn.init.normal_(teacher.model.norm.weight)
    student = subquad.linearize(teacher, "softmax")
    assert torch.equal(logits(student, ids), logits(teacher, ids))


@pytest.mark.parametrize("family", ["plain", "wide-biased-tied"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_output_norms_are_set_to_the_teachers_rms_per_head(make_teacher, ids, mixer, family):
    teacher = make_teacher(family)
    student = subquad.linearize(teacher, mixer, scale_ids=ids)
    with record_modules(teacher.modules()) as recorded:
        logits(teacher, ids)
    for layer, mixer_layer in zip(teacher.model.layers, student.mixer_layers, strict=True):
        heads = recorded[layer.self_attn.o_proj].hidden_states
        rms = heads.unflatten(-1, (4, -1)).square().mean((0, 1, 3)).sqrt()
        gate = 0.5 if mixer in ("xlstm", "kda") else 1.0  # the sigmoid gate after the norm starts at 0.5
        assert torch.allclose(
            mixer_layer.mixer.o_norm * gate, rms[:, None].expand_as(mixer_layer.mixer.o_norm), rtol=1e-5
        )


def test_scale_on_sampled_text_is_close_to_scale_ids(teacher, ids):
    """The scale on sampled text has the right order of magnitude."""
    measured = subquad.linearize(teacher, "gla", scale_ids=ids).mixer_layers[1].mixer.o_norm
    sampled = subquad.linearize(teacher, "gla").mixer_layers[1].mixer.o_norm
    assert ((sampled / measured) > 0.3).all()
    assert ((sampled / measured) < 3).all()


def test_sample_tokens_is_reproducible_and_follows_the_logits(teacher):
    tokens = sample_tokens(teacher, rows=4, length=6)
    assert tokens.shape == (4, 6)
    assert torch.equal(tokens, sample_tokens(teacher, rows=4, length=6))
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
        teacher.lm_head.weight[7] = 1e4 * torch.sign(torch.randn(32))
        teacher.model.norm.weight.zero_()
    assert sample_tokens(teacher, rows=64, length=2).unique().numel() > 20  # uniform


@pytest.mark.parametrize("mixer", MIXERS_AND_SOFTMAX)
def test_seed_determines_the_student_and_leaves_the_global_state(teacher, mixer):
    text = None if mixer == "gla" else SCALE_IDS  # once with sampled text
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = subquad.linearize(teacher, mixer, copy_qkv=False, scale_ids=text, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert checksum(subquad.linearize(teacher, mixer, copy_qkv=False, scale_ids=text, seed=3)) == checksum(first)
    assert checksum(subquad.linearize(teacher, mixer, copy_qkv=False, scale_ids=text, seed=4)) != checksum(first)


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
def test_softmax_without_copy_qkv_is_random(make_teacher, tmp_path, loaded):
    teacher = make_teacher("wide-biased-tied")
    if loaded:  # `transformers` does not initialize weights that it has loaded
        teacher = reloaded(teacher, tmp_path)
    student = subquad.linearize(teacher, "softmax", copy_qkv=False)
    for layer, mixer_layer in zip(teacher.model.layers, student.mixer_layers, strict=True):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            drawn, own = getattr(mixer_layer.attention, part), getattr(layer.self_attn, part)
            assert not torch.isclose(drawn.weight, own.weight).float().mean() > 0.01
            assert float(drawn.weight.detach().std()) == pytest.approx(0.2, rel=0.15)
            assert not drawn.bias.any()


@pytest.mark.parametrize("mixer", MIXERS_AND_SOFTMAX)
def test_bfloat16_teacher_gives_a_bfloat16_student(make_teacher, ids, mixer):
    teacher = make_teacher("wide-biased-tied").to(torch.bfloat16)
    student = subquad.linearize(teacher, mixer, scale_ids=SCALE_IDS)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    found = logits(student, ids)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    if mixer == "softmax":
        assert torch.equal(found, logits(teacher, ids))


@pytest.mark.parametrize("mixer", MIXERS)
def test_options_reach_mixer_and_config(teacher, mixer):
    student = subquad.linearize(teacher, mixer, short_conv=2, qk_activation="none", scale_ids=SCALE_IDS)
    assert student.config.layer_specs == [{"mixer": mixer, "short_conv": 2, "qk_activation": "none"}] * 2
    for mixer_layer in student.mixer_layers:
        assert isinstance(mixer_layer, MixerLayer)
        assert type(mixer_layer.mixer) is mixers.get(mixer)
        assert mixer_layer.mixer.options.short_conv == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "gal"}, "unknown mixer 'gal'; did you mean 'gla'"),
        ({"mixer": "gla", "decay_rnk": 3}, "unknown mixer option 'decay_rnk'; did you mean 'decay_rank'"),
        ({"mixer": "gla", "short_conv": "4"}, "short_conv: got '4'"),
        ({"mixer": "softmax", "short_conv": 4}, "short_conv: unknown option; softmax has none"),
    ],
)
def test_wrong_mixer_or_option_is_refused(teacher, arguments, message):
    with pytest.raises(UserError, match=message):
        subquad.linearize(teacher, **arguments)


def test_teacher_with_a_quantizer_linearizes_and_saves(make_teacher, ids, tmp_path):
    """`transformers` leaves such a quantizer on a model read from GGUF, which refuses `save_pretrained`."""
    teacher = make_teacher("wide-biased-tied")
    expected = logits(subquad.linearize(teacher, "gla", scale_ids=ids), ids)

    class Quantizer:
        quantization_config = {"quant_method": "gguf"}  # noqa: RUF012
        is_serializable = False

    teacher.hf_quantizer = Quantizer()
    teacher.quantization_method = "gguf"
    teacher.is_quantized = True
    teacher.config.quantization_config = Quantizer.quantization_config
    loaded = reloaded(subquad.linearize(teacher, "gla", scale_ids=ids), tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    assert teacher.is_quantized
    assert hasattr(teacher.config, "quantization_config")
    assert not hasattr(loaded.config.base_config, "quantization_config")


def test_student_has_the_teachers_training_mode(teacher):
    assert not subquad.linearize(teacher, "gla").training
    assert subquad.linearize(teacher.train(), "gla").training


@pytest.mark.parametrize("build", [SubquadForCausalLM, AutoModelForCausalLM.from_config], ids=["class", "auto"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_model_built_from_config_is_at_the_neutral_initialization(teacher, mixer, build):
    student = subquad.linearize(teacher, mixer, copy_qkv=False, scale_ids=SCALE_IDS)
    fresh = dict(build(student.config).named_parameters())
    assert all(parameter.isfinite().all() for parameter in fresh.values())
    drawn = ("_proj.weight", "decay_down.weight", "o_norm")
    for name, parameter in student.named_parameters():
        if ".mixer." in name and not name.endswith(drawn):
            assert torch.equal(fresh[name], parameter), name
