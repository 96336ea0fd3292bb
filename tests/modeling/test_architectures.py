"""Properties of students of every architecture, with a few layer types. (Every mixer with one architecture:
test_generation.py, test_linearize.py, test_saving.py.)"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subquad
from subquad.analysis.ablations import ablation_results
from subquad.analysis.diagnostics import diagnostics_results
from subquad.evaluate.results import select
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.attention.tracing import find_max_learned_positions, random_tokens, trace_attention
from subquad.utils import UserError
from tests.helpers.architectures import (
    ARCHITECTURES,
    COMPUTE_ATTENTION,
    HAS_EXPERTS,
    LAYER_TYPES,
    LEARNED_POSITIONS,
    build_teacher,
    cached_student,
    cached_teacher,
    students_of,
)
from tests.helpers.results import select_one
from tests.helpers.students import (
    MIXERS,
    SCALE_IDS,
    all_close,
    check_gradient_checkpointing,
    in_pieces,
    logits,
    make_student,
    reloaded,
)
from tests.helpers.teachers import layer_activations

each_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)
each_student = pytest.mark.parametrize(("model_type", "layer_types"), students_of(*LAYER_TYPES))
each_with_attention = pytest.mark.parametrize(("model_type", "layer_types"), students_of("hybrid", "local", "near_far"))


@pytest.fixture
def ids():
    """`[3, 17]` tokens without special ones, longer than the windows."""
    return torch.randint(3, 61, (3, 17), generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------- copied weights


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "starcoder2")  # one sequence of kernels: equal to the last bit
IMPLEMENTATIONS = [(model_type, name) for model_type in FAMILIES for name in ("sdpa", "eager")]


@pytest.mark.parametrize(("model_type", "implementation"), [(n, None) for n in ARCHITECTURES] + IMPLEMENTATIONS)
def test_softmax_student_has_the_teachers_logits(model_type, implementation, ids):
    teacher = build_teacher(model_type)
    if implementation is not None:
        teacher.set_attn_implementation(implementation)
    control = subquad.linearize(teacher, "softmax", scale_ids=SCALE_IDS)
    assert all_close(logits(control, ids), logits(teacher, ids), 1e-20 if implementation else 1e-5)
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, 12:] = 0, 0
    expected = logits(teacher, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    real = mask.bool()
    assert all_close(logits(control, ids, attention_mask=mask)[real], expected[real], 1e-5 if implementation else 1e-4)


def project(model_type, attention, x, spec):
    """q, k and v `[B, T, heads, channels]` before norms and rotary embedding, as each architecture computes them."""
    H, G, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if model_type == "gpt_neox":
        return attention.query_key_value(x).unflatten(-1, (H, 3 * D)).chunk(3, dim=-1)
    if model_type == "persimmon":
        return attention.query_key_value(x).unflatten(-1, (H, 3, D)).unbind(-2)
    if model_type == "gpt2":
        return (part.unflatten(-1, (H, D)) for part in attention.c_attn(x).split(H * D, dim=-1))
    if model_type == "falcon":
        return attention.query_key_value(x).unflatten(-1, (H + 2, D)).split([H, 1, 1], dim=-2)
    if model_type in ("phi3", "gpt_bigcode"):
        qkv = (attention.qkv_proj if model_type == "phi3" else attention.c_attn)(x)
        return (part.unflatten(-1, (-1, D)) for part in qkv.split([H * D, G * D, G * D], dim=-1))
    return (getattr(attention, f"{part}_proj")(x).unflatten(-1, (-1, D)) for part in "qkv")


@pytest.mark.parametrize(
    ("model_type", "mixer"), [(n, "gla") for n in ARCHITECTURES] + [(n, m) for n in FAMILIES for m in MIXERS]
)
@pytest.mark.parametrize("state_heads", ["query", "key_value"])
def test_copied_projections_have_the_teachers_outputs(model_type, mixer, state_heads, ids):
    teacher = build_teacher(model_type)
    if model_type not in HAS_EXPERTS:  # experts have no float64 kernel
        teacher.double()
    copied = subquad.linearize(teacher, mixer, scale_ids=SCALE_IDS, state_heads=state_heads)
    attention_layers = discover_attention(teacher)
    activations = layer_activations(teacher, attention_layers, ids)
    for info, layer, recorded in zip(attention_layers, copied.mixer_layers, activations, strict=True):
        spec, x, projections = info.spec, recorded.hidden_states, layer.mixer.projections()
        groups = spec.num_heads // spec.num_kv_heads if state_heads == "query" else 1
        with torch.no_grad():
            q, k, v = project(model_type, info.module, x, spec)
            expected = {"q": q, "v": v.repeat_interleave(groups, 2)}
            if mixer not in ("metala", "hgrn2"):
                expected["k"] = k.repeat_interleave(groups, 2)
            assert projections.keys() == {*expected, "o"}
            for part, wanted in expected.items():
                assert all_close(projections[part](x), wanted.flatten(2), 1e-6), part
            assert all_close(projections["o"](recorded.head_outputs), recorded.output, 1e-6)


# ---------------------------------------------------------------------- students


@each_student
def test_cached_decoding_equals_the_full_forward(model_type, layer_types, ids):
    model = cached_student(model_type, layer_types)
    assert all_close(in_pieces(model, ids, [5, 1, 1, 1, 4, 1, 1, 3]), logits(model, ids, use_cache=False))


@each_student
def test_padded_rows_and_packed_documents_match_separate_forwards(model_type, layer_types, ids):
    model = cached_student(model_type, layer_types)
    mask = torch.ones_like(ids)
    mask[0, :8], mask[1, 10:] = 0, 0
    found = logits(model, ids, attention_mask=mask)
    for row in range(3):
        real = mask[row].bool()
        assert all_close(found[row, real], logits(model, ids[row : row + 1, real])[0])
    positions = torch.cat([torch.arange(9), torch.arange(8)])
    found = logits(model, ids[:1], position_ids=positions[None], use_cache=False)
    for document in (slice(0, 9), slice(9, 17)):
        assert all_close(found[:, document], logits(model, ids[:1, document]))


@each_with_attention
def test_greedy_and_beam_search(model_type, layer_types, ids):
    model = cached_student(model_type, layer_types)
    settings = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    padded, mask = ids[:2, :9].clone(), torch.ones(2, 9, dtype=torch.long)
    padded[0, :4], mask[0, :4] = 0, 0
    found = model.generate(padded, attention_mask=mask, max_new_tokens=6, **settings)
    alone = model.generate(padded[:1, 4:], max_new_tokens=6, **settings)
    assert torch.equal(found[0, 9:], alone[0, 5:])
    settings["num_beams"] = 3
    found = model.generate(padded, attention_mask=mask, max_new_tokens=4, **settings)
    without = model.generate(padded, attention_mask=mask, max_new_tokens=4, use_cache=False, **settings)
    assert torch.equal(found, without)


@each_student
def test_saved_and_loaded_student_has_the_same_weights(model_type, layer_types, ids, tmp_path):
    model = cached_student(model_type, layer_types)
    loaded = reloaded(model, tmp_path)
    assert loaded.config.layer_specs == model.config.layer_specs
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
        tensor.data = tensor.data.clone()  # alignment in the mapped file changes which kernel runs
    tied, expected = (
        m.get_output_embeddings().weight is m.get_input_embeddings().weight
        for m in (loaded, cached_teacher(model_type))
    )
    assert tied == expected
    assert all_close(logits(loaded, ids), logits(model, ids), 1e-5)


@each_with_attention
def test_gradient_checkpointing_gives_the_same_gradients(model_type, layer_types, ids):
    check_gradient_checkpointing(
        make_student(cached_teacher(model_type), layer_types=LAYER_TYPES[layer_types]), ids, 1e-5
    )


class AssertNoQuadraticTensor(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                assert sum(size >= LONG for size in tensor.shape) < 2, f"{func} returns {list(tensor.shape)}"
        return out


LONG = 521


def run_long(model):
    """Forwards of LONG tokens with and without a cache, with and without padding."""
    long = torch.randint(3, 61, (2, LONG), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(long)
    mask[1, :100] = 0
    with AssertNoQuadraticTensor():
        for attention_mask in (None, mask):
            for use_cache in (True, False):
                out = model(input_ids=long, attention_mask=attention_mask, use_cache=use_cache)
    return out.logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "layer_types"),
    [(n, t) for n, t in students_of("retnet", "local", "near_far") if t == "retnet" or n not in COMPUTE_ATTENTION],
)
def test_student_allocates_no_quadratic_tensor(model_type, layer_types):
    key = "n_positions" if model_type in ("gpt2", "gpt_bigcode", "gptj") else "max_position_embeddings"
    teacher = build_teacher(model_type, **{key: LONG})
    student = subquad.linearize(teacher, layer_types=LAYER_TYPES[layer_types], scale_ids=SCALE_IDS)
    assert run_long(student).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer_allocates_no_quadratic_tensor(mixer):
    assert run_long(subquad.linearize(build_teacher("mistral"), mixer, scale_ids=SCALE_IDS)).isfinite().all()


def test_quadratic_tensor_of_softmax_is_detected():
    with pytest.raises(AssertionError, match=r"returns \[.*521, 521\]"), torch.no_grad():
        run_long(subquad.linearize(build_teacher("llama"), "softmax", scale_ids=SCALE_IDS))


# ---------------------------------------------------------------------- learned positions


@each_architecture
def test_number_of_learned_positions(model_type):
    expected = 64 if model_type in LEARNED_POSITIONS else None
    assert find_max_learned_positions(cached_teacher(model_type)) == expected
    assert cached_student(model_type, "retnet").config.max_learned_positions == expected


@pytest.mark.parametrize("model_type", LEARNED_POSITIONS)
def test_more_tokens_than_learned_positions_are_refused(model_type, tmp_path):
    model = reloaded(cached_student(model_type, "retnet"), tmp_path)
    long = torch.randint(3, 61, (2, 70), generator=torch.Generator().manual_seed(1))
    assert logits(model, long[:, :64]).shape == (2, 64, 61)
    message = r"position_ids: got \d+, expected less than 64"
    with pytest.raises(ValueError, match=message):
        logits(model, long)
    settings = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    with pytest.raises(ValueError, match=message):
        model.generate(long[:, :60], max_new_tokens=6, **settings)
    assert model.generate(long[:, :60], max_new_tokens=5, **settings).shape == (2, 65)
    # padding uses no learned positions
    mask = torch.ones_like(long)
    mask[:, :20] = 0
    found = model.generate(long, attention_mask=mask, max_new_tokens=8, **settings)
    assert torch.equal(found[:, 70:], model.generate(long[:, 20:], max_new_tokens=8, **settings)[:, 50:])


def test_linearize_stays_within_few_learned_positions():
    teacher = build_teacher("gpt2", n_positions=20)
    assert subquad.linearize(teacher, "gla").config.max_learned_positions == 20
    with pytest.raises(UserError, match="scale_ids or calibration_ids: got 21 tokens per row"):
        subquad.linearize(teacher, "gla", scale_ids=torch.ones(1, 21, dtype=torch.long))


# ---------------------------------------------------------------------- norms of queries and keys

NORMED = {
    "qwen3": "rms-head",
    "olmo2": "rms-all",
    "gemma3_text": "rms-head",
    "persimmon": "layer-head",
    "exaone4": "rms-head",
    "apertus": "rms-head",
    "gemma4_text": "rms-head",
    "flex_olmo": "rms-all",
}


@pytest.mark.parametrize("state_heads", ["query", "key_value"])
@pytest.mark.parametrize("model_type", [model_type for model_type in ARCHITECTURES if model_type in NORMED])
def test_kept_qk_norms_have_the_teachers_outputs(model_type, state_heads):
    teacher = build_teacher(model_type)
    options = {"qk_norm": True, "rotary": False, "qk_activation": "none", "state_heads": state_heads}
    kept = subquad.linearize(teacher, "retnet", scale_ids=SCALE_IDS, **options)
    calls = trace_attention(teacher, random_tokens(teacher))
    for info, call, layer in zip(discover_attention(teacher), calls, kept.mixer_layers, strict=True):
        assert info.spec.qk_norm == NORMED[model_type]
        core, _ = layer.mixer.op_inputs(call.forward.hidden_states, None, None, None)
        groups = info.spec.num_heads // info.spec.num_kv_heads if state_heads == "query" else 1
        # a rotary embedding does not change the first token
        for part, values, repeats in (("q", call.query, 1), ("k", call.key, groups)):
            wanted = values.repeat_interleave(repeats, 1)[:, :, 0]
            assert all_close(core[part][:, 0], wanted, 1e-4), part


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "persimmon"])
def test_student_with_kept_qk_norms_decodes_and_loads(model_type, ids, tmp_path):
    layer_types = {"default": {"mixer": "gated_deltanet", "qk_norm": True}, "1": {"mixer": "retnet", "qk_norm": True}}
    layer_types["1"]["state_heads"] = "key_value"
    model = make_student(cached_teacher(model_type), layer_types=layer_types)
    full = logits(model, ids, use_cache=False)
    assert all_close(in_pieces(model, ids, [5, 1, 11]), full)
    assert all_close(logits(reloaded(model, tmp_path), ids), full, 1e-5)


def test_keeping_missing_qk_norms_is_refused():
    with pytest.raises(UserError, match="qk_norm: got True, expected False"):
        subquad.linearize(cached_teacher("llama"), "gla", qk_norm=True, scale_ids=SCALE_IDS)


# ---------------------------------------------------------------------- diagnostics

FEW = ("gemma2", "gpt_neox", "gpt2", "falcon", "gpt_oss", "glm")
ROWS = torch.randint(3, 61, (1, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "model_type", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
def test_diagnostics_of_every_architecture(model_type):
    teacher, hybrid = cached_teacher(model_type), cached_student(model_type, "hybrid")
    same_model = diagnostics_results(teacher, ROWS, teacher, top=4)
    assert {result.value for result in select(same_model, metric="topk_mass_overlap")} == {1}
    assert {result.value for result in select(same_model, metric="cka")} == {1}
    for metric in ("mixer_error", "layer_error", "swap_kl"):
        assert select_one(same_model, metric=metric, layer=None).value == pytest.approx(0, abs=1e-6)
    found = diagnostics_results(hybrid, ROWS, teacher, top=4)
    assert select_one(found, metric="topk_mass_overlap", layer=1, head=None).value == 1  # its attention is kept
    assert select_one(found, metric="topk_mass_overlap", layer=0, head=None).value < 1
    assert abs(select_one(found, metric="swap_kl", layer=1).value) < 1e-6
    assert select_one(found, metric="swap_kl", layer=0).value > 1e-4
    assert select_one(found, metric="mixer_error", layer=0).value > 1e-2
    ablations = {result.task for result in ablation_results(hybrid, ROWS, window=8)}
    assert {"without_mixers", "without_attention", "frozen_gate", "frozen_decay"} <= ablations
