"""Near and far as four papers define them, written out here in float64 over whole sequences, against layers with the
options of their recipes (`subquad/recipes/{lolcats,liger,lizard,xlstm}.yaml`); and those recipes for a few steps."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from subquad.config import load_recipe
from subquad.distill.pipeline import distill
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from tests.helpers.architectures import build_teacher
from tests.helpers.near_far import near_far_student, near_far_types
from tests.helpers.recipes import tiny_recipe
from tests.helpers.students import all_close

RECIPES = Path(__file__).parents[2] / "subquad" / "recipes"
T, WINDOW = 23, 5


def layer_and_inputs(mixer, sharpness=1.0, window=WINDOW, **options):
    """A layer with noise in its memory and merge, x `[2, T, 32]`, cos and sin. sharpness: a factor of the queries."""
    torch.manual_seed(0)
    teacher = build_teacher("llama").double()
    layer = near_far_student(teacher, near_far_types(mixer, window, output_norm=False, **options)).mixer_layers[1]
    x = torch.randn(2, T, 32, dtype=torch.float64)
    cos, sin = teacher.model.rotary_emb(x, torch.arange(T)[None])
    with torch.no_grad():
        layer.attention.q_proj.weight *= sharpness
    return layer.requires_grad_(False), x, cos, sin


def rotated(layer, x, cos, sin):
    """q, k and v, each `[2, H, T, D]`, q and k with the rotary embedding."""
    queries = layer.spec.num_heads // layer.spec.num_kv_heads
    q, k, v = (
        getattr(layer.attention, f"{name}_proj")(x).unflatten(-1, (-1, layer.spec.head_dim)).transpose(1, 2)
        for name in "qkv"
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q, k.repeat_interleave(queries, 1), v.repeat_interleave(queries, 1)


def output(layer, heads):
    return layer.attention.o_proj(heads.transpose(1, 2).flatten(2))


def result(layer, x, cos, sin):
    return layer(hidden_states=x, position_embeddings=(cos, sin))[0]


def distances(t=T):
    return torch.arange(t)[:, None] - torch.arange(t)


def window_softmax(q, k, v, window=WINDOW):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    seen = (distances() >= 0) & (distances() < window)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def decayed(decay):
    """The product of `decay: [..., T]` over the tokens after s, up to t: `[..., t, s]`; 0 for s > t."""
    total = decay.log().cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).exp() * (distances() >= 0)


def elu1(x):
    return F.elu(x) + 1


def hedgehog(layer, name, x):
    """LoLCATs' learned feature map of each query head, with the weights of `layer`: x `[2, H, T, D]`."""
    maps = getattr(layer.mixer, f"{name}_map")
    features = [(sign * torch.einsum("bhtd,hfd->bhtf", x, maps)).exp() for sign in (1, -1)]
    return torch.cat([f / f.sum(-1, keepdim=True) for f in features], -1)


def lolcats_equation_6(layer, q, k, v, gamma, subtract_largest):
    """LoLCATs, equation 6: c_n is the largest score in the window (`hybrid_attention_quadratic` of its code)."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    seen, outside = (distances() >= 0) & (distances() < WINDOW), distances() >= WINDOW
    scores = scores.masked_fill(~seen, -torch.inf)
    c = scores.amax(-1, keepdim=True) if subtract_largest else 0.0
    weights = (
        gamma[:, None, None] * (scores - c).exp() + (hedgehog(layer, "q", q) @ hedgehog(layer, "k", k).mT) * outside
    )
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("merge", ["lolcats", "denominator"])
def test_lolcats(merge, sharpness):
    """`lolcats` is the paper's form with its stabilisation, `denominator` the form without: with sharp attention they
    are far apart."""
    layer, *inputs = layer_and_inputs(
        "linear_attention", sharpness, merge=merge, qk_activation="hedgehog", expand_k=0.5
    )
    q, k, v = rotated(layer, *inputs)
    gamma = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    layer.merge.log_scale.copy_((layer.spec.head_dim**0.5 / gamma).log())
    forms = [output(layer, lolcats_equation_6(layer, q, k, v, gamma, largest)) for largest in (True, False)]
    found = result(layer, *inputs)
    assert all_close(found, forms[merge == "denominator"], 1e-9)
    assert not all_close(found, forms[merge == "lolcats"], 1e-2)


def test_lolcats_starts_with_the_factor_of_its_code():
    layer, *inputs = layer_and_inputs("linear_attention", merge="lolcats", qk_activation="hedgehog", expand_k=2)
    layer.merge.reset_parameters()
    q, k, v = rotated(layer, *inputs)
    expected = lolcats_equation_6(layer, q, k, v, torch.full((4,), 0.1, dtype=torch.float64), True)
    assert all_close(result(layer, *inputs), output(layer, expected), 1e-9)


def test_liger():
    """Equation 9 of Liger: half of a gated recurrent memory of all tokens, half of attention to a window, from the
    first token; with GLA's own gates, elu + 1 and a scale of 1 / sqrt(K)."""
    options = {"merge": "fixed", "memory": "all", "qk_activation": "elu1"}
    layer, *inputs = layer_and_inputs("gla", **options)
    q, k, v = rotated(layer, *inputs)
    gates = layer.mixer.decay_up(layer.mixer.decay_down(inputs[0])).sigmoid() ** (1 / 16)
    decay = decayed(gates.unflatten(-1, (4, -1)).permute(0, 2, 3, 1)).permute(0, 1, 3, 4, 2)  # [B, H, t, s, K]
    weights = torch.einsum("bhtd,bhsd,bhtsd->bhts", elu1(q), elu1(k), decay) / layer.spec.head_dim**0.5
    expected = 0.5 * window_softmax(q, k, v) + 0.5 * weights @ v
    assert all_close(result(layer, *inputs), output(layer, expected), 1e-9)


