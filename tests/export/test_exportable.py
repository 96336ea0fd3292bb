"""`linearize(..., export_target="qwen3_5")`: a student that can be exported from the start, and how it starts."""

import pytest
import torch
import yaml
from export_cases import IRREGULAR, PURE, REGULAR, relative, student_of, teacher_of

import subquad
from subquad.config import Data, load_recipe
from subquad.data import token_rows
from subquad.distill.param_groups import roles
from subquad.export import to_qwen3_5
from subquad.mixers import AttentionSpec, create
from subquad.mixers.norms import fit_bias_direction
from subquad.modeling.layers import NormedProjection
from subquad.utils import UserError
from tests.modeling.modeling_cases import TEXT, logits

LAYOUT = AttentionSpec(24, 2, 1, head_dim=8, value_dim=6, qkv_bias=True, output_bias=True)


def test_the_plan_says_what_the_layers_are():
    student = subquad.linearize(teacher_of("llama"), layer_types=REGULAR, scale_ids=TEXT, export_target="qwen3_5")
    mixer, attention = student.config.layer_specs[:2]
    assert attention == {"mixer": "attention", "qk_norm": 1e-8}
    assert mixer["norm_eps"] == student.config.base_config.rms_norm_eps == 1e-8
    assert mixer["v_activation"] == mixer["qk_activation"] == "silu"
    assert mixer["biases"] is mixer["rotary"] is False
    of_qwen3 = subquad.linearize(teacher_of("qwen3"), layer_types=REGULAR, scale_ids=TEXT, export_target="qwen3_5")
    assert of_qwen3.config.layer_specs[1] == {"mixer": "attention"}


def test_options_that_do_not_matter_there_are_free():
    layers = {"default": {"mixer": "gated_deltanet", "short_conv": 3, "half_life": 7.0}}
    student = subquad.linearize(teacher_of("llama"), layer_types=layers, scale_ids=TEXT, export_target="qwen3_5")
    assert student.config.layer_specs[0]["half_life"] == 7.0
    assert to_qwen3_5(student).config.linear_conv_kernel_dim == 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"export_target": "qwen35"}, "export: unknown 'qwen35'; did you mean 'qwen3_5'"),
        (
            {"mixer": "gla", "export_target": "qwen3_5"},
            "gla cannot be exported to Qwen3.5; supported layers: gated_delta",
        ),
        ({"mixer": "softmax", "export_target": "qwen3_5"}, "softmax cannot be exported"),
        ({"rotary": True, "export_target": "qwen3_5"}, "layer 0: rotary: got True, but a layer of Qwen3.5 has False"),
        (
            {"layer_types": {"default": "gated_deltanet", "1": {"mixer": "attention", "window": 4}}},
            "layer 1: .* window",
        ),
    ],
    ids=lambda value: "",
)
def test_what_cannot_go_is_refused_at_the_start(how, message):
    with pytest.raises(UserError, match=message):
        subquad.linearize(teacher_of("llama"), scale_ids=TEXT, **{"export_target": "qwen3_5", **how})


def test_a_mixer_without_biases_has_none():
    mixer = create("gated_deltanet", LAYOUT, v_activation="silu", biases=False, norm_eps=1e-5)
    assert not any(name.endswith("bias") and name != "dt_bias" for name, _ in mixer.named_parameters())
    mixer.init_from_teacher(torch.tensor([0.5, 0.02]), torch.randn(100, 24) + 2.0)
    assert mixer.norm_eps == 1e-5
    scale = mixer.v_conv[:, -1].unflatten(0, (2, 6))
    assert torch.allclose(scale, torch.tensor([[0.2], [5.0]]).expand(2, 6))


def test_gates_without_biases_start_near_where_gates_with_biases_do():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 24, generator=generator) * 0.5 + torch.randn(24, generator=generator)
    options = {"v_activation": "silu", "beta_init": 0.1}
    mixer = create("gated_deltanet", LAYOUT, biases=False, **options)
    mixer.init_from_teacher(torch.ones(2), x[:300])
    unseen = x[None, 300:]
    core, _ = mixer.op_inputs(unseen, None, None, None)
    assert abs(core["beta"].mean() - 0.1) < 0.03
    assert core["beta"].max() < 0.3
    gate = mixer.output_gate(unseen)
    assert abs(gate.mean() - 1) < 0.15
    assert gate.std() < 0.4


def test_the_constant_direction_is_the_same_from_few_tokens_and_from_many_channels():
    x = torch.randn(10, 30, generator=torch.Generator().manual_seed(0)) + 1
    repeated = x.repeat(4, 1)  # more tokens than channels: solved the other way, to the same end
    assert torch.allclose(fit_bias_direction(x), fit_bias_direction(repeated), atol=1e-5)


def test_the_norms_of_the_layers_have_the_mixers_epsilon_and_the_teachers_keep_theirs():
    teacher = teacher_of("qwen3", rms_norm_eps=1e-5)
    student = subquad.linearize(teacher, layer_types=REGULAR, scale_ids=TEXT, export_target="qwen3_5")
    assert {m.variance_epsilon for m in student.modules() if hasattr(m, "variance_epsilon")} == {1e-8}
    assert {m.variance_epsilon for m in teacher.modules() if hasattr(m, "variance_epsilon")} == {1e-5}
    assert teacher.config.rms_norm_eps == 1e-5
    assert to_qwen3_5(student).config.rms_norm_eps == 1e-8


