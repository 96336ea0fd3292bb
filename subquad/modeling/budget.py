"""Spends a number of bytes of cache on the key/value heads of a teacher's attention, where they matter most.

Each key/value head keeps the first tokens of the document and a window of its own, and may have a memory of what has
left it (`near_far`). The budget is spent greedily: each step is the wider window, or the memory, with which the error
of a head (`window_errors`, `memory_errors`) falls most for each byte. Nothing is trained.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.mixers import ATTENTION, AttentionSpec
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.cache import cached_numbers, head_groups
from subquad.modeling.layer_types import FULL
from subquad.modeling.memory_errors import MemoryCandidates, memory_options, set_memory
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.window_errors import WINDOWS, window_errors
from subquad.utils import UserError

SINKS = 4
"""First tokens that every head keeps (arXiv 2309.17453)."""
CALIBRATION_ROWS, CALIBRATION_LENGTH = 3, 2048
"""The shape of the texts on which the command line and recipes measure the errors of windows."""
NO_LIMIT = 2**40
"""More tokens than any window has."""
UNITS = {"": 0, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Allocation:
    """The windows of all key/value heads, and what they cost.

    windows: of each head of each layer; None: all tokens. sinks: of every head with a window. errors: of each head's
    window, `[layers][heads]`; 0 for heads that see all tokens. cache_bytes: of the heads with a window, which the
    length of a sequence does not change. budget_bytes: what was to be spent. uniform_window: the largest window of all
    heads with at most these bytes, and uniform_error: the sum of its errors. memory_heads: of each layer the heads with
    a memory, of which `memories` has the fitted parameters.
    """

    windows: list[list[int | None]]
    sinks: int
    errors: list[list[float]]
    cache_bytes: int
    budget_bytes: int
    uniform_window: int
    uniform_error: float
    memory_heads: list[list[int]]
    memories: MemoryCandidates | None = None

    @property
    def layer_types(self) -> dict[str, dict[str, Any]]:
        """As `linearize` takes them."""
        types = {}
        for index, windows in enumerate(self.windows):
            window = [w or FULL for w in windows]
            types[str(index)] = {"mixer": ATTENTION, "window": window, "sinks": self.sinks}
            if self.memory_heads[index]:
                assert self.memories is not None
                types[str(index)] = self.memories.layer_spec(window, self.memory_heads[index])
        return types

    def set_memories(self, student: SubquadForCausalLM) -> None:
        """Sets the memories of a student with these layer types to what was fitted."""
        for index, (layer, heads) in enumerate(zip(student.mixer_layers, self.memory_heads, strict=True)):
            if heads:
                assert self.memories is not None
                fitted, windows = self.memories.fitted, self.windows[index]
                own = [fitted[index, w] if g in heads and w is not None else None for g, w in enumerate(windows)]
                set_memory(layer, own)  # type: ignore[arg-type]


def allocate_budget(
    teacher: PreTrainedModel,
    budget: str | int,
    calibration_ids: Tensor,
    attention_layers: Sequence[AttentionInfo] | None = None,
    budget_context: int | None = None,
    keep_groups: Sequence[tuple[int, int]] = (),
    seed: int = 0,
    memory: str | None = None,
) -> Allocation:
    """Chooses a window for every key/value head, and whether it has a memory, so that the cache of a sequence takes at
    most `budget`.

    Args:
        teacher: a causal language model (see `discover_attention`).
        budget: "96" or 96: the bytes of 96 + 4 tokens of the teacher's cache; or bytes, as "4MB".
        calibration_ids: token ids `[B, T]`, without padding; windows longer than T / 2 are not tried.
        attention_layers: what `discover_attention(teacher)` returned. None: it is called here.
        budget_context: number of tokens for which heads may be kept whole, at the price of as many tokens. None: no
            head is, except `keep_groups`, which the budget then does not pay for.
        keep_groups: layer and key/value head of heads that are kept whole.
        seed: of the tokens that are sampled.
        memory: the mixer of the memories; None: there are windows only.

    Raises:
        UserError: an invalid or too small budget, or a head that does not exist.
    """
    layers = list(discover_attention(teacher) if attention_layers is None else attention_layers)
    total = budget_bytes(budget, layers, teacher.dtype)
    kept = check_groups(keep_groups, layers)
    windows = candidate_windows(calibration_ids.shape[1])
    candidates = None
    if memory is not None:
        average = total // sum(info.spec.num_kv_heads * token_bytes(info.spec, teacher.dtype) for info in layers)
        candidates = MemoryCandidates(memory, layers, memory_windows(memory, windows, average), SINKS)
    visit = None if candidates is None else candidates.visitor(len(calibration_ids))
    errors = window_errors(teacher, layers, calibration_ids, windows, SINKS, seed, visit)
    heads = [(i, g) for i, info in enumerate(layers) for g in range(info.spec.num_kv_heads)]
    choices = [
        [whole_head(layers[i].spec, teacher.dtype, budget_context or 0)]
        if (i, g) in kept
        else head_choices(layers[i].spec, errors[i][g], windows, teacher.dtype, budget_context)
        for i, g in heads
    ]
    uniform = min(windows, key=lambda w: (sum(c.bytes for c in at_most(choices, w)) > total, -w))
    uniform_error = sum(choice.error for choice in at_most(choices, uniform))
    for index, more in enumerate([] if candidates is None else memory_choices(candidates, teacher.dtype)):
        choices[index] += [] if heads[index] in kept else more
    chosen = spend(choices, total)
    by_layer: list[list[Choice]] = [[] for _ in layers]
    for (i, _), choice in zip(heads, chosen, strict=True):
        by_layer[i].append(choice)
    return Allocation(
        windows=[[choice.window for choice in own] for own in by_layer],
        sinks=SINKS,
        errors=[[choice.error for choice in own] for own in by_layer],
        cache_bytes=constant_bytes(layers, by_layer, teacher.dtype, candidates),
        budget_bytes=total,
        uniform_window=uniform,
        uniform_error=uniform_error,
        memory_heads=[[g for g, choice in enumerate(own) if choice.memory] for own in by_layer],
        memories=candidates,
    )


def calibration_shape(teacher: PreTrainedModel) -> tuple[int, int]:
    """Rows and tokens of a row: `CALIBRATION_LENGTH`, or the teacher's context if that is shorter."""
    context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    return CALIBRATION_ROWS, min(CALIBRATION_LENGTH, context or CALIBRATION_LENGTH)


