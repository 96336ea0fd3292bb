"""Resolves `layer_types` (which mixer or attention each layer gets) to `layer_specs`, one dict a layer."""

import re
from collections.abc import Mapping
from typing import Any

from subquad import mixers
from subquad.mixers import ATTENTION
from subquad.mixers.options import POSITIVE
from subquad.utils import UserError, nearest

LAYER_NUMBERS = re.compile(r"\s*\d+(-\d+)?\s*(,\s*\d+(-\d+)?\s*)*")
LEAST_TOKENS = {"window": 1, "sinks": 0}
"""Options of attention that are numbers of tokens, with their smallest values."""

MERGES = ("mass", "denominator", "lolcats", "fixed", "add")
"""How the output of a mixer's memory is merged with that of attention to a window (`subquad.modeling.near_far`)."""
DENOMINATORS = ("denominator", "lolcats")
"""Merges that divide the sum over the window and the memory by one sum of weights."""
DEFAULT_MERGE = "mass"
MEMORIES = ("outside", "all")
"""What such a memory holds: the tokens that have left the window, or all tokens."""
NEAR_OPTIONS = ("window", "sinks", "merge", "memory", "memory_heads")
"""Options of a mixer that keeps attention to a window beside its memory."""
FULL = "full"
"""The window of attention that sees all tokens."""
Window = int | str | None

LayerType = str | Mapping[str, Any]
"""A mixer's name, "attention", or a mapping of `mixer` to the name and of its options to their values."""


def resolve_layer_types(layer_types: Mapping[str, LayerType], num_layers: int) -> list[dict[str, Any]]:
    """One `layer_spec`, `{"mixer": name, **options}`, a layer.

    Args:
        layer_types: such as `{"default": "gla", "0,8,16": "attention", "2-5": {"mixer": "gla", "short_conv": 4}}`.
            Layers are counted from 0. Without a default every layer must be listed, and none may be listed twice.
            "attention" takes `window` (a number of tokens or "full", or a list with one for each key/value head),
            `sinks` (a number of tokens, for heads with a window) and `qk_norm` (the epsilon of an RMS norm of queries
            and keys, for a teacher that has none). A mixer that takes `window` and `sinks` keeps attention to them, and
            remembers what has left the window; `merge` is one of `MERGES` and `memory` one of `MEMORIES` (see
            `subquad.modeling.near_far`).
        num_layers: number of layers of the teacher.

    Raises:
        UserError: an unknown mixer or option; a layer that does not exist, is listed twice or is missing.
    """
    if not isinstance(layer_types, Mapping) or not layer_types:
        raise UserError(
            f"layer_types: got {layer_types!r}, expected a mapping like {{'default': 'gla', '0,8': 'attention'}}"
        )
    if mistakes := find_mistakes(layer_types):
        raise UserError(*(f"layer_types: {key}: {message}" for key, message in mistakes))
    specs: dict[int, LayerType] = {}
    for key in layer_types:
        for index in [] if key == "default" else layer_numbers(str(key)):
            if index >= num_layers:
                expected = f"expected layers from 0 to {num_layers - 1}"
                raise UserError(f"layer_types: {key}: there is no layer {index}; {expected}")
            if index in specs:
                raise UserError(f"layer_types: {key}: layer {index} is listed twice")
            specs[index] = layer_types[key]
    missing = [str(index) for index in range(num_layers) if index not in specs]
    if missing and "default" not in layer_types:
        raise UserError(f"layer_types: layer {', '.join(missing)} is missing; list it, or add a 'default'")
    chosen = [specs[index] if index in specs else layer_types["default"] for index in range(num_layers)]
    return [{"mixer": spec} if isinstance(spec, str) else dict(spec) for spec in chosen]


def layer_numbers(text: str) -> list[int]:
    """The layers in `"0,8,16"` or `"2-5"`; both ends of a range are included."""
    ranges = (part.partition("-") for part in text.split(","))
    return [index for first, dash, last in ranges for index in range(int(first), int(last if dash else first) + 1)]


def find_mistakes(layer_types: Mapping[str, LayerType]) -> list[tuple[str, str]]:
    """The key and a message for each mistake that can be found without the number of layers."""
    found = []
    for key, layer_type in layer_types.items():
        if key != "default" and not LAYER_NUMBERS.fullmatch(str(key)):
            found.append((key, f"got {key!r}, expected layer numbers like '0,8,16' or '2-5', or 'default'"))
        found += [(key, message) for message in layer_type_mistakes(layer_type)]
    return found


