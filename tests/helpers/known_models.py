"""Models built by hand, whose attention or answers are known, and a snapshot of any model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.modeling.cache import CACHE_ARGUMENT

PREVIOUS, UNIFORM = 0, 1
"""Heads of `previous_and_uniform`."""


def previous_and_uniform(vocabulary: int = 40, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama whose head 0 attends to the previous token only, and whose head 1 attends uniformly.

    Queries and keys are biases plus negligible noise. The first rotary pair turns by one radian per token: a query
    turned back by one radian matches the key of the token before it, and a scale of 1e4 leaves no weight for others (up
    to 40 tokens).
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.mul_(1e-4)
                projection.bias.zero_()
            attention.q_proj.bias[0], attention.q_proj.bias[4] = 1e4 * math.cos(1), -1e4 * math.sin(1)
            attention.k_proj.bias[0] = 1.0
    return model


INDUCTION_GROUP = 1, 1
"""Layer and key/value head of `induction_model` that reads from any distance."""


def induction_model(vocabulary: int) -> LlamaForCausalLM:
    """A Llama that predicts what followed the current token before (Olsson et al., arXiv 2209.11895).

    A hidden state is a token's vector of signs, and that of the token before it, which head 0 of layer 0 copies. In
    layer 1, `INDUCTION_GROUP` looks for tokens after the current one, and adds their vectors. Nothing else has output.
    """
    torch.manual_seed(0)
    d = 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2 * d,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2 * d,
        attention_bias=True,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    slow = torch.cat([torch.arange(d // 2, d), torch.arange(d // 2, d) + d])  # channels that rotary hardly turns
    fast = torch.arange(8)
    eye = torch.eye(d)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :d] = torch.randn(vocabulary, d).sign()
        first, second = (layer.self_attn for layer in model.model.layers)
        angles = 1e12 ** (-fast / d)
        first.q_proj.bias[fast], first.q_proj.bias[fast + d] = 1e3 * angles.cos(), -1e3 * angles.sin()
        first.k_proj.bias[fast] = 1.0
        first.v_proj.weight[:d, :d] = eye / 2**0.5  # the norm scales a state with an empty half by the square root of 2
        first.o_proj.weight[d:, :d] = eye
        head = INDUCTION_GROUP[1]
        query, key = 2 * head * 2 * d, head * 2 * d  # of the first of its two query heads
        second.q_proj.weight[query + slow, :d] = 4 * eye
        second.k_proj.weight[key + slow, d:] = eye
        second.v_proj.weight[key : key + d, :d] = eye
        second.o_proj.weight[:d, query : query + d] = 3 * eye
    return model


def previous_matrix(T: int) -> Tensor:
    """`[T, T]`; the first token attends to itself."""
    M = torch.zeros(T, T)
    M[range(1, T), range(T - 1)] = 1.0
    M[0, 0] = 1.0
    return M


def uniform_matrix(T: int) -> Tensor:
    return torch.ones(T, T).tril() / torch.arange(1, T + 1).unsqueeze(-1)


def known_heads(T: int) -> Tensor:
    """The matrices of `previous_and_uniform`, `[2, T, T]`."""
    return torch.stack([previous_matrix(T), uniform_matrix(T)])


class TextCache:
    """A cache that holds the text itself."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.ids = self.ids.repeat_interleave(repeats, dim=0)


class Copier(PreTrainedModel):
    """Predicts the token that followed the longest earlier match of the text's end; token 0 without a match."""

    config_class = PretrainedConfig

    def __init__(self, vocabulary: int):
        super().__init__(PretrainedConfig())
        self.vocabulary = vocabulary
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool = True, **kwargs) -> CausalLMOutputWithPast:
        cache = kwargs.get(CACHE_ARGUMENT)
        text = input_ids if cache is None else torch.cat([cache.ids, input_ids], dim=1)
        predicted = torch.stack([self.predict(row) for row in text])[:, -input_ids.shape[1] :]
        logits = 10 * F.one_hot(predicted, self.vocabulary).float()
        return CausalLMOutputWithPast(logits=logits, **{CACHE_ARGUMENT: TextCache(text)})

    def predict(self, row: Tensor) -> Tensor:
        """The prediction after each token of `row: [T]`."""
        matched = torch.zeros(len(row), dtype=torch.long)  # common suffix of row[: j + 1] and row[: t + 1]
        predicted = torch.zeros(len(row), dtype=torch.long)
        for t in range(len(row)):
            matched = torch.where(row == row[t], F.pad(matched, (1, 0))[:-1] + 1, 0)
            if t and matched[:t].any():
                predicted[t] = row[matched[:t].argmax() + 1]
        return predicted


def snapshot(model: PreTrainedModel) -> dict:
    """Everything that a measurement could change; weights by identity and version, so that any write shows."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "weights": {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "own": {name: sorted(m.__dict__) for name, m in modules.items()},
        "windows": [getattr(m, "windows", None) for m in modules.values()],
        "training": {name: m.training for name, m in modules.items()},
    }
