"""A tiny teacher with a tokenizer, a corpus and a recipe on disk: all that a run needs, in a second."""

from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"


def sentences(count: int, seed: int) -> str:
    """Text of a tiny grammar: something to learn, and nobody's."""
    generator = torch.Generator().manual_seed(seed)
    words = ["red", "green", "small", "old"], ["fox", "tree", "stone", "river"], ["sees", "finds", "is near"]

    def pick(options):
        return options[torch.randint(len(options), (1,), generator=generator).item()]

    lines = [
        f"The {pick(words[0])} {pick(words[1])} {pick(words[2])} the {pick(words[0])} {pick(words[1])}."
        for _ in range(count)
    ]
    return "\n\n".join(lines)


def save_tiny_teacher(directory: Path, context: int = 64, **changes) -> Path:
    """Saves a two-layer Llama with grouped-query attention and a byte-level tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([sentences(50, 0)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=EOS)
    torch.manual_seed(0)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": context,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **changes,
    }
    LlamaForCausalLM(LlamaConfig(**options)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_recipe(directory: Path, **changes) -> Path:
    """Writes teacher, corpus and recipe below `directory` and returns the recipe's path."""
    directory.mkdir(parents=True, exist_ok=True)
    teacher = save_tiny_teacher(directory / "teacher")
    (directory / "text.txt").write_text(sentences(2000, 1))
    recipe = {
        "teacher": str(teacher),
        "data": {"source": str(directory / "text.txt"), "seq_len": 32},
        "student": {"mixer": "gla", "calibration_tokens": None},
        "stages": {
            "matrix": {"tokens": 512, "lr": 1e-3, "batch_size": 2},
            "hidden": {"tokens": 768, "lr": 1e-3, "batch_size": 2},
            "end_to_end": {"tokens": 768, "lr": 1e-3, "batch_size": 2},
        },
        "checkpoint": {"save_steps": 3},
        "evaluation": {"eval_tokens": 256},
        **changes,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
