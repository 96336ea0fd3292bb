"""Writes a Qwen3.5 model to a directory for mlx-lm, as a Qwen3-Next without experts (`model_type: qwen3_next`).

mlx-lm computes both alike. It loads tokenizers with `transformers`, which replaces the tokenizer of a `qwen3_5` by
Qwen's and keeps that of a `qwen3_next`. Weights are in the layout that `mlx_lm.convert` writes: convolutions
`[channels, width, 1]`, one added to the weights of norms, and the projections of the heads interleaved.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.export.qwen3_5 import attention_interval
from subquad.modeling.export_target import ExportError

ROPE_TYPES = ("default", "linear", "llama3")
"""Rotary embeddings that mlx-lm computes as `transformers` does."""
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "bos_token_id", "eos_token_id", "pad_token_id"),
)
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


def write_mlx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes `model` (a `Qwen3_5ForCausalLM`) and its tokenizer to the new `directory`.

    Raises:
        ExportError: a configuration that mlx-lm does not have.
    """
    config: Any = model.config
    text = json.dumps(mlx_config(config), indent=2)
    directory.mkdir()
    (directory / "config.json").write_text(text, encoding="utf-8")
    save_torch_state_dict(mlx_weights(model), directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def mlx_config(config: Any) -> dict[str, Any]:
    """The contents of config.json."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ExportError(f"rope_type: got {rope['rope_type']!r}, MLX expects one of {', '.join(ROPE_TYPES)}")
    if config.linear_conv_kernel_dim < 2:
        raise ExportError(f"short_conv: got {config.linear_conv_kernel_dim}, MLX expects 2 or more")
    interval = attention_interval(config)
    if interval is None:
        kept = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "full_attention"]
        raise ExportError(
            f"layers with attention: got {', '.join(map(str, kept))}; MLX expects them at a regular interval n, as in "
            "n - 1, 2n - 1, ..., and no others"
        )
    for name in ("mrope_section", "mrope_interleaved"):
        rope.pop(name)
    return {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        **{name: getattr(config, name) for name in COPIED},
        **dict.fromkeys(EXPERT_SIZES, 0),
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.num_hidden_layers)),
        "full_attention_interval": interval,
        "rope_theta": rope.pop("rope_theta"),
        "partial_rotary_factor": rope.pop("partial_rotary_factor"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


def mlx_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights with the names and in the layout of mlx-lm's `qwen3_next`."""
    config: Any = model.config
    heads = config.linear_num_key_heads
    keys, values = heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name in [name for name in weights if name.endswith("in_proj_qkv.weight")]:
        prefix = name.removesuffix("qkv.weight")
        q, k, v = weights.pop(name).split((keys, keys, values))
        z, b, a = (weights.pop(f"{prefix}{part}.weight") for part in "zba")
        weights[f"{prefix}qkvz.weight"] = rows_by_head(heads, q, k, v, z)
        weights[f"{prefix}ba.weight"] = rows_by_head(heads, b, a)
    for name, tensor in weights.items():
        if name.endswith("conv1d.weight"):
            weights[name] = tensor.transpose(1, 2).contiguous()
        elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            weights[name] = tensor + 1
    return weights


def rows_by_head(heads: int, *weights: Tensor) -> Tensor:
    """[rows of all weights, hidden]: the first head's rows of each weight, then the second's."""
    return torch.cat([weight.unflatten(0, (heads, -1)) for weight in weights], dim=1).flatten(0, 1)
