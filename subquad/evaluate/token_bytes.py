"""How many UTF-8 bytes of text each token stands for, so that rows may begin and end within a character."""

import json
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SPACES = ("\u2581", "\u0120")
"""How vocabularies of sentencepiece and of bytes write a space."""


def byte_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[Tensor, Tensor], int]:
    """A function that returns the bytes of the text of tokens `[T]`, given the token before each, `[T]`.

    Special tokens have none, nor has a space that the tokenizer itself puts before a text. Exact for vocabularies of
    bytes and of sentencepiece, whose tokens are counted one by one; other tokens hold whole characters and are decoded
    together.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = "" if backend is None else json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
    of_bytes, with_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
    if not of_bytes and SPACES[0] not in decoder:
        return lambda before, tokens: len(
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()  # type: ignore[union-attr]
        )
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    lengths, spaces = torch.zeros(2, max(vocabulary.values()) + 1, dtype=torch.long)
    for token, index in vocabulary.items():
        if index in special:
            continue
        spaces[index] = token.startswith(SPACES)
        if of_bytes and index not in added:
            lengths[index] = len(token)  # one character for each byte
        elif with_fallback and len(token) == 6 and token.startswith("<0x"):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace(SPACES[0], " ").encode())
    if not tokenizer.tokenize("a")[0].startswith(SPACES):
        spaces.zero_()

    def count(before: Tensor, tokens: Tensor) -> int:
        before, tokens = before.cpu(), tokens.cpu()
        return int((lengths[tokens] - spaces[tokens] * (lengths[before] == 0)).sum())

    return count
