"""A byte-level BPE tokenizer in the words of GGUF: tokens, their types, merges, how text is cut first, special tokens.

llama.cpp knows the ways to cut by names; the tokenizer's own way is looked up among them.
"""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from subquad.utils import UserError

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|\p{{N}}|{REST}": "qwen2",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
}
"""Expressions that cut text in front of BPE, and what llama.cpp calls them."""


class UnsupportedTokenizer(UserError):
    def __init__(self, reason: str):
        super().__init__(
            f"this tokenizer cannot be written into a GGUF file: {reason}; expected byte-level BPE that cuts text as "
            "GPT-2, SmolLM, Llama 3, Qwen2 or Qwen3.5 do (format qwen3_5 takes any)"
        )


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Writes all that llama.cpp needs for the same tokens.

    size: rows of the embedding; what the tokenizer has no token for gets one that is never used.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedTokenizer(f"{type(tokenizer).__name__} is not one of the tokenizers library")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback"):
        raise UnsupportedTokenizer(f"its model is {spec['model']['type']}, or falls back to bytes")
    if (spec.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise UnsupportedTokenizer(f"it changes text first ({spec['normalizer']['type']})")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(spec["pre_tokenizer"]))
    tokens, types = token_list(spec, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    writer.add_token_merges(merges)
    add_special_tokens(writer, tokenizer)


def token_list(spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its type."""
    tokens = {number: token for token, number in spec["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise UnsupportedTokenizer(f"it has a token {max(tokens)}, but the embedding has {size} rows")
    return (
        [tokens.get(i, f"[UNUSED{i}]") for i in range(size)],
        [int(types.get(i, gguf.TokenType.UNUSED)) for i in range(size)],
    )


def pre_tokenizer_name(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name for how a tokenizer cuts text in front of BPE."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise UnsupportedTokenizer(f"it cuts text by {' and '.join(kinds) or 'nothing'}")
    expression = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and expression:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and expression and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not expression and steps[0]["behavior"] == "Isolated":
        name = PRE_TOKENIZERS.get(steps[0]["pattern"].get("Regex"))
        if name is not None:
            return name
    raise UnsupportedTokenizer(f"it cuts text by {' and '.join(kinds)} in a way that is not known here")


def add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    plain, marked = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    writer.add_add_bos_token(marked[: -len(plain)] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(marked[len(plain) :] == [tokenizer.eos_token_id] != [None])
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
