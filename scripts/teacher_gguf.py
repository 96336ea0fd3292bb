"""Writes a Llama teacher to a GGUF file, to be compared with its students in llama.cpp.

    python -m scripts.teacher_gguf smollm2-135m teacher.gguf --type f16

The types are those of `subquad export --type`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

from subquad import load_teacher
from subquad.export.gguf import TYPES, add_sizes, add_tokenizer, write_tensors

ARCHITECTURE = gguf.MODEL_ARCH.LLAMA


def teacher_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    config: Any = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        tensor, own = tensor.to(torch.float32), name.split(".")[-2]
        if own in heads:  # llama.cpp rotates pairs of neighbouring channels
            tensor = tensor.unflatten(0, (heads[own], 2, -1)).transpose(1, 2).flatten(0, 2)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            yield name, tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=TYPES, default="f16")
    args = parser.parse_args()
    model, tokenizer = load_teacher(args.teacher)
    config: Any = model.config
    matrix_type, file_type = TYPES[args.type]
    writer = gguf.GGUFWriter(args.output, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(ARCHITECTURE, config.num_hidden_layers)
    write_tensors(writer, names, teacher_tensors(model), matrix_type)


if __name__ == "__main__":
    main()
