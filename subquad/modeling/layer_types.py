"""Resolves `layer_types` (which mixer or attention each layer gets) to `layer_specs`, one dict a layer."""

import re
from collections.abc import Mapping
from typing import Any

from subquad import mixers
from subquad.mixers import ATTENTION
from subquad.utils import UserError, nearest

LAYER_NUMBERS = re.compile(r"\s*\d+(-\d+)?\s*(,\s*\d+(-\d+)?\s*)*")
LEAST_TOKENS = {"window": 1, "sinks": 0}
"""Options of attention that are numbers of tokens, with their smallest values."""

LayerType = str | Mapping[str, Any]
"""A mixer's name, "attention", or a mapping of `mixer` to the name and of its options to their values."""


def resolve_layer_types(layer_types: Mapping[str, LayerType], num_layers: int) -> list[dict[str, Any]]:
    """One `layer_spec`, `{"mixer": name, **options}`, a layer.

    Args:
        layer_types: such as `{"default": "gla", "0,8,16": "attention", "2-5": {"mixer": "gla", "short_conv": 4}}`.
            Layers are counted from 0. Without a default every layer must be listed, and none may be listed twice.
            "attention" takes `window` and `sinks` (numbers of tokens) and `qk_norm` (the epsilon of an RMS norm of
            queries and keys, for a teacher that has none).
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
        return list(mixers.find_options(name).mistakes(options).values())
    return [f"unknown mixer {name!r}{nearest(name, [*mixers.names(), ATTENTION])}"]


def attention_mistakes(options: Mapping[str, Any]) -> list[str]:
    """A message for each unknown option of attention, each wrong value, and for sinks without a window."""
    mistakes = []
    for name, value in options.items():
        if name == "qk_norm":
            if not isinstance(value, float) or not 0 < value < 1:
                mistakes.append(f"qk_norm: got {value!r}, expected the norm's epsilon, such as 1.0e-6")
        elif name in LEAST_TOKENS:
            if type(value) is not int or value < LEAST_TOKENS[name]:
                expected = f"expected a whole number of tokens, at least {LEAST_TOKENS[name]}"
                mistakes.append(f"{name}: got {value!r}, {expected}")
        else:
            mistakes.append(f"unknown option {name!r} of attention{nearest(name, [*LEAST_TOKENS, 'qk_norm'])}")
    if options.get("sinks") and "window" not in options:
        mistakes.append(f"sinks: got {options['sinks']!r} without a window, expected both")
    return mistakes
