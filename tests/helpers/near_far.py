"""A layer with near and far by its definition, slowly: explicit scores, and the memory as a loop over tokens."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import subquad
from subquad import ops
from tests.helpers.students import SCALE_IDS, randomize_gates

NOT_WRITTEN = {"beta": 0.0, "input_gate": -30.0}
POSITIVE_CASES = [  # of the merge `denominator`: mixers whose state is a sum of k v^T, with positive features
    ("linear_attention", {"qk_activation": "elu1"}),
    ("linear_attention", {"qk_activation": "relu", "normalizer": True}),
    ("retnet", {"qk_activation": "relu"}),
    ("mamba2", {"qk_activation": "elu1"}),
    ("mamba2", {"qk_activation": "elu1", "discretization": "zoh"}),
    ("gla", {"qk_activation": "elu1"}),
    ("gla", {"qk_activation": "hedgehog"}),
    ("hgrn2", {"qk_activation": "relu"}),
    ("metala", {"qk_activation": "elu1"}),
    ("mamba2", {"qk_activation": "ones"}),
]


def near_far_types(mixer: str, window, sinks: int = 0, **options) -> dict:
    return {"default": {"mixer": mixer, "window": window, "sinks": sinks, **options}}


def near_far_student(teacher, layer_types: dict, noise: float = 0.3):
    """A student whose memories and merges have noise in every parameter."""
    student = subquad.linearize(teacher, layer_types=layer_types, scale_ids=SCALE_IDS)
    return randomize_gates(student, noise=noise)


def reference_output(layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The output `[B, T, hidden]` of a layer of a Llama student, each row one document."""
    spec, merge, attention = layer.spec, layer.merge, layer.attention
    queries = spec.num_heads // spec.num_kv_heads
    names = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    raw = {
        n: getattr(attention, f"{n}_proj")(x).unflatten(-1, (heads, -1)).transpose(1, 2) for n, heads in names.items()
    }
    q, k = apply_rotary_pos_emb(raw["q"], raw["k"], cos, sin)
    gates = gates_of(layer, x, q, k, raw["v"])
    outputs = []
    for head, window in enumerate(layer.windows):
        own = slice(head * queries, (head + 1) * queries)
        near, lse, largest = near_part(
            raw["q"][:, own], q[:, own], k[:, head], raw["v"][:, head], window, layer.sinks, cos, sin
        )
        if window is None or head not in layer.memory_heads:
            outputs.append(near)
            continue
        far, z = far_part(layer, gates, q[:, own], k[:, head], raw["v"][:, head], own, head, window)
        if layer.mixer.options.output_norm:
            rms = (far.square().mean(-1, keepdim=True) + layer.mixer.norm_eps).sqrt()
            far = far / rms * layer.mixer.o_norm[own]
        if merge.kind == "add":
            outputs.append(near + far)
            continue
        if merge.kind == "mass":
            m = torch.sigmoid(merge.m_proj(x)[..., own] + merge.lse_weight[own] * lse)
        elif merge.kind in ("denominator", "lolcats"):
            scaled = merge.log_scale[own].exp() * z
            m = scaled / ((lse - largest if merge.kind == "lolcats" else lse).exp() + scaled)
        else:
            m = torch.full_like(lse, 0.5)
        first = 0 if layer.memory == "all" else window + layer.sinks
        m = (m * (torch.arange(x.shape[1]) >= first)[None, :, None]).unsqueeze(-1)
        outputs.append((1 - m) * near + m * far)
    return attention.o_proj(torch.cat(outputs, 2).flatten(2))


def gates_of(layer, x, q, k, v) -> dict[str, Tensor]:
    """Inputs of the op that the mixer computes from x, for each query head or each key/value head."""
    mixer = layer.mixer
    repeats = layer.spec.num_heads // layer.spec.num_kv_heads if mixer.num_states == layer.spec.num_heads else 1
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    inputs = {name: t.transpose(1, 2) for name, t in (("q", q), ("k", k), ("v", v))}
    return mixer.gates(x, inputs | {n: mixer.feature_map(n, inputs[n]) for n in ("q", "k")})


def near_part(raw_q, q, k, v, window, sinks, cos, sin) -> tuple[Tensor, Tensor, Tensor]:
    """Heads `[B, T, h, V]`, the log-sum-exp of their scores and the largest, `[B, T, h]`, for one key/value head
    `k: [B, T, K]`."""
    T, scale = q.shape[2], q.shape[-1] ** -0.5
    scores = torch.einsum("bhtk,bsk->bths", q, k) * scale
    t, s = torch.arange(T)[:, None], torch.arange(T)
    seen = s <= t
    if window is not None:
        last = min(window + sinks, T) - 1
        moved, _ = apply_rotary_pos_emb(raw_q, raw_q, *(r[:, last : last + 1].expand(-1, T, -1) for r in (cos, sin)))
        at_last = torch.einsum("bhtk,bsk->bths", moved, k) * scale
        scores = torch.where(((t > last) & (s < sinks))[None, :, None], at_last, scores)
        seen = seen & ((t - s < window) | (s < sinks))
    scores = scores.masked_fill(~seen[None, :, None], -torch.inf)
    return torch.einsum("bths,bsv->bthv", scores.softmax(-1), v), scores.logsumexp(-1), scores.amax(-1)


def far_part(layer, gates, q, k, v, heads, kv_head, window) -> tuple[Tensor, Tensor | None]:
    """What the memory of one key/value head gives its query heads, `[B, T, h, V]`, and its normalizer, `[B, T, h]`."""
    mixer, denominator = layer.mixer, layer.merge.kind in ("denominator", "lolcats")
    shared = mixer.num_states == layer.spec.num_kv_heads and mixer.options.state_heads == "key_value"
    own = slice(kv_head, kv_head + 1) if shared else heads
    n = 1 if shared else q.shape[1]
    states, outputs, normalizers = [None, None], [], []
    for t in range(q.shape[2]):
        j = t if layer.memory == "all" else t - window
        written = layer.memory == "all" or j >= layer.sinks
        token = {
            "q": mixer.feature_map("q", q[:, None, :, t], heads=heads),
            "k": mixer.feature_map("k", k[:, j, None, None].expand(-1, -1, n, -1), heads=own),
            "v": v[:, j, None, None].expand(-1, -1, n, -1),
        }
        for name, gate in gates.items():
            at = t if name in ("log_decay", "forget_gate") else j
            token[name] = gate[:, at, None, own] if gate.dim() > 1 else gate[own]
        if not written:
            token |= {
                name: torch.full_like(token[name], NOT_WRITTEN.get(name, 0.0))
                for name in {"k", "v", "beta", "input_gate"} & token.keys()
            }
        if mixer.normalized_ops and not denominator:
            o, states[0] = mixer.normalized_ops[0](**token, initial_state=states[0], form="step")
        else:
            o, states[0] = ops.step(**token, initial_state=states[0])
        if denominator:
            ones = torch.ones_like(token["v"][..., :1])
            z, states[1] = ops.step(**{**token, "v": ones}, initial_state=states[1])
            normalizers.append(z.squeeze(-1))
            o = o / z.clamp_min(1e-30)
        outputs.append(o)
    return torch.cat(outputs, 1), torch.cat(normalizers, 1) if denominator else None
