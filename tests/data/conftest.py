"""A byte tokenizer, and a token cache in each test's directory."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Lists the files of the token cache, one for each text, tokenizer and length."""
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    return lambda: list((tmp_path / "cache").rglob("*.arrow"))


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **special)


@pytest.fixture
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture
def tokenizer():
    """One token per byte; 256 is the end-of-text token."""
    return byte_tokenizer(eos_token="<|endoftext|>")
