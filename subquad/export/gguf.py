"""Writes a model of Qwen3.5, Granite 4 or Kimi Linear to a GGUF file for llama.cpp.

llama.cpp stores A_log as -exp(A_log), convolutions as matrices, the norm weights of Qwen3.5 plus one, the queries and
keys of Granite 4 with the halves of each head interleaved, and Kimi Linear's expansion of latents in two parts. It has
a fixed set of pre-tokenizers, among which a tokenizer's regular expression is looked up.
"""

import ctypes
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.encoding import text_prefix
from subquad.export.kimi_linear import checkpoint_weights
from subquad.export.qwen3_5 import attention_interval
from subquad.modeling.export_target import ExportError
from subquad.utils import UserError

ARCHITECTURES = {
    "qwen3_5_text": gguf.MODEL_ARCH.QWEN35,
    "granitemoehybrid": gguf.MODEL_ARCH.GRANITE_HYBRID,
    "kimi_linear": gguf.MODEL_ARCH.KIMI_LINEAR,
}
"""llama.cpp's architecture by `model_type`."""
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_k": (gguf.GGMLQuantizationType.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_S),
}
"""Types of the matrices. Norms, decays, gates and convolutions are always float32: they are few, and their errors
accumulate in the state."""
FALLBACKS = {
    gguf.GGMLQuantizationType.Q4_K: gguf.GGMLQuantizationType.Q5_0,
    gguf.GGMLQuantizationType.Q5_0: gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.Q8_0: gguf.GGMLQuantizationType.F16,
}
"""The type of a matrix whose rows are not whole blocks, as llama.cpp chooses it (`transformers` does not read q5_0)."""
EMBEDDINGS = ("token_embd.weight", "output.weight")
"""They are q8_0 in a file of q4_k."""
FLOAT32_TENSORS = tuple(
    f"ssm_{name}"
    for name in (
        *("beta.weight", "alpha.weight", "conv1d.weight", "norm.weight", "a", "d"),
        *("conv1d_q.weight", "conv1d_k.weight", "conv1d_v.weight", "f_a.weight", "f_b.weight"),
    )
)
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
    """Writes `model`, of an architecture in `ARCHITECTURES`, and its tokenizer to `path`; `type` is one of `TYPES`.

    Raises:
        ExportError: a configuration or a tokenizer that llama.cpp cannot read; a partial file may remain.
    """
    config: Any = model.config
    check_config(config)
    architecture = ARCHITECTURES[config.model_type]
    matrix_type, file_type = TYPES[type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    {
        gguf.MODEL_ARCH.QWEN35: add_qwen3_5_sizes,
        gguf.MODEL_ARCH.GRANITE_HYBRID: add_granite_sizes,
        gguf.MODEL_ARCH.KIMI_LINEAR: add_kimi_sizes,
    }[architecture](writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    own_tensors = kimi_tensors if architecture == gguf.MODEL_ARCH.KIMI_LINEAR else tensors
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    write_tensors(writer, names, own_tensors(model), matrix_type)


def write_tensors(
    writer: gguf.GGUFWriter,
    names: gguf.TensorNameMap,
    named_tensors: Iterable[tuple[str, Tensor]],
    matrix_type: gguf.GGMLQuantizationType,
) -> None:
    """Writes the file of `writer`, which has all but tensors: float32 tensors with the names of `transformers`."""
    for key, tensor in named_tensors:
        tensor_name = names.get_name(key, (".weight", ".bias"))
        assert tensor_name is not None, key
        values, dtype = quantized(tensor_name, tensor.contiguous().numpy(), matrix_type)
        writer.add_tensor(tensor_name, values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_config(config: Any) -> None:
    """Raises ExportError if llama.cpp cannot read this configuration."""
    if config.model_type == "qwen3_5_text" and config.linear_key_head_dim != config.linear_value_head_dim:
        raise ExportError(
            f"linear_value_head_dim: got {config.linear_value_head_dim}, llama.cpp expects linear_key_head_dim, "
            f"{config.linear_key_head_dim}; format qwen3_5 supports both"
        )
    rope_type = "default" if config.model_type == "kimi_linear" else config.rope_parameters["rope_type"]
    if rope_type not in ("default", "linear"):
        raise ExportError(
            f"rope_type: got {rope_type!r}, llama.cpp expects 'default' or 'linear'; other formats support all"
        )


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "kimi_linear":  # without positions
        return
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def add_qwen3_5_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(round(rope["partial_rotary_factor"] * config.head_dim))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
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
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)


def add_granite_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Layers without key/value heads are recurrent."""
    attends = [layer_type == "full_attention" for layer_type in config.layer_types]
    writer.add_head_count_kv([config.num_key_value_heads if attention else 0 for attention in attends])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(1.0)
    writer.add_residual_scale(1.0)
    writer.add_logit_scale(1.0)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_ssm_inner_size(config.mamba_n_heads * config.mamba_d_head)


def add_kimi_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Layers without key/value heads are recurrent. All MLPs are in the leading block without experts."""
    writer.add_head_count_kv([int(layer_type == "full_attention") for layer_type in config.layer_types])
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_kda_head_dim(config.linear_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_expert_feed_forward_length(0)
    writer.add_expert_shared_count(0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def kimi_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As `tensors`, of a Kimi Linear."""
    config: Any = model.config
    for name, tensor in checkpoint_weights(model).items():
        tensor = tensor.float()
        if name.endswith("A_log"):
            yield name, -tensor.exp().view(-1, 1)
        elif name.endswith("kv_b_proj.weight"):
            heads = tensor.unflatten(0, (config.num_attention_heads, -1))
            k, v = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
            yield name.replace("kv_b", "k_b"), k.transpose(1, 2)
            yield name.replace("kv_b", "v_b"), v
        else:
            yield name.replace("dt_bias", "dt_proj.bias"), tensor


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors in llama.cpp's form, with names that `gguf` maps to llama.cpp's."""
    config: Any = model.config
    granite = config.model_type == "granitemoehybrid"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    groups = config.mamba_n_groups if granite else 0
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.float32)
        own = name.removesuffix(".weight").rpartition(".")[2]
        if own == "lm_head" and config.tie_word_embeddings:
            continue
        if own == "A_log":
            tensor = -tensor.exp()
        elif own == "conv1d":
            tensor = tensor.squeeze(1)
            if granite:  # llama.cpp adds a bias without looking whether there is one
                yield name.replace(".weight", ".bias"), tensor.new_zeros(len(tensor))
        elif own == "input_linear":
            gate, tensor = tensor.chunk(2)
            yield name.replace("shared_mlp.input_linear", "mlp.gate_proj"), gate
        elif granite and own in heads:
            tensor = tensor.unflatten(0, (heads[own], 2, -1)).transpose(1, 2).flatten(0, 2)
        elif not granite and own.endswith("norm") and not name.endswith("linear_attn.norm.weight"):
            tensor = tensor + 1
        if granite and own in ("A_log", "D"):
            tensor = tensor.unsqueeze(1)
        elif name.endswith("mamba.norm.weight"):
            tensor = tensor.unflatten(0, (groups, -1))
        for old, new in (("dt_bias", "dt_proj.bias"), ("input_linear", "up_proj"), ("output_linear", "down_proj")):
            name = name.replace(old, new)
        yield name.replace("shared_mlp", "mlp"), tensor


def quantized(name: str, values: np.ndarray, matrix_type: gguf.GGMLQuantizationType) -> tuple[np.ndarray, Any]:
    """A tensor of llama.cpp's `name` in its number format, and this format."""
    dtype = matrix_type
    if dtype == gguf.GGMLQuantizationType.Q4_K and name in EMBEDDINGS:
        dtype = gguf.GGMLQuantizationType.Q8_0
    if values.ndim == 1 or name.endswith(FLOAT32_TENSORS):
        dtype = gguf.GGMLQuantizationType.F32
    while values.shape[-1] % gguf.GGML_QUANT_SIZES[dtype][0]:
        dtype = FALLBACKS[dtype]
    if dtype == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        dtype = gguf.GGMLQuantizationType.F32
    quantize = quantize_k if dtype == gguf.GGMLQuantizationType.Q4_K else gguf.quants.quantize
    return quantize(values, dtype), dtype


def quantize_k(values: np.ndarray, dtype: gguf.GGMLQuantizationType) -> np.ndarray:
    """`values` `[rows, columns]` by the quantizer of ggml, which `gguf` does not have for this type and the library of
    xllamacpp exports."""
    try:
        import xllamacpp.xllamacpp

        quantize = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        raise UserError("type: q4_k needs ggml's quantizer; pip install xllamacpp (on Linux)") from None
    sizes = [ctypes.c_int64] * 3
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    found = np.empty(gguf.quant_shape_to_byte_shape(values.shape, dtype), np.uint8)
    quantize(int(dtype), values.ctypes.data, found.ctypes.data, 0, *values.shape, None)
    return found


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
