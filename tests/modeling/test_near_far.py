"""Attention to a window beside a memory: equal to the teacher while nothing has left, and to its definition
(`tests.helpers.near_far`) later. (Its other properties: test_architectures.py, test_generation.py,
test_unusual_inputs.py; its options: test_near_far_options.py.)"""

import pytest
import torch

import subquad
from subquad.analysis.layer_access import LayerAccess, run_on
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.attention.scores import AttentionProbabilities
from subquad.modeling.calibrate_far import FarCalibrator
from subquad.modeling.layer_types import DENOMINATORS, MERGES
from subquad.modeling.summary import cache_sizes, meta_model, model_card, summary
from subquad.utils import UserError
from tests.helpers.architectures import ARCHITECTURES, COMPUTE_ATTENTION, build_teacher, cached_teacher
from tests.helpers.near_far import POSITIVE_CASES, near_far_student, near_far_types, reference_output
from tests.helpers.students import MIXERS, SCALE_IDS, all_close, in_pieces, logits
from tests.helpers.teachers import layer_activations, tiny_teacher
from tests.helpers.windows import windows_of_heads

INTERFACE = [name for name in ARCHITECTURES if name not in COMPUTE_ATTENTION]


def tokens(length, rows=2, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- equal to the teacher


def check_short_sequences(teacher, student, longest):
    for length in (1, longest - 1, longest):
        ids = tokens(length)
        expected = logits(teacher, ids)
        assert all_close(logits(student, ids), expected, 1e-5)
        assert all_close(in_pieces(student, ids, [max(1, length - 3), *[1] * min(3, length - 1)]), expected, 1e-5)
    ids = tokens(longest + 1)
    assert not all_close(logits(student, ids), logits(teacher, ids), 1e-5)


@pytest.mark.parametrize("merge", [merge for merge in MERGES if merge not in DENOMINATORS])
@pytest.mark.parametrize("mixer", MIXERS)
def test_short_sequences_equal_the_teacher(mixer, merge):
    """Every T <= window + sinks; one token more does not."""
    teacher = cached_teacher("llama")
    check_short_sequences(teacher, near_far_student(teacher, near_far_types(mixer, 7, 2, merge=merge)), 9)


@pytest.mark.parametrize(("mixer", "options"), POSITIVE_CASES, ids=str)
def test_short_sequences_equal_the_teacher_with_a_denominator(mixer, options):
    teacher = cached_teacher("llama")
    check_short_sequences(
        teacher, near_far_student(teacher, near_far_types(mixer, 7, 2, merge="denominator", **options)), 9
    )


@pytest.mark.parametrize(("window", "sinks"), [(9, 0), ((7, "full", 9), 2), (4, 5)], ids=str)
@pytest.mark.parametrize("model_type", INTERFACE)
def test_short_sequences_equal_the_teacher_in_every_family(model_type, window, sinks):
    """Windows larger and smaller than the teachers' own of 6, beyond which a teacher sees nothing."""
    teacher = cached_teacher(model_type)
    layers = [info.spec.num_kv_heads for info in discover_attention(teacher)]
    types = {
        str(i): near_far_types("gated_deltanet", windows_of_heads([window], i, heads), sinks)["default"]
        for i, heads in enumerate(layers)
    }
    student = near_far_student(teacher, types)
    for length in (1, 8, 9):
        ids = tokens(length)
        expected, pieces = logits(teacher, ids), [max(1, length - 3), *[1] * min(3, length - 1)]
        assert all_close(logits(student, ids), expected, 1e-5)
        assert all_close(in_pieces(student, ids, pieces), expected, 1e-5)


def test_heads_without_a_window_have_no_memory():
    teacher, ids = cached_teacher("llama"), tokens(30)
    student = near_far_student(teacher, near_far_types("gla", "full", 2))
    assert all_close(logits(student, ids), logits(teacher, ids), 1e-5)
    assert all_close(in_pieces(student, ids, [20, 1, 9]), logits(teacher, ids), 1e-5)
    assert cache_sizes(meta_model(student.config), 30)[0] == 30 * 2 * 16 * 2 * 4


@pytest.mark.parametrize("window", [6, 9])
def test_the_teachers_own_window_has_no_memory(window):
    teacher, ids = cached_teacher("mistral"), tokens(30)
    assert all_close(logits(near_far_student(teacher, near_far_types("gla", window)), ids), logits(teacher, ids), 1e-5)
    assert not all_close(logits(near_far_student(teacher, near_far_types("gla", 5)), ids), logits(teacher, ids), 1e-2)


@pytest.mark.parametrize("model_type", [name for name in COMPUTE_ATTENTION if name in ARCHITECTURES])
def test_modules_that_compute_attention_are_refused(model_type):
    with pytest.raises(UserError, match=r"window: \w+ of layer 0 computes attention itself; a mixer needs its queries"):
        near_far_student(cached_teacher(model_type), near_far_types("gla", 5))


# ---------------------------------------------------------------------- against the definition

WINDOWS = [(7, 3), (1, 0), ([5, 12], 2), (["full", 6], 1)]
CASES = [(mixer, {}, *WINDOWS[i % 4]) for i, mixer in enumerate(MIXERS)]
CASES += [
    (mixer, {"state_heads": "key_value", "merge": "add"}, *WINDOWS[(i + 2) % 4]) for i, mixer in enumerate(MIXERS)
]
CASES += [(mixer, {"memory": "all"}, *WINDOWS[(i + 3) % 4]) for i, mixer in enumerate(MIXERS)]
CASES += [
    ("gla", {"memory_heads": [1]}, [5, 12], 2),
    ("gated_deltanet", {"memory_heads": [0], "state_heads": "key_value"}, 7, 1),
    ("gla", {"qk_activation": "hedgehog", "expand_k": 0.5, "state_heads": "key_value"}, [5, 12], 2),
    ("gated_deltanet", {"qk_activation": "hedgehog"}, [5, 12], 2),
    ("hgrn2", {"expand_k": 2, "memory_heads": [1]}, 7, 1),
    ("gla", {"qk_activation": "ones", "memory_heads": [1]}, [5, 12], 2),
    ("gated_deltanet", {"qk_activation": "ones"}, 7, 1),
]
CASES += [(mixer, {"merge": "fixed", "output_norm": False}, *WINDOWS[(i + 1) % 4]) for i, mixer in enumerate(MIXERS)]
CASES += [
    (
        mixer,
        {
            "merge": DENOMINATORS[i // 2 % 2],
            "output_norm": False,
            "state_heads": ("query", "key_value")[i % 2],
            **options,
        },
        *WINDOWS[i % 4],
    )
    for i, (mixer, options) in enumerate(POSITIVE_CASES)
]


@pytest.mark.parametrize(("mixer", "options", "window", "sinks"), CASES, ids=str)
def test_layer_and_gradients_equal_a_loop_over_delayed_tokens(mixer, options, window, sinks):
    torch.manual_seed(0)
    teacher = build_teacher("llama").double()
    layer = near_far_student(teacher, near_far_types(mixer, window, sinks, **options)).mixer_layers[1]
    x = torch.randn(2, 26, 32, dtype=torch.float64, requires_grad=True)
    cos, sin = teacher.model.rotary_emb(x, torch.arange(26)[None])
    found = layer(hidden_states=x, position_embeddings=(cos, sin))[0]
    expected = reference_output(layer, x, cos, sin)
    assert all_close(found.detach(), expected.detach(), 1e-9)
    wanted = [x, *layer.parameters()]
    probe = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), wanted) for y in (found, expected)), strict=True):
        assert all_close(a, b, 1e-8)


