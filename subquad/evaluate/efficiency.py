"""Prefill and decoding time, peak memory and cache size of models.

Models run interleaved in one process, so that other load on the machine affects all alike. Time is measured by CUDA
events on a GPU, else by the process clock. Memory is the allocator's peak on a GPU, else the growth of the process's
peak resident size.
"""

import ctypes
import functools
import inspect
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad import progress
from subquad.evaluate.results import Result
from subquad.modeling.cache import CACHE_ARGUMENT, cache_bytes
from subquad.utils import eval_mode

logger = logging.getLogger(__name__)
TASK = "cost"
DECODED_TOKENS = 16
"""Tokens decoded after each prefill."""


def decode_speed(model: PreTrainedModel, prompt: Tensor, tokens: int = 64) -> dict[str, float]:
    """Greedy decoding of `tokens` tokens after `prompt: [B, T]`.

    Returns decode_tokens_per_second (from the median step) and state_bytes (of the cache at the end).
    """
    return timed_decoding(model, prompt, tokens)[1]


def timed_decoding(model: PreTrainedModel, prompt: Tensor, tokens: int = 64) -> tuple[Tensor, dict[str, float]]:
    """The `tokens` + 1 tokens that follow `prompt: [B, T]`, `[B, tokens + 1]`, and what `decode_speed` returns."""
    with eval_mode(model):
        out = prefill(model, prompt)
        written, seconds = decode(model, out, tokens)
    speed = len(prompt) / statistics.median(seconds)
    return written, {"decode_tokens_per_second": speed, "state_bytes": cache_bytes(out[CACHE_ARGUMENT])}


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> Any:
    """Reads `ids: [B, T]`. The output has a cache, and logits of the last token only where the model supports that."""
    base: Any = getattr(model, "base", model)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    return model(input_ids=ids.to(model.device), use_cache=True, **last_only)


@torch.no_grad()
def decode(model: PreTrainedModel, out: Any, steps: int) -> tuple[Tensor, list[float]]:
    """Greedy decoding after a prefill with output `out`, whose cache is updated.

    Returns `[B, 1 + steps]` tokens, of which the first follows from the prefill, and the seconds of each step.
    """
    written, seconds = [out.logits[:, -1:].argmax(-1)], []
    for _ in range(steps):
        step = functools.partial(model, written[-1], use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
        result, elapsed = timed(step, model.device)
        written.append(result.logits[:, -1:].argmax(-1))
        seconds.append(elapsed)
    return torch.cat(written, dim=1), seconds


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The return value of a call, and its seconds."""
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


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """The return value of a call, and its peak memory in bytes above what was in use before; None if unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the call reuses memory that was freed before
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
    except OSError:
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def efficiency_results(
    models: Mapping[str, PreTrainedModel],
    lengths: Sequence[int],
    batches: Sequence[int] = (1,),
    repeats: int = 3,
    max_prefill_seconds: float = 60.0,
) -> dict[str, list[Result]]:
    """Prefill and decoding of random tokens by each model, at each length and batch size.

    Metrics: `prefill_seconds` and `seconds_per_token` (one decoding step of the whole batch), medians over `repeats`
    with the fastest and the slowest as `low` and `high`; `peak_bytes` of a prefill, `cache_bytes` after it.

    max_prefill_seconds: a length is skipped if its prefill, extrapolated quadratically from the one before, takes
    longer.
    """
    results: dict[str, list[Result]] = {name: [] for name in models}
    for batch in batches:
        before = dict.fromkeys(models, (1, 0.0))  # length and seconds of the last prefill
        for length in sorted(lengths):
            expected = {name: seconds * (length / shorter) ** 2 for name, (shorter, seconds) in before.items()}
            for name in (name for name in models if expected[name] > max_prefill_seconds):
                logger.info("%s: skipped %d tokens x %d, the prefill takes too long", name, length, batch)
            fast = {name: model for name, model in models.items() if expected[name] <= max_prefill_seconds}
            for name, found in _measure(fast, length, batch, repeats).items():
                results[name] += found
                before[name] = length, found[0].value
    return results


def _measure(models: Mapping[str, PreTrainedModel], length: int, batch: int, repeats: int) -> dict[str, list[Result]]:
    seconds: dict[str, dict[str, list[float]]] = {m: {"prefill_seconds": [], "seconds_per_token": []} for m in models}
    sizes: dict[str, dict[str, int | None]] = {}
    generator = torch.Generator().manual_seed(length)
    with progress.bar((repeats + 1) * len(models), f"{length} tokens x {batch}", "prefills", delay=3) as bar:
        for repeat, (name, model) in itertools.product(range(repeats + 1), models.items()):
            vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
            read = functools.partial(prefill, model, torch.randint(vocabulary, (batch, length), generator=generator))
            with eval_mode(model):
                if repeat == 0:  # also the warm-up
                    out, peak = peak_memory(read, model.device)
                    sizes[name] = {"peak_bytes": peak, "cache_bytes": cache_bytes(out[CACHE_ARGUMENT])}
                    decode(model, out, 2)
                else:
                    out, elapsed = timed(read, model.device)
                    seconds[name]["prefill_seconds"].append(elapsed)
                    steps = decode(model, out, DECODED_TOKENS)[1]
                    seconds[name]["seconds_per_token"].append(statistics.median(steps))
            bar.update()
    results: dict[str, list[Result]] = {}
    for name in models:
        make = functools.partial(Result, TASK, length=length, batch=batch)
        times = ((metric, statistics.median(own), min(own), max(own)) for metric, own in seconds[name].items())
        results[name] = [make(metric, middle, low=low, high=high, n=repeats) for metric, middle, low, high in times]
        results[name] += [make(metric, float(size), n=1) for metric, size in sizes[name].items() if size is not None]
    return results
