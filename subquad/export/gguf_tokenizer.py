"""Writes a byte-level BPE tokenizer to a GGUF file: tokens, their types, merges, pre-tokenizer and special tokens.

llama.cpp has a fixed set of pre-tokenizers; the tokenizer's regular expression is looked up among them.
"""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from subquad.modeling.export_target import ExportError

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|\p{{N}}|{REST}": "qwen2",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
}
"""Regular expressions of pre-tokenizers, and llama.cpp's names for them."""


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
    writer.add_add_bos_token(full[: -len(plain)] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(full[len(plain) :] == [tokenizer.eos_token_id] != [None])
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
