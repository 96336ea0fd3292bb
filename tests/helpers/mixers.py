"""Cases of the mixers' tests: every mixer with every value of every option, and random parameters."""

from typing import get_args

import torch
from torch import Tensor

from subquad import mixers
from subquad.mixers import AttentionSpec, Mixer
from subquad.mixers.options import OutputGate, QKActivation, StateHeads

SPECS = {
    "plain": AttentionSpec(hidden_size=24, num_heads=3, num_kv_heads=3, head_dim=8, value_dim=8),
    "biased": AttentionSpec(24, 4, 2, head_dim=8, value_dim=6, qkv_bias=True, output_bias=True),
}
SHARED_OPTIONS = {
    "qk_activation": [name for name in get_args(QKActivation) if name != "ones"],  # which is for memories
    "short_conv": (0, 2, 4),
    "rotary": (True, False),
    "output_norm": (True, False),
    "output_gate": get_args(OutputGate),
    "half_life": (3.0,),
    "state_heads": get_args(StateHeads),
}
OWN_OPTIONS: dict[str, tuple[dict, ...]] = {
    "linear_attention": (
        {"normalizer": True, "qk_activation": "elu1", "output_norm": False},
        {"normalizer": True, "qk_activation": "hedgehog", "expand_k": 2, "output_norm": False, "rotary": True},
        {"normalizer": True, "qk_activation": "relu", "rotary": True, "short_conv": 4, "state_heads": "key_value"},
    ),
    "mamba2": (
        {"discretization": "zoh", "state_heads": "key_value"},
        {"discretization": "zoh"},
        {"discretization": "zoh", "short_conv": 0},
    ),
    "gla": ({"decay_rank": 3}, {"expand_k": 2, "state_heads": "key_value"}),
    "metala": ({"decay_rank": 3}, {"expand_k": 2.5}),
    "deltanet": ({"beta_init": 0.5},),
    "gated_deltanet": (
        {"beta_init": 0.5},
        {"v_activation": "silu", "biases": False, "norm_eps": 1e-5},
        {"v_activation": "silu", "biases": False, "state_heads": "key_value"},
        {"v_activation": "silu", "short_conv": 0},
    ),
    "kda": (
        {"beta_init": 0.5},
        {"qk_activation": "hedgehog", "expand_k": 0.5, "state_heads": "key_value"},
        {"low_rank_gate": True},
        {"v_activation": "silu", "biases": False, "norm_eps": 1e-5, "low_rank_gate": True},
    ),
    "hgrn2": ({"lower_bound": 0.3},),
}


def every_option() -> list[tuple[str, dict]]:
    """Every mixer with its defaults, and with each other value of each option."""
    cases = []
    for name, cls in mixers.MIXERS.items():
        defaults = cls.Options()
        cases.append((name, {}))
        for option, values in SHARED_OPTIONS.items():
            cases += [(name, {option: value}) for value in values if getattr(defaults, option, value) != value]
        cases += [(name, options) for options in OWN_OPTIONS.get(name, ())]
    return cases


def case_id(case: object) -> str:
    if isinstance(case, tuple):
        name, options = case
        return "-".join([name, *(f"{key}={value}" for key, value in options.items())])
    return str(case)


def build(name: str, spec: str = "plain", seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Mixer:
    """A mixer with seeded noise in every parameter, so that none is neutral."""
    mixer = mixers.create(name, SPECS[spec], **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in mixer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and key.endswith("_proj.weight"):
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(noise * 0.4)
    return mixer.to(dtype)


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotary(positions: Tensor, head_dim: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, T, head_dim]` of `positions: [B, T]`, as `transformers` passes them."""
    frequencies = 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.cat([positions[..., None].double() * frequencies] * 2, dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
