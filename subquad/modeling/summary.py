"""Describes a student from its configuration alone: layers, options, parameters and cache size (`subquad inspect`)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from subquad import mixers
from subquad.modeling.layers import MixerLayer
from subquad.modeling.modeling_subquad import SubquadConfig, SubquadForCausalLM
from subquad.utils import UserError

CONTEXTS = (1024, 8192, 65536)
"""Numbers of tokens for which cache sizes are shown."""


def read_config(directory: str | Path) -> SubquadConfig:
    """The configuration of a saved student. Raises UserError if there is none."""
    path = Path(directory).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(f"{str(directory)!r} holds no config.json; expected the directory of a saved student")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise UserError(f"{str(directory)!r}: config.json cannot be read: {error}") from error
    if not isinstance(config, SubquadConfig):
        raise UserError(f"{str(directory)!r} is a {config.model_type} model; expected a student (model_type subquad)")
    return config


def meta_model(config: SubquadConfig) -> SubquadForCausalLM:
    """The student on the meta device, without weights."""
    with torch.device("meta"):
        student = SubquadForCausalLM(config)
    return student.to(config_dtype(config)).eval()  # type: ignore[arg-type]


def config_dtype(config: SubquadConfig) -> torch.dtype:
    """The dtype of the saved weights."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def layer_ranges(config: SubquadConfig) -> list[tuple[str, dict[str, Any]]]:
    """The layer specs, runs of equal ones merged: `[("0-3", layer_spec), ("4", layer_spec)]`."""
    ranges: list[tuple[int, int, dict[str, Any]]] = []
    for index, layer_spec in enumerate(config.layer_specs):
        if ranges and ranges[-1][2] == layer_spec:
            ranges[-1] = ranges[-1][0], index, layer_spec
        else:
            ranges.append((index, index, layer_spec))
    return [(str(first) if first == last else f"{first}-{last}", spec) for first, last, spec in ranges]


def describe_layer(layer_spec: dict[str, Any], defaults: bool = False) -> str:
    """`gla (decay_rank=8)`: the mixer with the options in its spec, or, with `defaults`, with all of its options."""
    options = {name: value for name, value in layer_spec.items() if name != "mixer"}
    mixer = layer_spec["mixer"]
    if defaults:
        options = asdict(mixers.find_options(mixer).from_dict(options))
    listed = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{mixer} ({listed})" if listed else mixer


@torch.no_grad()
def student_cache_bytes(student: SubquadForCausalLM, context: int) -> int:
    """Bytes of the cache of `student`, a meta model, after one sequence of `context` tokens."""
    total = 0
    for layer in student.mixer_layers:
        if isinstance(layer, MixerLayer):
            x = torch.empty(1, 1, layer.spec.hidden_size, dtype=student.dtype, device="meta")
            _, states = layer.mixer(x)
            total += sum(state.numel() * state.element_size() for state in states)
        else:
            total += kv_cache_bytes(layer.spec, student.dtype, context, layer.window, layer.sinks)
    return total


def teacher_cache_bytes(config: SubquadConfig, context: int) -> int:
    """Bytes of the teacher's key/value cache after one sequence of `context` tokens, in the student's dtype."""
    specs = [config.attention_spec(index) for index in range(len(config.attention_specs))]
    return sum(kv_cache_bytes(spec, config_dtype(config), context, spec.window) for spec in specs)


def kv_cache_bytes(
    spec: mixers.AttentionSpec, dtype: torch.dtype, context: int, window: int | None, sinks: int = 0
) -> int:
    # The next token brings its own keys and values, so that a window of W tokens needs W - 1 from the cache.
    tokens = context if window is None else min(context, sinks + window - 1)
    return tokens * spec.num_kv_heads * (spec.head_dim + spec.value_dim) * dtype.itemsize


def format_bytes(size: float) -> str:
    """`2.3 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def summary(config: SubquadConfig) -> str:
    """The text that `subquad inspect` prints."""
    student = meta_model(config)
    model_type = config.base_config.model_type  # type: ignore[union-attr]
    parameters = f"{student.num_parameters():,} parameters, {str(config_dtype(config)).removeprefix('torch.')}"
    lines = [f"subquad student of a {model_type} teacher: {len(config.layer_specs)} layers, {parameters}"]
    if config.max_learned_positions is not None:
        lines.append(f"learned positions: at most {config.max_learned_positions:,} tokens")
    ranges = layer_ranges(config)
    width = max(len(label) for label, _ in ranges)
    lines += ["", "layers", *(f"  {label.ljust(width)}  {describe_layer(spec)}" for label, spec in ranges)]
    mixer_specs: list[dict[str, Any]] = []
    for _, spec in ranges:
        if spec["mixer"] not in mixers.KEPT_ATTENTION and spec not in mixer_specs:
            mixer_specs.append(spec)
    if mixer_specs:
        lines += ["", "options", *(f"  {describe_layer(spec, defaults=True)}" for spec in mixer_specs)]
    own = [student_cache_bytes(student, context) for context in CONTEXTS]
    teacher = [teacher_cache_bytes(config, context) for context in CONTEXTS]
    table = [
        ["cache of a sequence of", *(f"{context // 1024}k" for context in CONTEXTS), "tokens"],
        ["  student", *(format_bytes(size) for size in own)],
        ["  teacher", *(format_bytes(size) for size in teacher)],
        ["  ratio", *(f"{b / a:,.{0 if b > 9.5 * a else 1}f}" for a, b in zip(own, teacher, strict=True))],
    ]
    lines += ["", *("".join([label.ljust(29), *(c.rjust(10) for c in cells)]).rstrip() for label, *cells in table)]
    return "\n".join(lines)
