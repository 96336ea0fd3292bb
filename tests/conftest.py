"""What every test shares: no Triton kernels bound without a GPU, one thread, and tiny random teachers."""

# ruff: noqa: E402

import sys

# With fla importable, transformers binds its kernels at import, and they fail at the first call without a GPU.
sys.modules["fla"] = None  # type: ignore[assignment]

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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


@pytest.fixture(autouse=True, scope="session")
def single_thread():
    """Two threads on tensors this small wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_teacher():
    return tiny_teacher


@pytest.fixture
def teacher() -> PreTrainedModel:
    return tiny_teacher()


@pytest.fixture
def ids() -> torch.Tensor:
    """[3, 11] tokens, none of them special."""
    return torch.randint(3, SIZES["vocab_size"], (3, 11), generator=torch.Generator().manual_seed(5))
