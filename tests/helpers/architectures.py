"""Tiny random teachers of many architectures of `transformers`, and students of them."""

from functools import cache

from transformers import CONFIG_MAPPING, PreTrainedModel

from subquad import SubquadForCausalLM
from tests.helpers.students import make_student
from tests.helpers.teachers import SIZES, random_teacher

LLAMA = {**SIZES, "max_position_embeddings": 64}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
NO_DROPOUT = dict.fromkeys(
    (
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "residual_dropout",
        "embedding_dropout",
    ),
    0.0,
)
ARCHITECTURES: dict[str, dict] = {  # those that this version of transformers has, see below
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 12},
    "mistral": {**LLAMA, "sliding_window": 6},
    "gemma2": {**LLAMA, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "gemma3_text": {**LLAMA, "head_dim": 16, "sliding_window": 6},
    "olmo2": LLAMA,
    "phi3": LLAMA,
    "gpt_neox": LLAMA,
    "gpt2": {**GPT, **TOKENS},
    "opt": {**LLAMA, "ffn_dim": 40, "word_embed_proj_dim": 32},
    "gemma": {**LLAMA, "head_dim": 16, "num_key_value_heads": 1},
    "phi": LLAMA,
    "stablelm": {**LLAMA, "use_qkv_bias": True},
    "starcoder2": {**LLAMA, "sliding_window": 6},
    "cohere": LLAMA,
    "granite": {**LLAMA, "attention_multiplier": 0.2},
    "nemotron": LLAMA,
    "persimmon": {**LLAMA, "qk_layernorm": True},
    "glm": {**LLAMA, "head_dim": 16},
    "biogpt": LLAMA,
    "gpt_bigcode": {**GPT, **TOKENS},
    # these compute softmax(q k^T) v without the attention interface
    "gptj": {**GPT, **TOKENS, "rotary_dim": 4},
    "gpt_neo": {**LLAMA, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "falcon": LLAMA,
    # mixtures of experts
    "gpt_oss": {**LLAMA, **EXPERTS, "head_dim": 16, "sliding_window": 6},
    "qwen2_moe": {**LLAMA, **EXPERTS},
    "mixtral": {**LLAMA, **EXPERTS, "head_dim": 8},
    # a window that only the mask shows; heads that differ between layers; clipped projections; layers without rotary
    "phimoe": {**LLAMA, **EXPERTS, "sliding_window": 6, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "gemma4_text": {
        **LLAMA,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 6,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 61,
    },
    "olmo": {**LLAMA, "clip_qkv": 0.5},
    "cohere2": {**LLAMA, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {**LLAMA, "num_hidden_layers": 3, "no_rope_layer_interval": 2},
    "exaone4": {**LLAMA, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "apertus": LLAMA,
    "hunyuan_v1_dense": {**LLAMA, "head_dim": 8},
    "nanochat": LLAMA,
    "seed_oss": {**LLAMA, "head_dim": 12},
    "vaultgemma": {**LLAMA, "head_dim": 16, "sliding_window": 6},
    "flex_olmo": {**LLAMA, **EXPERTS},
}
ARCHITECTURES = {name: sizes for name, sizes in ARCHITECTURES.items() if name in CONFIG_MAPPING}
HAS_EXPERTS = ("gpt_oss", "qwen2_moe", "mixtral", "phimoe", "flex_olmo")
COMPUTE_ATTENTION = ("gpt_neo", "falcon")
"""Their modules do not call an attention implementation of `transformers`' registry."""
LEARNED_POSITIONS = ("gpt2", "opt", "biogpt", "gpt_bigcode", "gpt_neo")
LAYER_TYPES = {
    "gated_deltanet": {"default": {"mixer": "gated_deltanet", "short_conv": 4}},
    "retnet": {"default": {"mixer": "retnet", "state_heads": "key_value", "qk_activation": "hedgehog"}},
    "hybrid": {"default": {"mixer": "gla", "state_heads": "key_value"}, "1": "attention"},
    "local": {"default": {"mixer": "attention", "window": 5, "sinks": 2}},
    "near_far": {
        "default": {"mixer": "gated_deltanet", "window": 5, "sinks": 2},
        "1": {"mixer": "xlstm", "window": 4, "merge": "add", "state_heads": "key_value"},
    },
}


def students_of(*layer_types: str) -> list[tuple[str, str]]:
    """Every architecture with each of these layer types that it can have."""
    return [
        (model_type, name)
        for model_type in ARCHITECTURES
        for name in layer_types
        if name != "near_far" or model_type not in COMPUTE_ATTENTION
    ]


def build_teacher(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    return random_teacher(model_type, seed, **{**NO_DROPOUT, **ARCHITECTURES[model_type], **changes})


@cache
def cached_teacher(model_type: str) -> PreTrainedModel:
    """Shared by tests, which must not change it."""
    return build_teacher(model_type)


@cache
def cached_student(model_type: str, layer_types: str) -> SubquadForCausalLM:
    """Shared by tests, which must not change it."""
    teacher = cached_teacher(model_type)
    return make_student(teacher, layer_types=LAYER_TYPES[layer_types])
