"""Writes a Llama as GGUF."""

from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

from tests.helpers.teachers import WORDS


def write_gguf(path, model):
    """Writes the model in float32, with the names and the row order of a Llama in GGUF."""
    config, writer = model.config, GGUFWriter(path, "llama")
    for name, value in {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 10000.0,
        "rope_dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "default",
        "token_list": [*WORDS, "er", "in"],
        "token_types": [1] * (len(WORDS) + 2),
        "token_merges": ["e r", "i n"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }.items():
        getattr(writer, f"add_{name}")(value)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        part = name.split(".")[-2]
        if part in heads:  # GGUF interleaves the halves of each head
            tensor = tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
