"""Resolves `layer_types` (which mixer or attention each layer gets) to `layer_specs`, one dict a layer."""

from collections.abc import Mapping
from typing import Any

from subquad import mixers
from subquad.mixers import ATTENTION
from subquad.utils import UserError, nearest

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
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"layer_types: got {text!r}, expected layer numbers like '0,8,16' or '2-5', or 'default'")
        numbers += range(int(first), int(last if dash else first) + 1)
    outside = [str(index) for index in numbers if index >= num_layers]
    if outside:
        raise UserError(
            f"layer_types: {text}: there is no layer {', '.join(outside)}; expected layers from 0 to {num_layers - 1}"
        )
    return numbers


def resolve_layer_type(layer_type: LayerType, key: str) -> dict[str, Any]:
    """The `layer_spec` of one layer type; UserError, beginning with `key`, for an unknown mixer or option."""
    if not isinstance(layer_type, str | Mapping):
        raise UserError(
            f"{key}: got {layer_type!r}, expected a mixer's name, or a mapping with `mixer` and its options"
        )
    spec = {"mixer": layer_type} if isinstance(layer_type, str) else dict(layer_type)
    name = spec.get("mixer")
    known = [*mixers.names(), ATTENTION]
    if name not in known:
        raise UserError(f"{key}: unknown mixer {name!r}{nearest(name, known)}")
    options = {option: value for option, value in spec.items() if option != "mixer"}
    if name in mixers.OPTIONS:
        mixers.OPTIONS[name].from_dict(options)
    elif name == ATTENTION:
        check_attention_options(options, key)
    elif options:
        raise UserError(f"{key}: {name} takes no options; got {', '.join(options)}")
    return spec


def check_attention_options(options: Mapping[str, Any], key: str) -> None:
    """UserError for an unknown option of attention, a wrong value, or sinks without a window."""
    known = ("window", "sinks", "qk_norm")
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{key}: unknown option {name!r} of attention{nearest(name, known)}")
        if name == "qk_norm":
            if not isinstance(value, float) or not 0 < value < 1:
                raise UserError(f"{key}: qk_norm: got {value!r}, expected the norm's epsilon, such as 1.0e-6")
            continue
        least = 1 if name == "window" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{key}: {name}: got {value!r}, expected a whole number of tokens, at least {least}")
    if options.get("sinks") and "window" not in options:
        raise UserError(f"{key}: sinks: got {options['sinks']} without a window, expected both")