CALIBRATED = [(mixer, {"merge": merge}) for mixer in MIXERS for merge in ("mass", "add")]
CALIBRATED += [
    ("gla", {"merge": "fixed", "memory": "all"}),
    ("gated_deltanet", {"state_heads": "key_value", "output_norm": False}),
    ("gla", {"qk_activation": "hedgehog", "expand_k": 2}),
    ("mamba2", {"qk_activation": "ones", "state_heads": "key_value"}),
    *((mixer, {"merge": "denominator", "output_norm": False, **options}) for mixer, options in POSITIVE_CASES[:6]),
    ("gla", {"merge": "lolcats", "output_norm": False, "qk_activation": "elu1"}),
]


@torch.no_grad()
@pytest.mark.parametrize(("mixer", "options"), CALIBRATED, ids=str)
def test_calibration_is_nearer_to_the_teacher(mixer, options):
    """The first layer, which gets the teacher's own input, than without calibration; with `mass` also than the window
    alone."""
    teacher, ids = tiny_teacher(), tokens(60, rows=8)
    types = near_far_types(mixer, [4, 9], 1, **options)
    window = {"default": {"mixer": "attention", "window": [4, 9], "sinks": 1}}
    recorded, _ = layer_activations(teacher, discover_attention(teacher), ids)

    def error(layer_types, **given):
        layer = subquad.linearize(teacher, layer_types=layer_types, **given).mixer_layers[0]
        return float((run_on(layer, recorded) - recorded.output).square().mean())

    calibrated = error(types, calibration_ids=ids)
    assert calibrated < error(types, scale_ids=ids)
    if "merge" not in options or options["merge"] == "mass":
        assert calibrated < error(window, scale_ids=ids)


