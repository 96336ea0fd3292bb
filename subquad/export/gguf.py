"""Writes a Qwen3.5 model to a GGUF file (architecture qwen35) for llama.cpp.

llama.cpp stores A_log as -exp(A_log), norm weights plus one, convolutions as matrices, and the positions of attention
layers as an interval or a list. It has a fixed set of pre-tokenizers, among which a tokenizer's regular expression is
looked up.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.encoding import text_prefix
from subquad.export.qwen3_5 import attention_interval
from subquad.modeling.export_target import ExportError

ARCHITECTURE = "qwen35"
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Types of the matrices. Norms, decays, gates and convolutions are always float32: they are few, and their errors
accumulate in the state."""
FLOAT32_TENSORS = ("ssm_beta.weight", "ssm_alpha.weight", "ssm_conv1d.weight")
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|\p{{N}}|{REST}": "qwen2",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
}
"""Regular expressions of pre-tokenizers, and llama.cpp's names for them."""


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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35, model.config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if not (model.config.tie_word_embeddings and key == "lm_head.weight"):
            tensor_name = names.get_name(key.replace("dt_bias", "dt_proj.bias"), (".weight", ".bias"))
            assert tensor_name is not None, key
            add_tensor(writer, tensor_name, tensor, matrix_type)
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
    interval = attention_interval(config)
    if interval is not None:
        writer.add_full_attention_interval(interval)
    else:
        recurrent = [layer_type == "linear_attention" for layer_type in config.layer_types]
        writer.add_array(f"{ARCHITECTURE}.attention.recurrent_layers", recurrent)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, matrix_type: gguf.GGMLQuantizationType) -> None:
    tensor = tensor.detach().to("cpu", torch.float32)
    if name.endswith("ssm_a"):
        tensor = -tensor.exp()
    elif name.endswith("ssm_conv1d.weight"):
        tensor = tensor.squeeze(1)
    elif name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
        tensor = tensor + 1
    values, dtype = tensor.numpy(), matrix_type
    if values.ndim == 1 or name.endswith(FLOAT32_TENSORS):
        dtype = gguf.GGMLQuantizationType.F32
    elif dtype == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
        dtype = gguf.GGMLQuantizationType.F16  # q8_0 has blocks of 32 elements of a row
    if dtype == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        dtype = gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)


# ---------------------------------------------------------------------- tokenizer


def unsupported(reason: str) -> ExportError:
    return ExportError(
        f"tokenizer: {reason}; a GGUF file needs byte-level BPE that splits text as GPT-2, SmolLM, Llama 3, Qwen2 or "
        "Qwen3.5 do (format qwen3_5 supports any tokenizer)"
    )


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Writes all that llama.cpp needs to produce the same tokens.

    size: of the embedding; ids without a token get an unused one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise unsupported(f"{type(tokenizer).__name__} is not a fast tokenizer")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback"):
        raise unsupported(f"its model is {spec['model']['type']}, or has byte fallback")
    if (spec.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise unsupported(f"it normalizes text ({spec['normalizer']['type']})")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(spec["pre_tokenizer"]))
    tokens, types = token_list(spec, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    writer.add_token_merges(merges)
    add_special_tokens(writer, tokenizer)


def token_list(spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids, and their types."""
    tokens = {token_id: token for token, token_id in spec["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise unsupported(f"it has token id {max(tokens)}, but the embedding has {size} rows")
    return (
        [tokens.get(i, f"[UNUSED{i}]") for i in range(size)],
        [int(types.get(i, gguf.TokenType.UNUSED)) for i in range(size)],
    )


def pre_tokenizer_name(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    types = [step["type"] for step in steps]
    if not types or types[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise unsupported(f"it splits text by {' and '.join(types) or 'nothing'}")
    use_regex = steps[-1].get("use_regex", True)
    if types == ["ByteLevel"] and use_regex:
        return "gpt-2"
    if types == ["Digits", "ByteLevel"] and use_regex and steps[0]["individual_digits"]:
        return "smollm"
    if types == ["Split", "ByteLevel"] and not use_regex and steps[0]["behavior"] == "Isolated":
        name = PRE_TOKENIZERS.get(steps[0]["pattern"].get("Regex"))
        if name is not None:
            return name
    raise unsupported(f"it splits text by {' and '.join(types)} with unknown settings")


def add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    plain, full = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    writer.add_add_bos_token(text_prefix(tokenizer) == [tokenizer.bos_token_id])
    writer.add_add_eos_token(full[len(plain) :] == [tokenizer.eos_token_id] != [None])
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
