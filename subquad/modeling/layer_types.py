"""The layer plan: which mixer stands in which layer, from what a user writes to one entry a layer."""

from collections.abc import Mapping
from typing import Any

from subquad import mixers
from subquad.mixers import ATTENTION
from subquad.utils import UserError, nearest

LayerType = str | Mapping[str, Any]


def layer_specs(layers: Mapping[str, LayerType], count: int) -> list[dict[str, Any]]:
    """One `{"mixer": name, **options}` a layer.

    layers: `{"default": entry, "0,8,16": entry, "2-5": entry}`; an entry is a mixer's name, "attention", or a mapping
        with `mixer` and its options; those of attention are `window` and `sinks`, in tokens, and `qk_norm`, the epsilon
        of a norm of queries and keys that the teacher has not. Layers are counted from 0; without a default every layer
        must be named, once.

    Raises:
        UserError: unknown mixer or option, a layer that there is not, named twice, or left out.
    """
    if not isinstance(layers, Mapping) or not layers:
        raise UserError(
            f"layer_types: got {layers!r}, expected a mapping like {{'default': 'gla', '0,8': 'attention'}}"
        )
    plan: dict[int, dict[str, Any]] = {}
    for key, entry in layers.items():
        if key == "default":
            continue
        for index in layer_numbers(str(key), count):
            if index in plan:
                raise UserError(f"layer_types: layer {index} is named twice")
            plan[index] = layer_spec(entry, f"layer_types: {key}")
    if "default" in layers:
        default = layer_spec(layers["default"], "layer_types: default")
        plan = {index: plan.get(index, default) for index in range(count)}
    missing = [str(index) for index in range(count) if index not in plan]
    if missing:
        raise UserError(f"layer_types: no entry for layer {', '.join(missing)}; name them, or give a 'default'")
    return [dict(plan[index]) for index in range(count)]


def layer_numbers(text: str, count: int) -> list[int]:
    """`"0,8,16"` and `"2-5"` as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"layer_types: got {text!r}, expected layer numbers like '0,8,16' or '2-5', or 'default'")
        found += range(int(first), int(last if dash else first) + 1)
    outside = [str(index) for index in found if index >= count]
    if outside:
        raise UserError(f"layer_types: there is no layer {', '.join(outside)}; the teacher has {count}, counted from 0")
    return found


def layer_spec(entry: LayerType, where: str) -> dict[str, Any]:
    """An entry as a mapping, its mixer and options checked."""
    if not isinstance(entry, str | Mapping):
        raise UserError(f"{where}: got {entry!r}, expected a mixer's name, or a mapping with `mixer` and its options")
    entry = {"mixer": entry} if isinstance(entry, str) else dict(entry)
    name = entry.get("mixer")
    known = [*mixers.names(), ATTENTION]
    if name not in known:
        raise UserError(f"{where}: unknown mixer {name!r}{nearest(name, known)}")
    options = {key: value for key, value in entry.items() if key != "mixer"}
    if name in mixers.OPTIONS:
        mixers.OPTIONS[name].from_dict(options)
    elif name == ATTENTION:
        check_attention(options, where)
    elif options:
        raise UserError(f"{where}: {name} takes no options; got {', '.join(options)}")
    return entry


def check_attention(options: Mapping[str, Any], where: str) -> None:
    """The options of attention: a window of at least one token, sinks only beside a window, an epsilon."""
    known = ("window", "sinks", "qk_norm")
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{where}: unknown option {name!r} of attention{nearest(name, known)}")
        if name == "qk_norm":
            if not isinstance(value, float) or not 0 < value < 1:
                raise UserError(f"{where}: qk_norm: got {value!r}, expected its epsilon, such as 1.0e-6")
            continue
        least = 1 if name == "window" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{where}: {name}: got {value!r}, expected a whole number of tokens, at least {least}")
    if options.get("sinks") and "window" not in options:
        raise UserError(f"{where}: sinks without a window; attention that sees all tokens sees the first ones too")
