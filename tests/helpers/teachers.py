"""Tiny random teachers."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from subquad.modeling.attention.activations import visit_activations
from subquad.modeling.attention.discovery import AttentionInfo, attention_modules

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEACHERS = {
    # head_dim = hidden / heads, no biases, an output matrix of its own
    "plain": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    # heads times head_dim is not hidden, biases everywhere, tied to the embedding
    "wide-biased-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12}),
}


def tiny_teacher(name: str = "plain", seed: int = 0, **changes) -> PreTrainedModel:
    """A random teacher in evaluation mode, all of whose parameters, biases and norms too, are random."""
    cls, config, own = TEACHERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config(**{**SIZES, **own, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


WORDS = sorted(pre_tokenizers.ByteLevel.alphabet())
"""The vocabulary of `byte_tokenizer`."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": WORDS[0], "pad_token": WORDS[0]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def random_teacher(model_type: str, seed: int = 0, **sizes) -> PreTrainedModel:
    """A teacher of any architecture in evaluation mode whose weights are all random, those of norms around one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize_weights(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)))


def randomize_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Draws all parameters at random, those of norms around one; evaluation mode. Uses the global generator."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            mean = float("norm" in name or "ln_" in name)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else mean + 0.1 * noise)
    return model.eval()


def layer_activations(teacher: PreTrainedModel, attention_layers: list[AttentionInfo], ids: Tensor) -> list:
    """The activations of the attention of every layer, in order."""
    found: dict = {}
    visit_activations(teacher, attention_modules(attention_layers), found.__setitem__, ids)
    return [found[index] for index in range(len(found))]