# ---------------------------------------------------------------------- bytes and choices


@dataclass(frozen=True)
class Choice:
    """A window of one key/value head (None: all tokens), its bytes in the cache, and the error that it causes."""

    window: int | None
    bytes: int
    error: float
    memory: bool = False
    """Whether a memory holds what has left the window."""


def token_bytes(spec: AttentionSpec, dtype: torch.dtype) -> int:
    """Bytes of one token in the cache of one key/value head."""
    return (spec.head_dim + spec.value_dim) * dtype.itemsize


def budget_bytes(budget: str | int, layers: Sequence[AttentionInfo], dtype: torch.dtype) -> int:
    """The bytes of a budget such as "96" (tokens, to which the sinks are added) or "4MB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(budget))
    unit = next((u for u in UNITS if found and u.lower() == found[2].lower()), None)
    if found is None or unit is None or isinstance(budget, bool) or (not unit and "." in found[1]):
        raise UserError(f"budget: got {budget!r}, expected a number of tokens such as '96', or of bytes such as '4MB'")
    if unit:
        return int(float(found[1]) * UNITS[unit])
    per_token = sum(info.spec.num_kv_heads * token_bytes(info.spec, dtype) for info in layers)
    return (int(found[1]) + SINKS) * per_token


def check_groups(groups: Sequence[tuple[int, int]], layers: Sequence[AttentionInfo]) -> set[tuple[int, int]]:
    """`groups` as a set. Raises UserError if there is no such layer or key/value head."""
    for layer, head in groups:
        if not 0 <= layer < len(layers) or not 0 <= head < layers[layer].spec.num_kv_heads:
            expected = f"expected one of {len(layers)} layers and its number of a key/value head"
            raise UserError(f"keep_groups: got layer {layer} and head {head}, {expected}")
    return {(layer, head) for layer, head in groups}


def candidate_windows(length: int) -> list[int]:
    """The windows that are tried on rows of `length` tokens."""
    return [window for window in WINDOWS if window <= max(1, length // 2)]


def whole_head(spec: AttentionSpec, dtype: torch.dtype, price: int) -> Choice:
    """A head that keeps all tokens, at the price of as many tokens as given."""
    return Choice(None, price * token_bytes(spec, dtype), 0.0)


def head_choices(
    spec: AttentionSpec, errors: Tensor, windows: Sequence[int], dtype: torch.dtype, budget_context: int | None
) -> list[Choice]:
    """The choices of one head, cheapest first; the teacher's own window, if it has one, is the largest."""
    price, rotation = token_bytes(spec, dtype), 2 * spec.rotary_channels * dtype.itemsize
    choices = [
        Choice(w, (w - 1 + SINKS) * price + rotation, e)
        for w, e in zip(windows, errors.tolist(), strict=True)
        if spec.window is None or w - 1 + SINKS < spec.window - 1
    ]
    if spec.window is not None:
        choices.append(Choice(spec.window, (spec.window - 1) * price, 0.0))
    elif budget_context is not None:
        choices.append(whole_head(spec, dtype, budget_context))
    return sorted(choices, key=lambda choice: choice.bytes)


