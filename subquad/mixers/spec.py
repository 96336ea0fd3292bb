"""`AttentionSpec`: the sizes and properties of the attention that a mixer replaces. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer of the teacher, as saved in a student's configuration.

    `num_heads` query heads share `num_kv_heads` key and value heads; queries and keys have `head_dim` channels, values
    `value_dim`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    initializer_range: float = 0.02
    rotary: str | None = "half"
    """Layout of the rotary embedding, one of `mixers.rotary.STYLES`; None: no rotary embedding, or an unknown one."""
    window: int | None = None
    """Tokens that a query sees, itself included; None: all tokens up to itself."""
    qk_norm: str | None = None
    """Norm of queries and keys before the rotary embedding: "rms-head" or "layer-head", over the channels of each head;
    "rms-all" or "layer-all", over all channels. None: no norm, or an unsupported one."""
    qk_norm_eps: float = 1e-6
    num_outputs: int = 2
    """Length of the tuple that the attention module returns; 0 if it returns a tensor."""
