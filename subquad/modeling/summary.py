"""What a student is, told from its configuration alone: layers, options, parameters, and what it holds a sequence."""

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


def read_config(directory: str | Path) -> SubquadConfig:
    """The configuration of a saved student; UserError where there is none."""
    path = Path(directory).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(f"{str(directory)!r} holds no config.json; expected the directory of a saved student")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise UserError(f"{str(directory)!r}: its config.json cannot be read: {error}") from error
    if not isinstance(config, SubquadConfig):
        raise UserError(f"{str(directory)!r} is a {config.model_type} model; expected a student (model_type subquad)")
    return config


def meta_model(config: SubquadConfig) -> SubquadForCausalLM:
    """The student without its weights (on the meta device)."""
    with torch.device("meta"):
        student = SubquadForCausalLM(config)
    return student.to(config_dtype(config)).eval()  # type: ignore[arg-type]


def config_dtype(config: SubquadConfig) -> torch.dtype:
    chosen = config.dtype or torch.float32
    return getattr(torch, chosen) if isinstance(chosen, str) else chosen


def layer_ranges(config: SubquadConfig) -> list[tuple[str, dict[str, Any]]]:
    """The plan with neighbours that are alike as one: `[("0-3", entry), ("4", entry)]`."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for index, entry in enumerate(config.layer_specs):
        if runs and runs[-1][2] == entry:
            runs[-1] = runs[-1][0], index, entry
        else:
            runs.append((index, index, entry))
    return [(str(first) if first == last else f"{first}-{last}", entry) for first, last, entry in runs]


def describe_layer(entry: dict[str, Any], defaults: bool = False) -> str:
    """`gla (decay_rank=8)`: a mixer with the options that were given, or, with `defaults`, with all that it has."""
    options = {name: value for name, value in entry.items() if name != "mixer"}
    if defaults and entry["mixer"] in mixers.OPTIONS:
        options = asdict(mixers.OPTIONS[entry["mixer"]].from_dict(options))
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{entry['mixer']} ({told})" if told else entry["mixer"]


@torch.no_grad()
def student_cache_bytes(student: SubquadForCausalLM, context: int) -> int:
    """Bytes that a student (see `outline`) holds for one sequence of `context` tokens, from shapes alone."""
    total = 0
    for block in student.mixer_layers:
        if isinstance(block, MixerLayer):
            x = torch.empty(1, 1, block.spec.hidden_size, dtype=student.dtype, device="meta")
            _, states = block.mixer(x)
            total += sum(state.numel() * state.element_size() for state in states)
        else:
            total += kv_cache_bytes(block.spec, student.dtype, context, block.window, block.sinks)
    return total


def teacher_cache_bytes(config: SubquadConfig, context: int) -> int:
    """Bytes of the teacher's key/value cache for one sequence of `context` tokens, in the student's dtype."""
    layouts = [
        mixers.AttentionSpec(**{k: v for k, v in place.items() if k != "path"}) for place in config.attention_specs
    ]
    return sum(kv_cache_bytes(layout, config_dtype(config), context, layout.window) for layout in layouts)


def kv_cache_bytes(
    layout: mixers.AttentionSpec, dtype: torch.dtype, context: int, window: int | None, sinks: int = 0
) -> int:
    # the next token brings its own keys, so that a window of W holds W - 1
    tokens = context if window is None else min(context, sinks + window - 1)
    return tokens * layout.num_kv_heads * (layout.head_dim + layout.value_dim) * dtype.itemsize


def format_bytes(size: float) -> str:
    """`2.3 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def summary(config: SubquadConfig) -> str:
    """The student on a page."""
    student = meta_model(config)
    name = config.base_config.model_type  # type: ignore[union-attr]
    parameters = f"{student.num_parameters():,} parameters, {str(config_dtype(config)).removeprefix('torch.')}"
    lines = [f"subquad student of a {name} teacher: {len(config.layer_specs)} layers, {parameters}"]
    if config.max_learned_positions is not None:
        lines.append(f"learned positions: at most {config.max_learned_positions:,} tokens")
    runs = layer_ranges(config)
    width = max(len(label) for label, _ in runs)
    lines += ["", "layers", *(f"  {label.ljust(width)}  {describe_layer(entry)}" for label, entry in runs)]
    entries: list[dict[str, Any]] = []
    for _, entry in runs:
        if entry["mixer"] in mixers.REGISTRY and entry not in entries:
            entries.append(entry)
    if entries:
        lines += ["", "options", *(f"  {describe_layer(entry, defaults=True)}" for entry in entries)]
    own = [student_cache_bytes(student, context) for context in CONTEXTS]
    theirs = [teacher_cache_bytes(config, context) for context in CONTEXTS]
    rows = [
        ["held for a sequence of", *(f"{context // 1024}k" for context in CONTEXTS), "tokens"],
        ["  student", *(format_bytes(size) for size in own)],
        ["  teacher's keys and values", *(format_bytes(size) for size in theirs)],
        ["  times smaller", *(f"{b / a:,.{0 if b > 9.5 * a else 1}f}" for a, b in zip(own, theirs, strict=True))],
    ]
    lines += ["", *("".join([row[0].ljust(29), *(cell.rjust(10) for cell in row[1:])]).rstrip() for row in rows)]
    return "\n".join(lines)