AUTOCAST = [
    {"mixer": "attention", "window": [4, 9], "sinks": 2},
    *({"mixer": mixer, "window": [4, 9], "sinks": 2} for mixer in MIXERS),
    {"mixer": "gated_deltanet", "window": 6, "merge": "add", "memory": "all"},
    {"mixer": "gla", "window": [4, "full"], "merge": "denominator", "qk_activation": "hedgehog"},
]


@pytest.mark.parametrize("layer_type", AUTOCAST, ids=lambda layer_type: layer_type["mixer"])
def test_autocast_leaves_rotated_queries_in_float32(layer_type):
    """A training step, a cache and matrices in bfloat16, the weights in float32."""
    student, ids = near_far_student(cached_teacher("llama"), {"default": layer_type}, noise=0.1), tokens(26)
    expected = logits(student, ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = student(input_ids=ids, labels=ids)
        out.loss.backward()
        assert all_close(out.logits.detach(), expected, 0.1)
        assert all_close(in_pieces(student, ids, [20, 1, 5]), expected, 0.1)
        access = LayerAccess(student)
        for layer, recorded in zip(access.mixer_layers, access.record(access.mixing_modules, ids), strict=True):
            assert layer.matrix_rows(*recorded.args, **recorded.kwargs)(slice(3, 9)).isfinite().all()
    own = [p for layer in student.mixer_layers for p in layer.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own)


# ---------------------------------------------------------------------- matrices


def head_outputs(layer, recorded):
    """The merged output of all heads, `[B, T, H, V]`: the input of the output projection."""
    found = []
    name = "c_proj" if hasattr(layer.attention, "c_proj") else "o_proj"
    hook = getattr(layer.attention, name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    run_on(layer, recorded)
    hook.remove()
    return found[0].view(*found[0].shape[:2], layer.spec.num_heads, -1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mixer", "options", "window", "sinks"),
    [(mixer, {**options, "output_norm": False}, window, sinks) for mixer, options, window, sinks in CASES],
    ids=str,
)
def test_matrix_times_values_is_the_output(mixer, options, window, sinks):
    check_matrices(cached_teacher("llama"), near_far_types(mixer, window, sinks, **options))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gpt_oss", "qwen3", "gpt2", "glm"])
@pytest.mark.parametrize("merge", ["mass", "add"])
def test_matrices_of_families(model_type, merge):
    types = near_far_types("gated_deltanet", 4, 2, merge=merge, output_norm=False, state_heads="key_value")
    check_matrices(cached_teacher(model_type), types)


def check_matrices(teacher, types):
    student, ids = near_far_student(teacher, types), tokens(26)
    access = LayerAccess(student)
    for layer, recorded in zip(access.mixer_layers, access.record(access.mixing_modules, ids), strict=True):
        rows = layer.matrix_rows(*recorded.args, **recorded.kwargs)
        matrix, values = rows(slice(None)), rows.values()
        heads = matrix @ values.repeat_interleave(len(matrix[0]) // values.shape[1], 1)
        assert all_close(heads.transpose(1, 2), head_outputs(layer, recorded), 1e-5)
        assert all_close(rows(slice(9, 21)), matrix[:, :, 9:21], 1e-6)
        near, far = rows.near(slice(None)), rows.far()
        share = torch.ones(1) if layer.merge.kind == "add" else rows.share()
        assert all_close(matrix, (near if layer.merge.kind == "add" else (1 - share) * near) + share * far, 1e-6)
        distance = torch.arange(26)[:, None] - torch.arange(26)
        for head, window in enumerate(w for w in layer.windows for _ in range(len(far[0]) // len(layer.windows))):
            remembers = layer.memory == "all" or window is None
            outside = distance >= (0 if remembers else window)
            assert not far[:, head].masked_select(~outside).any()
            if layer.memory == "outside":
                assert not far[:, head, :, : layer.sinks].any()
            limit = layer.spec.window
            has_memory = window is not None and (limit is None or window < limit)
            has_memory &= head // (len(far[0]) // len(layer.windows)) in layer.memory_heads
            assert far[:, head].any() == has_memory


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_matrix_of_a_normed_memory(mixer):
    """With equal weights of a head's norm, the matrix times the values is the output."""
    student, ids = near_far_student(cached_teacher("llama"), near_far_types(mixer, [5, 9], 1)), tokens(26)
    access = LayerAccess(student)
    for layer in access.mixer_layers:
        layer.mixer.o_norm.copy_(torch.rand(4, 1) + 0.5)
    for layer, recorded in zip(access.mixer_layers, access.record(access.mixing_modules, ids), strict=True):
        rows = layer.matrix_rows(*recorded.args, **recorded.kwargs)
        heads = rows(slice(None)) @ rows.values().repeat_interleave(2, 1)
        assert all_close(heads.transpose(1, 2), head_outputs(layer, recorded), 1e-5)


# ---------------------------------------------------------------------- cache

CACHED = [(mixer, {"window": [9, 40], "sinks": 4}) for mixer in MIXERS]
CACHED += [
    ("gated_deltanet", {"window": ["full", 5], "state_heads": "key_value"}),
    ("gla", {"window": 30, "merge": "denominator", "qk_activation": "elu1"}),
    ("mamba2", {"window": 30, "sinks": 2, "merge": "lolcats", "qk_activation": "relu", "memory": "all"}),
    ("xlstm", {"window": 30, "memory": "all", "state_heads": "key_value"}),
    ("metala", {"window": [1, 60], "sinks": 2, "memory": "all"}),
    ("kda", {"window": 30, "sinks": 2, "memory_heads": [1], "expand_k": 2}),
    ("gla", {"window": [9, 30], "qk_activation": "hedgehog", "merge": "denominator"}),
    ("gated_deltanet", {"window": 30, "state_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("mixer", "options"), CACHED, ids=str)
@pytest.mark.parametrize(("model_type", "dtype"), [("llama", torch.float32), ("mistral", torch.bfloat16)])
def test_cache_holds_what_is_computed_for_it(mixer, options, model_type, dtype):
    """Bytes after a few and after 4,096 tokens; a head with the teacher's own window of 20 has no memory."""
    teacher = build_teacher(model_type, sliding_window=20, max_position_embeddings=8192).to(dtype)
    student = near_far_student(teacher, {"default": {"mixer": mixer, **options}})
    cache, meta, total = student.new_cache(), meta_model(student.config).to(dtype), 0
    for piece in tokens(4096, rows=1).split([3, 1, 2, 1990, 2100], 1):
        logits(student, piece, past_key_values=cache)
        total += piece.shape[1]
        assert cache.nbytes() == cache_sizes(meta, total)[0]
    held = [x for layer in cache.layers for states in layer.far_states.values() for x in states.tensors()]
    assert sum(x.untyped_storage().nbytes() for x in held) <= 2 * cache.nbytes()  # no small view of a large tensor


@pytest.mark.parametrize(
    ("mixer", "options"),
    [("xlstm", {}), ("mamba2", {"merge": "denominator", "qk_activation": "hedgehog"})],
    ids=str,
)
def test_memories_in_bfloat16_are_rounded_between_calls(mixer, options):
    """Their cache holds half the bytes of matrices; the next logits are those after the states are rounded."""
    students = [
        near_far_student(cached_teacher("llama"), near_far_types(mixer, [4, 9], 2, state_dtype=dtype, **options))
        for dtype in ("bfloat16", "float32")
    ]
    ids, caches = tokens(24), [student.new_cache() for student in students]
    first = [logits(student, ids[:, :20], past_key_values=c) for student, c in zip(students, caches, strict=True)]
    assert torch.equal(*first)
    for kept, layer in zip(*(cache.layers for cache in caches), strict=True):
        for group, far in layer.far_states.items():
            rounded = tuple(s.bfloat16() if s.dim() == 4 else s for s in far.states)
            assert all(
                torch.equal(a, b) and a.dtype == b.dtype
                for a, b in zip(kept.far_states[group].states, rounded, strict=True)
            )
            layer.far_states[group] = far._replace(states=tuple(s.float() for s in rounded))
    last = [logits(student, ids[:, 20:], past_key_values=c) for student, c in zip(students, caches, strict=True)]
    assert torch.equal(*last)


@pytest.mark.parametrize(
    "options",
    [{}, {"memory": "all"}, {"merge": "fixed", "memory": "all"}, {"merge": "add", "state_heads": "key_value"}],
    ids=str,
)
@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "xlstm", "metala"])
def test_packed_documents_continue_from_a_cache(mixer, options):
    """The last documents of the rows are longer and shorter than the windows; the rows are padded too."""
    student = near_far_student(cached_teacher("llama"), near_far_types(mixer, [4, 9], 2, **options))
    ids, lengths = tokens(40, rows=3), ([20, 17, 3], [33, 7], [40])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    cache, more = student.new_cache(), tokens(12, rows=3, seed=1)
    logits(student, ids, position_ids=positions, past_key_values=cache)
    found, next_positions = [], positions[:, -1:] + 1
    for piece in more.split([1, 2, 9], 1):
        own = next_positions + torch.arange(piece.shape[1])
        found.append(logits(student, piece, position_ids=own, past_key_values=cache))
        next_positions = own[:, -1:] + 1
    for row, documents in enumerate(lengths):
        whole = torch.cat((ids[row, -documents[-1] :], more[row]))[None]
        assert all_close(torch.cat(found, 1)[row], logits(student, whole)[0, -12:], 1e-4)


def test_layers_are_described():
    student = near_far_student(cached_teacher("llama"), near_far_types("gla", 6, 2, decay_rank=3))
    text = summary(student.config)
    assert "gla (window=6, sinks=2, decay_rank=3)" in text
    line = "gla (window=6, sinks=2, merge=mass, memory=outside, qk_activation=silu, output_norm=True"
    assert line in text
    assert "short_conv" not in text
    assert "| 0-1 | gla (window=6, sinks=2, decay_rank=3) |" in model_card(student.config, "llama")


# ---------------------------------------------------------------------- calibration


@torch.no_grad()
@pytest.mark.parametrize("window", [3, (7, "full", 4)], ids=str)
@pytest.mark.parametrize("model_type", INTERFACE)
def test_share_and_target_of_the_memory_are_what_the_teacher_sees_outside_the_window(model_type, window):
    """The sums of the teacher's probabilities, and of its values by these: soft caps, learned sinks, own windows."""
    teacher, ids = cached_teacher(model_type), tokens(19)
    attention_layers = discover_attention(teacher)
    types = {
        str(i): near_far_types("gla", windows_of_heads([window], i, info.spec.num_kv_heads), merge="mass")["default"]
        for i, info in enumerate(attention_layers)
    }
    student = subquad.linearize(teacher, layer_types=types, scale_ids=SCALE_IDS)
    recorded_layers = layer_activations(teacher, attention_layers, ids)
    for info, layer, recorded in zip(attention_layers, student.mixer_layers, recorded_layers, strict=True):
        found = FarCalibrator(layer, info, recorded)
        rows = AttentionProbabilities(info.module, info.spec.window, 0, recorded.args, recorded.kwargs)
        distance = torch.arange(19)[:, None] - torch.arange(19)
        windows = torch.tensor([100 if w is None else w for w in layer.windows])
        queries = info.spec.num_heads // info.spec.num_kv_heads
        outside = rows() * (distance >= windows.repeat_interleave(queries)[:, None, None])
        assert all_close(found.mass, outside.sum(-1).transpose(1, 2), 1e-5)
        values = rows.values()
        heads = outside @ values.repeat_interleave(info.spec.num_heads // values.shape[1], 1)
        assert all_close(found.target, heads.transpose(1, 2), 1e-5)
