"""Writes a Qwen3.5 model to a GGUF file (architecture qwen35) for llama.cpp.

llama.cpp stores A_log as -exp(A_log), norm weights plus one, convolutions as matrices, and the positions of attention
layers as an interval or a list.
"""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.export.gguf_tokenizer import add_tokenizer
from subquad.modeling.export_target import ExportError

ARCHITECTURE = "qwen35"
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Types of the matrices. Norms, decays, gates and convolutions are always float32: they are few, and their errors
accumulate in the state."""
TENSOR_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
FLOAT32_TENSORS = ("ssm_beta.weight", "ssm_alpha.weight", "ssm_conv1d.weight")


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, type: str = "f16", name: str = "student"
) -> None:
    """Writes `model` (a `Qwen3_5ForCausalLM`) and its tokenizer to `path`; `type` is one of `TYPES`.

    Raises:
        ExportError: a configuration or a tokenizer that llama.cpp cannot read; a partial file may remain.
    """
    check_config(model.config)
    matrix_type, file_type = TYPES[type]
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    tied = model.config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        if not (tied and key == "lm_head.weight"):
            add_tensor(writer, key, tensor, matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_config(config: Any) -> None:
    """Raises ExportError if llama.cpp cannot read this configuration of Qwen3.5."""
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise ExportError(
            f"linear_value_head_dim: got {config.linear_value_head_dim}, llama.cpp expects linear_key_head_dim, "
            f"{config.linear_key_head_dim}; format qwen3_5 supports both"
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ("default", "linear"):
        raise ExportError(
            f"rope_type: got {rope_type!r}, llama.cpp expects 'default' or 'linear'; format qwen3_5 supports all"
        )


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(round(rope["partial_rotary_factor"] * config.head_dim))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    recurrent = [layer_type == "linear_attention" for layer_type in config.layer_types]
    interval = recurrent.index(False) + 1
    if recurrent == [bool((i + 1) % interval) for i in range(len(recurrent))]:
        writer.add_full_attention_interval(interval)
    else:
        writer.add_array(f"{ARCHITECTURE}.attention.recurrent_layers", recurrent)


def add_tensor(writer: gguf.GGUFWriter, key: str, tensor: Tensor, matrix_type: gguf.GGMLQuantizationType) -> None:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
    name = TENSOR_NAMES[layer[2] if layer else key]
    tensor = tensor.detach().to("cpu", torch.float32)
    if name == "ssm_a":
        tensor = -tensor.exp()
    elif name == "ssm_conv1d.weight":
        tensor = tensor.squeeze(1)
    elif name.endswith("norm.weight") and name != "ssm_norm.weight":
        tensor = tensor + 1
    values, dtype = tensor.numpy(), matrix_type
    if values.ndim == 1 or name in FLOAT32_TENSORS:
        dtype = gguf.GGMLQuantizationType.F32
    elif dtype == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
        dtype = gguf.GGMLQuantizationType.F16  # q8_0 has blocks of 32 elements of a row
    if dtype == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        dtype = gguf.GGMLQuantizationType.F32
    name = f"blk.{layer[1]}.{name}" if layer else name
    writer.add_tensor(name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
