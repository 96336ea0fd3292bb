"""Caches on disk: a prefix that was read once, for later processes.

A file holds the tensors in safetensors; its metadata say, in JSON, what each layer holds, with the name of a tensor in
place of it, and of which student the cache is.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from subquad.modeling.cache import RecurrentCacheLayer, SubquadCache, layer_contents
from subquad.utils import UserError, tensor_digest

TENSOR = "tensor"
SMALL = 4096
"""Number of entries of small weights: norms, gates, decays."""


def fingerprints(student: Any) -> dict[str, str]:
    """Of the student's layers and dtype; and of its small weights, which every training changes, unless some of them
    are offloaded and are nowhere between calls."""
    config = student.config
    layers = json.dumps([config.layer_specs, config.attention_specs, str(student.dtype)], sort_keys=True)
    found = {"student": hashlib.sha256(layers.encode()).hexdigest()}
    small = [p for p in student.parameters() if p.numel() <= SMALL]
    if all(p.device.type != "meta" for p in small):
        found["weights"] = tensor_digest(small)
    return found


def digest(tensors: dict[str, Tensor], layers: str) -> str:
    """Of all that a file holds."""
    return hashlib.sha256((tensor_digest(tensors[name] for name in sorted(tensors)) + layers).encode()).hexdigest()


def save_cache(cache: SubquadCache, student: Any, path: str | Path) -> None:
    """Writes `cache`, of `student`, to `path`, completely or not at all."""
    tensors: dict[str, Tensor] = {}

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().clone().contiguous()  # a file holds no tensor twice
            return {TENSOR: name}
        if isinstance(value, dict):
            return {str(key): described(x) for key, x in value.items()}
        return [described(x) for x in value] if isinstance(value, tuple) else value

    layers = json.dumps([described(layer_contents(layer)) for layer in cache.layers])
    partial = Path(f"{path}.part")
    metadata = {"layers": layers, "digest": digest(tensors, layers)}
    save_file(tensors, partial, {**fingerprints(student), **metadata})
    partial.replace(path)


def load_cache(
    cache: SubquadCache, student: Any, path: str | Path, devices: Sequence[torch.device | str]
) -> SubquadCache:
    """Fills an empty `cache` of `student` from the file that `save_cache` wrote, each layer on its
    device of `devices`.

    Raises:
        UserError: no such file, no cache in it, or one of another student.
    """
    if not Path(path).is_file():
        raise UserError(f"cache: no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        layers, _ = json.loads(metadata["layers"]), metadata["student"]
        changed = metadata["digest"] != digest(tensors, metadata["layers"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"cache: {str(path)!r} holds no cache of a student (or is damaged): {error}") from error
    if changed:
        raise UserError(f"cache: {str(path)!r} is damaged: its content has changed")
    if any(metadata.get(key, value) != value for key, value in fingerprints(student).items()):
        raise UserError(f"cache: {str(path)!r} is of another student, or of one with other weights")

    def restored(value: Any, device: torch.device | str) -> Any:
        if isinstance(value, dict) and TENSOR in value:
            return tensors[value[TENSOR]].to(device)
        if isinstance(value, dict):
            return {key: restored(x, device) for key, x in value.items()}
        return tuple(restored(x, device) for x in value) if isinstance(value, list) else value

    try:
        for layer, contents, device in zip(cache.layers, layers, devices, strict=True):
            set_layer_contents(layer, restored(contents, device))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"cache: {str(path)!r} is damaged: {error!r}") from error
    return cache


def set_layer_contents(layer: Any, contents: dict[str, Any]) -> None:
    """Gives an empty layer what `layer_contents` returned, in which keys may be strings and tuples plain."""
    if isinstance(layer, RecurrentCacheLayer):
        vars(layer).update(layer.with_types(contents))
    elif contents:
        layer.lazy_initialization(contents["keys"], contents["values"])
        layer.keys, layer.values = contents["keys"], contents["values"]