def gated_average(layer, x, q, k, v):
    """Linear attention with a scalar forget gate and an exponential input gate a head, divided by its sum."""
    forget = layer.mixer.f_proj(x).transpose(1, 2).sigmoid()
    write = layer.mixer.i_proj(x).transpose(1, 2).exp()
    weights = (hedgehog(layer, "q", q) @ hedgehog(layer, "k", k).mT) * decayed(forget) * write[..., None, :]
    return weights @ v / weights.sum(-1, keepdim=True)


def test_lizard():
    """Gated linear attention, divided by its own sum, plus attention to a window: the paper's gate of a token is that
    of xlstm's forget gate, for each head; its alpha and meta-memory have no counterpart."""
    options = {"merge": "add", "memory": "all", "qk_activation": "hedgehog", "input_gate_bias": 9.0}
    layer, *inputs = layer_and_inputs("xlstm", **options)
    q, k, v = rotated(layer, *inputs)
    expected = gated_average(layer, inputs[0], q, k, v) + window_softmax(q, k, v)
    assert all_close(result(layer, *inputs), output(layer, expected), 1e-9)


def test_xlstm():
    """Equation 11: a scalar gate a head between mLSTM over all tokens and attention to a window, from the first token;
    the lower bound of ours on the normalizer is below it (`input_gate_bias`), and the merge's `u` is 0."""
    options = {"merge": "mass", "memory": "all", "qk_activation": "hedgehog", "input_gate_bias": 9.0}
    layer, *inputs = layer_and_inputs("xlstm", **options)
    layer.merge.lse_weight.zero_()
    q, k, v = rotated(layer, *inputs)
    gate = layer.merge.m_proj(inputs[0]).sigmoid().transpose(1, 2).unsqueeze(-1)
    expected = gate * gated_average(layer, inputs[0], q, k, v) + (1 - gate) * window_softmax(q, k, v)
    assert all_close(result(layer, *inputs), output(layer, expected), 1e-9)
    layer.mixer.i_proj.bias.fill_(-math.inf)  # nothing is written: the bound of 1 makes the memory's output zero
    assert all_close(result(layer, *inputs), output(layer, (1 - gate) * window_softmax(q, k, v)), 1e-9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The directory of a tiny teacher and its text."""
    return tiny_recipe(tmp_path_factory.mktemp("data")).parent


@pytest.mark.parametrize("name", ["lolcats", "liger", "lizard", "xlstm"])
def test_recipes_train(name, data, tmp_path):
    """A few steps of every stage lower the loss on validation text; the student is loaded as it was saved."""
    path = RECIPES / f"{name}.yaml"
    sections = load_recipe(path).stages.model_dump(exclude_none=True)
    changes = [
        f"teacher={data / 'teacher'}",
        f"data={{source: {data / 'text.txt'}, seq_len: 48}}",
        "student.mixer_kwargs.window=6",
        "evaluation.eval_tokens=192",
        *(f"stages.{stage}.tokens=192" for stage in sections),
    ]
    found = distill(load_recipe(path, changes), tmp_path / "run")
    assert found["perplexity"] < found["perplexity_at_init"]
    specs = SubquadForCausalLM.from_pretrained(tmp_path / "run").config.layer_specs
    assert all(spec["merge"] == load_recipe(path).student.mixer_kwargs["merge"] for spec in specs)
