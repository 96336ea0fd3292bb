"""What decoding costs: tokens per second, and the bytes that a model holds for what it has read."""

import statistics
import time

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from subquad.modeling.cache import CACHE_ARGUMENT, SubquadCache


@torch.no_grad()
def decode_speed(model: PreTrainedModel, prompt: Tensor, tokens: int = 64) -> dict[str, float]:
    """Greedy decoding of `tokens` tokens behind `prompt: [1, T]`.

    Returns decode_tokens_per_second (from the median step) and state_bytes (after the prompt and those tokens).
    """
    training = model.training
    model.eval()
    out = model(input_ids=prompt.to(model.device), use_cache=True)
    cache = out[CACHE_ARGUMENT]
    seconds = []
    for _ in range(tokens):
        fed = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        out = model(input_ids=fed, use_cache=True, **{CACHE_ARGUMENT: cache})
        seconds.append(time.perf_counter() - start)
    model.train(training)
    return {
        "decode_tokens_per_second": len(prompt) / statistics.median(seconds),
        "state_bytes": cache_bytes(cache),
    }


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's tensors, of a student or of a plain transformer."""
    if isinstance(cache, SubquadCache):
        return cache.nbytes()
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in held if t is not None)