@pytest.mark.parametrize("layers", [PURE, IRREGULAR], ids=["pure", "hybrid"])
def test_it_is_saved_and_loaded(layers, tmp_path):
    student = student_of("llama", layers)
    student.save_pretrained(tmp_path)
    loaded = subquad.SubquadForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(loaded, ids), logits(student, ids))


def test_attention_that_is_kept_starts_at_the_teachers_mean_norms():
    teacher = teacher_of("llama")
    student = subquad.linearize(teacher, layer_types=REGULAR, scale_ids=TEXT, export_target="qwen3_5")
    attention, own = student.mixer_layers[1].attention, teacher.model.layers[1].self_attn
    seen = []
    hook = own.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    logits(teacher, TEXT)
    hook.remove()
    for name in ("q_proj", "k_proj"):
        added = getattr(attention, name)
        assert isinstance(added, NormedProjection)
        mean = getattr(own, name)(seen[0]).square().mean().sqrt()
        assert torch.allclose(added.norm.weight, mean.expand(16), rtol=1e-4)
        assert torch.equal(added.projection.weight, getattr(own, name).weight)


def test_norms_that_were_added_are_new_and_learn():
    student = subquad.linearize(
        teacher_of("llama"), layer_types=REGULAR, scale_ids=TEXT, export_target="qwen3_5"
    ).train()
    added = student.mixer_layers[1].added_qk_norms()
    assert sorted(added) == ["k", "q"]
    known = roles(student)
    assert {known[id(p)] for p in added.values()} == {"mixer"}
    assert known[id(student.mixer_layers[1].attention.q_proj.projection.weight)] == "attention_projections"
    student(input_ids=TEXT, labels=TEXT).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in added.values())


def test_a_norm_that_cannot_be_added_is_refused():
    with_norm = {"default": "gla", "1": {"mixer": "attention", "qk_norm": 1e-6}}
    with pytest.raises(UserError, match="qk_norm: Qwen3Attention of layer 1"):
        subquad.linearize(teacher_of("qwen3"), layer_types=with_norm, scale_ids=TEXT)
    with pytest.raises(UserError, match="qk_norm: got True"):
        subquad.linearize(
            teacher_of("llama"), layer_types={"default": {"mixer": "attention", "qk_norm": True}}, scale_ids=TEXT
        )


@pytest.mark.slow
def test_calibration_brings_it_nearer_to_the_teacher():
    teacher, tokenizer = subquad.load_teacher("nano")
    corpus = Data(source="python-stdlib", seq_len=512)
    text, held_out = (token_rows(corpus, tokenizer, split, limit=2**16) for split in ("train", "validation"))
    rows = torch.stack([held_out[i]["input_ids"] for i in range(2)])
    calibration = torch.stack([text[i]["input_ids"] for i in range(4)])
    plain = subquad.linearize(teacher, scale_ids=calibration, export_target="qwen3_5").eval()
    student = subquad.linearize(teacher, calibration_ids=calibration, export_target="qwen3_5").eval()
    with torch.no_grad():
        before, after = (m(rows, labels=rows, use_cache=False).loss.item() for m in (plain, student))
    assert after < before - 0.2
    assert relative(logits(to_qwen3_5(student), rows), logits(student, rows)) < 1e-5


def test_calibration_keeps_it_exportable():
    teacher = teacher_of("llama")
    text = torch.randint(3, 61, (4, 32), generator=torch.Generator().manual_seed(1))
    plain = subquad.linearize(teacher, scale_ids=text[:1], export_target="qwen3_5").eval()
    student = subquad.linearize(teacher, calibration_ids=text, export_target="qwen3_5").eval()
    assert student.config.layer_specs == plain.config.layer_specs
    assert any(
        not torch.equal(a.mixer.v_conv, b.mixer.v_conv)
        for a, b in zip(student.mixer_layers, plain.mixer_layers, strict=True)
    )
    assert relative(logits(to_qwen3_5(student), text), logits(student, text)) < 1e-5


def test_the_recipes_key(tmp_path):
    recipe = {
        "teacher": "nano",
        "data": {"source": "python-stdlib"},
        "student": {"export_target": "qwen3_5"},
        "stages": {"hidden": {"tokens": 64, "lr": 1e-3}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert load_recipe(path).student.export_target == "qwen3_5"
    with pytest.raises(UserError, match=r"student\.export_target: gla cannot be exported to Qwen3\.5"):
        load_recipe(path, ["student.mixer=gla"])
    with pytest.raises(UserError, match=r"student\.export_target: gla cannot be exported to Qwen3\.5"):
        load_recipe(path, ["student.layer_types={default: gated_deltanet, 0: gla}"])
    with pytest.raises(UserError, match=r"student\.export"):
        load_recipe(path, ["student.export_target=gguf"])