def memory_windows(mixer: str, windows: Sequence[int], average: int) -> list[int]:
    """The windows that are tried with a memory, given the average number of tokens of a head: that and a third; with
    sums of values, which cost as many bytes as two tokens, a sixth, a half, that and twice that."""
    sums = memory_options(mixer)["qk_activation"] == "ones"
    limits = (average // 6, average // 2, average, 2 * average) if sums else (average // 3, average)
    return sorted({max((w for w in windows if w <= limit), default=1) for limit in limits})


def memory_choices(candidates: MemoryCandidates, dtype: torch.dtype) -> list[list[Choice]]:
    """The choices of each head with a memory; none in layers with the teacher's own window."""
    found = []
    for index, (info, errors) in enumerate(zip(candidates.layers, candidates.head_errors(), strict=True)):
        price, rotation = token_bytes(info.spec, dtype), 2 * info.spec.rotary_channels * dtype.itemsize
        for own in errors.tolist():
            by_window = zip(candidates.windows, candidates.nbytes[index], own, strict=True)
            choices = [Choice(w, (w - 1 + SINKS) * price + rotation + n, e, True) for w, n, e in by_window]
            found.append(choices if info.spec.window is None else [])
    return found


def constant_bytes(
    layers: Sequence[AttentionInfo],
    chosen: Sequence[Sequence[Choice]],
    dtype: torch.dtype,
    memories: MemoryCandidates | None,
) -> int:
    """Bytes of the cache of the heads with a window. `spend` charges each head a rotation for its sinks; heads of one
    window share it."""
    numbers = 0
    of_memories = 0
    for index, (info, own) in enumerate(zip(layers, chosen, strict=True)):
        for choice in own:
            if choice.memory and memories is not None and choice.window is not None:
                of_memories += memories.nbytes[index][memories.windows.index(choice.window)]
        groups = head_groups(tuple(choice.window for choice in own), SINKS, info.spec.window)
        windowed = [group for group in groups if group.window is not None]
        numbers += cached_numbers(info.spec, windowed, NO_LIMIT)
    return numbers * dtype.itemsize + of_memories


def at_most(choices: Sequence[Sequence[Choice]], window: int) -> list[Choice]:
    """For each head its choice with the largest window up to `window`, else its smallest choice."""
    return [max(own, key=lambda c: (c.window or 0) if (c.window or 0) <= window else -1) for own in choices]


def spend(choices: Sequence[Sequence[Choice]], total: int) -> list[Choice]:
    """One choice for each head, at most `total` bytes together: from the first, the cheapest one, each step takes the
    step with the largest fall of the error per byte. Raises UserError if the cheapest choices are too dear."""
    chosen = [own[0] for own in choices]
    used = sum(choice.bytes for choice in chosen)
    if used > total:
        raise UserError(
            f"budget: got {total:,} bytes, expected at least {used:,}, for the first tokens and the kept heads"
        )

    def gain(head: int, choice: Choice) -> float:
        return (chosen[head].error - choice.error) / (choice.bytes - chosen[head].bytes)

    while True:
        steps = [
            (gain(head, choice), head, choice)
            for head, own in enumerate(choices)
            for choice in own
            if 0 < choice.bytes - chosen[head].bytes <= total - used
        ]
        best, head, choice = max(steps, key=lambda step: step[0], default=(0.0, 0, None))
        if choice is None or best <= 0:
            return chosen
        used += choice.bytes - chosen[head].bytes
        chosen[head] = choice