def keep_groups_mistake(layer_types: Mapping[str, LayerType]) -> str | None:
    """A message if a student with these layer types cannot keep groups whole: some layers have no attention."""
    names = {key: spec if isinstance(spec, str) else spec.get("mixer") for key, spec in layer_types.items()}
    others = [f"{name} ({key})" for key, name in names.items() if name != ATTENTION]
    example = "{default: {mixer: attention, window: 64}}"
    expected = f"expected a budget, or attention with a window in every layer, as in {example}"
    return f"got the layer types {', '.join(others)}, {expected}" if others else None


def check_layer_type(layer_type: LayerType, key: str) -> None:
    """Raises UserError with a line, beginning with `key`, for each mistake."""
    if mistakes := layer_type_mistakes(layer_type):
        raise UserError(*(f"{key}: {message}" for message in mistakes))


def layer_type_mistakes(layer_type: LayerType) -> list[str]:
    """A message for an unknown mixer, and for each option that is unknown or has a wrong value."""
    if not isinstance(layer_type, str | Mapping):
        return [f"got {layer_type!r}, expected a mixer's name, or a mapping with `mixer` and its options"]
    options = {"mixer": layer_type} if isinstance(layer_type, str) else dict(layer_type)
    name = options.pop("mixer", None)
    if name == ATTENTION:
        return attention_mistakes(options)
    if name == mixers.SOFTMAX:
        return [f"{option}: unknown option; {name} has none" for option in options]
    if isinstance(name, str) and name in mixers.MIXERS:
        return list(mixer_mistakes(name, options).values())
    return [f"unknown mixer {name!r}{nearest(name, [*mixers.names(), ATTENTION])}"]


def mixer_mistakes(name: str, options: Mapping[str, Any]) -> dict[str, str]:
    """A message for each option of a mixer, with a window or without, that is unknown or has a wrong value."""
    near = {option: value for option, value in options.items() if option in NEAR_OPTIONS}
    others = {option: value for option, value in options.items() if option not in NEAR_OPTIONS}
    if not near:
        if others.get("qk_activation") == "ones":
            return {"qk_activation": "qk_activation: got 'ones' without a window, expected one: it is for memories"}
        return mixers.find_options(name).mistakes(others)
    mistakes = {"window": f"window: missing; expected a number of tokens for {', '.join(near)}"}
    if "window" in near:
        tokens = {option: value for option, value in near.items() if option in LEAST_TOKENS}
        mistakes = {message.partition(":")[0]: message for message in attention_mistakes(tokens)}
    heads = near.get("memory_heads", [0])
    if not isinstance(heads, list | tuple) or not heads or not all(is_count(head, 0) for head in heads):
        mistakes["memory_heads"] = f"memory_heads: got {heads!r}, expected a list of key/value heads, counted from 0"
    for option, choices in (("merge", MERGES), ("memory", MEMORIES)):
        if near.get(option, choices[0]) not in choices:
            mistakes[option] = f"{option}: got {near[option]!r}{nearest(near[option], choices)}"
    merge = near.get("merge")
    if merge in DENOMINATORS and not mixers.find_options(name).sums_keys:
        mistakes["merge"] = f"merge: got {merge!r} with {name}, expected a mixer whose state is a sum of k v^T"
    elif merge in DENOMINATORS and others.get("qk_activation") not in POSITIVE:
        expected = f"expected qk_activation to be one of {', '.join(POSITIVE)}: a denominator must be positive"
        mistakes["merge"] = f"merge: got {merge!r}, {expected}"
    return mistakes | mixers.memory_mistakes(name, others)


def attention_mistakes(options: Mapping[str, Any]) -> list[str]:
    """A message for each unknown option of attention, each wrong value, and for sinks without a window."""
    mistakes = []
    for name, value in options.items():
        if name == "qk_norm":
            if not isinstance(value, float) or not 0 < value < 1:
                mistakes.append(f"qk_norm: got {value!r}, expected the norm's epsilon, such as 1.0e-6")
        elif name in LEAST_TOKENS:
            by_head = name == "window" and isinstance(value, list | tuple) and value
            numbers = value if by_head else [value]
            if not all((n == FULL and name == "window") or is_count(n, LEAST_TOKENS[name]) for n in numbers):
                expected = f"expected a whole number of tokens, at least {LEAST_TOKENS[name]}"
                expected += f", {FULL!r}, or a list with one for each key/value head" if name == "window" else ""
                mistakes.append(f"{name}: got {value!r}, {expected}")
        else:
            mistakes.append(f"unknown option {name!r} of attention{nearest(name, [*LEAST_TOKENS, 'qk_norm'])}")
    if options.get("sinks") and "window" not in options:
        mistakes.append(f"sinks: got {options['sinks']!r} without a window, expected both")
    return mistakes


def is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least
