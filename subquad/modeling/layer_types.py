"""Resolves `layer_types` (which mixer or attention each layer gets) to `layer_specs`, one dict a layer."""

import re
from collections.abc import Mapping
from typing import Any

from subquad import mixers
from subquad.mixers import ATTENTION
from subquad.utils import UserError, nearest

LAYER_NUMBERS = re.compile(r"\s*\d+(-\d+)?\s*(,\s*\d+(-\d+)?\s*)*")
EXPECTED_NUMBERS = "layer numbers like '0,8,16' or '2-5', or 'default'"

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
    specs: dict[int, dict[str, Any]] = {}
    for key, layer_type in layer_types.items():
        if key == "default":
            continue
        for index in parse_layer_numbers(str(key), num_layers):
            if index in specs:
                raise UserError(f"layer_types: {key}: layer {index} is listed twice")
            specs[index] = resolve_layer_type(layer_type, f"layer_types: {key}")
    if "default" in layer_types:
        default = resolve_layer_type(layer_types["default"], "layer_types: default")
        specs = {index: specs.get(index, default) for index in range(num_layers)}
    missing = [str(index) for index in range(num_layers) if index not in specs]
    if missing:
        raise UserError(f"layer_types: layer {', '.join(missing)} is missing; list it, or add a 'default'")
    return [dict(specs[index]) for index in range(num_layers)]


def parse_layer_numbers(text: str, num_layers: int) -> list[int]:
    """The layers in `"0,8,16"` or `"2-5"`; both ends of a range are included."""
    if not LAYER_NUMBERS.fullmatch(text):
        raise UserError(f"layer_types: got {text!r}, expected {EXPECTED_NUMBERS}")
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers += range(int(first), int(last if dash else first) + 1)
    outside = [str(index) for index in numbers if index >= num_layers]
    if outside:
        raise UserError(
            f"layer_types: {text}: there is no layer {', '.join(outside)}; expected layers from 0 to {num_layers - 1}"
        )
    return numbers


def find_mistakes(layer_types: Mapping[str, LayerType]) -> list[tuple[str, str]]:
    """The key and a message for each mistake that can be found without the number of layers."""
    found = []
    for key, layer_type in layer_types.items():
        if key != "default" and not LAYER_NUMBERS.fullmatch(str(key)):
            found.append((key, f"got {key!r}, expected {EXPECTED_NUMBERS}"))
        found += [(key, message) for message in layer_type_mistakes(layer_type)]
    return found


def resolve_layer_type(layer_type: LayerType, key: str) -> dict[str, Any]:
    """The `layer_spec` of one layer type; UserError with a line, beginning with `key`, for each mistake."""
    if mistakes := layer_type_mistakes(layer_type):
        raise UserError(*(f"{key}: {message}" for message in mistakes))
    return {"mixer": layer_type} if isinstance(layer_type, str) else dict(layer_type)


def layer_type_mistakes(layer_type: LayerType) -> list[str]:
    """A message for an unknown mixer, and for each option that is unknown or has a wrong value."""
    if not isinstance(layer_type, str | Mapping):
        return [f"got {layer_type!r}, expected a mixer's name, or a mapping with `mixer` and its options"]
    options = {} if isinstance(layer_type, str) else dict(layer_type)
    name = layer_type if isinstance(layer_type, str) else options.pop("mixer", None)
    if name == ATTENTION:
        return attention_mistakes(options)
    if name == mixers.SOFTMAX:
        return [f"{option}: unknown option; {name} has none" for option in options]
    if isinstance(name, str) and name in mixers.MIXERS:
        return list(mixers.find_options(name).mistakes(options).values())
    return [f"unknown mixer {name!r}{nearest(name, [*mixers.names(), ATTENTION])}"]


def attention_mistakes(options: Mapping[str, Any]) -> list[str]:
    """A message for each unknown option of attention, each wrong value, and for sinks without a window."""
    known = ("window", "sinks", "qk_norm")
    mistakes = []
    for name, value in options.items():
        if name not in known:
            mistakes.append(f"unknown option {name!r} of attention{nearest(name, known)}")
        elif name == "qk_norm":
            if not isinstance(value, float) or not 0 < value < 1:
                mistakes.append(f"qk_norm: got {value!r}, expected the norm's epsilon, such as 1.0e-6")
        else:
            least = 1 if name == "window" else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                mistakes.append(f"{name}: got {value!r}, expected a whole number of tokens, at least {least}")
    if options.get("sinks") and "window" not in options:
        mistakes.append(f"sinks: got {options['sinks']!r} without a window, expected both")
    return mistakes
