"""What running a model costs: prefill and decoding time, peak memory, and the bytes that it holds for what it has read.

Models that are compared run interleaved in one process, so that a busy machine disturbs them alike. Time is on the
device's clock (CUDA events on a GPU); memory is the allocator's peak on a GPU, elsewhere what the process holds at
most above what it held before.
"""

import ctypes
import functools
import inspect
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from subquad.evaluate.results import Result
from subquad.modeling.cache import CACHE_ARGUMENT, SubquadCache
from subquad.utils import eval_mode

logger = logging.getLogger(__name__)
TASK = "cost"
DECODED = 16
"""Tokens decoded behind a prefill; the time of one is their median."""


@torch.no_grad()
def decode_speed(model: PreTrainedModel, prompt: Tensor, tokens: int = 64) -> dict[str, float]:
    """Greedy decoding of `tokens` tokens behind `prompt: [B, T]`.

    Returns decode_tokens_per_second (from the median step) and state_bytes (after the prompt and those tokens).
    """
    with eval_mode(model):
        out = prefill(model, prompt)
        seconds = decode(model, out, tokens)
    return {
        "decode_tokens_per_second": len(prompt) / statistics.median(seconds),
        "state_bytes": cache_bytes(out[CACHE_ARGUMENT]),
    }


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> Any:
    """Reads `ids: [B, T]`; the output has a cache, and logits of the last token (of all, in some families)."""
    base: Any = getattr(model, "base", model)
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    return model(input_ids=ids.to(model.device), use_cache=True, **few)


@torch.no_grad()
def decode(model: PreTrainedModel, out: Any, tokens: int) -> list[float]:
    """Seconds of each of `tokens` greedy steps behind a prefill's output, whose cache goes on."""
    cache, fed, seconds = out[CACHE_ARGUMENT], out.logits[:, -1:].argmax(-1), []
    for _ in range(tokens):
        step = functools.partial(model, input_ids=fed, use_cache=True, **{CACHE_ARGUMENT: cache})
        result, took = timed(step, model.device)
        fed = result.logits[:, -1:].argmax(-1)
        seconds.append(took)
    return seconds


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call returns, and the seconds that it takes."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        return result, begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def with_peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What a call returns, and the bytes by which it raises what is held at most; None where no system tells."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the call takes what was freed before
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
    except OSError:
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's tensors, of a student or of a plain transformer."""
    if isinstance(cache, SubquadCache):
        return cache.nbytes()
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in held if t is not None)


def efficiency_results(
    models: Mapping[str, PreTrainedModel],
    lengths: Sequence[int],
    batches: Sequence[int] = (1,),
    repeats: int = 3,
    seconds: float = 60.0,
) -> dict[str, list[Result]]:
    """Prefill and decoding of random tokens by each model, at each length and batch size that takes it, by the last
    one measured, no longer than about `seconds` a prefill.

    Metrics: `prefill_seconds`, `seconds_per_token` (one decoded step of the whole batch), both medians of `repeats`
    with the fastest and the slowest as `low` and `high`; `peak_bytes` (of a prefill), `cache_bytes` (after it).
    """
    rows: dict[str, list[Result]] = {name: [] for name in models}
    expected: dict[tuple[str, int], tuple[int, float]] = {}
    for batch in batches:
        for length in sorted(lengths):
            fit = {}
            for name, model in models.items():
                before, took = expected.get((name, batch), (length, 0.0))
                if took * (length / before) ** 2 <= seconds:
                    fit[name] = model
                else:
                    logger.info("%s: leaving out %d tokens x %d, a prefill takes too long", name, length, batch)
            for name, found in _measured(fit, length, batch, repeats).items():
                rows[name] += found
                expected[name, batch] = length, found[0].value
    return rows


@torch.no_grad()
def _measured(models: Mapping[str, PreTrainedModel], length: int, batch: int, repeats: int) -> dict[str, list[Result]]:
    spent: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    sizes: dict[str, list[Result]] = {}
    generator = torch.Generator().manual_seed(length)
    for repeat in range(repeats + 1):
        for name, model in models.items():
            vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
            ids = torch.randint(vocabulary, (batch, length), generator=generator)
            read = functools.partial(prefill, model, ids)
            with eval_mode(model):
                if repeat == 0:  # also the warm-up
                    out, peak = with_peak(read, model.device)
                    held = {"peak_bytes": peak, "cache_bytes": cache_bytes(out[CACHE_ARGUMENT])}
                    sizes[name] = [
                        Result(TASK, metric, float(size), n=1, length=length, batch=batch)
                        for metric, size in held.items()
                        if size is not None
                    ]
                    decode(model, out, 2)
                else:
                    out, took = timed(read, model.device)
                    spent[name].append(took)
                    steps[name].append(statistics.median(decode(model, out, DECODED)))
    return {
        name: [
            _timing("prefill_seconds", spent[name], length, batch),
            _timing("seconds_per_token", steps[name], length, batch),
            *sizes[name],
        ]
        for name in models
    }


def _timing(metric: str, seconds: Sequence[float], length: int, batch: int) -> Result:
    middle = statistics.median(seconds)
    return Result(
        "cost", metric, middle, low=min(seconds), high=max(seconds), n=len(seconds), length=length, batch=batch
    )
