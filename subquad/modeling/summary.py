"""Describes a student from its configuration alone: the text of `subquad inspect`, and the model card."""

import os
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig

import subquad
from subquad import mixers
from subquad.modeling.cache import cached_numbers, head_groups
from subquad.modeling.layer_types import DEFAULT_MERGE, MEMORIES, NEAR_OPTIONS
from subquad.modeling.layers import AttentionLayer
from subquad.modeling.modeling_subquad import SubquadConfig, SubquadForCausalLM
from subquad.modeling.near_far import NearFarLayer
from subquad.modeling.teachers import NANO, SMOLLM2, read_license
from subquad.utils import UserError, as_user_error, check_directory

CONTEXTS = (1024, 8192, 65536)
"""Numbers of tokens for which cache sizes are shown."""


def read_config(directory: str | os.PathLike) -> SubquadConfig:
    """The configuration of a saved student. Raises UserError if there is none."""
    path = Path(directory).expanduser()
    if os.fspath(directory) in (NANO, SMOLLM2) and not path.exists():
        raise UserError(f"{directory!r} is a teacher; expected the directory of a saved student")
    check_directory(directory)
    if not (path / "config.json").is_file():
        raise UserError(f"{str(directory)!r} holds no config.json; expected the directory of a saved student")
    with as_user_error(f"{str(directory)!r}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, SubquadConfig):
        raise UserError(f"{str(directory)!r} is a {config.model_type} model; expected a student (model_type subquad)")
    return config


def meta_model(config: SubquadConfig) -> SubquadForCausalLM:
    """The student on the meta device, without weights."""
    with torch.device("meta"):
        student = SubquadForCausalLM(config)
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")  # `transformers` keeps a dtype or its name
    return student.to(getattr(torch, dtype)).eval()


def layer_ranges(config: SubquadConfig) -> list[tuple[str, dict[str, Any]]]:
    """The layer specs, runs of equal ones merged: `[("0-3", layer_spec), ("4", layer_spec)]`."""
    ranges = []
    for layer_spec, group in groupby(range(len(config.layer_specs)), config.layer_specs.__getitem__):
        first, *others = group
        ranges.append((f"{first}-{others[-1]}" if others else str(first), layer_spec))
    return ranges


def describe_layer(layer_spec: dict[str, Any], defaults: bool = False) -> str:
    """`gla (decay_rank=8)`: the mixer with the options in its spec, or, with `defaults`, with all of its options."""
    options = dict(layer_spec)
    mixer = options.pop("mixer")
    near = {name: options.pop(name) for name in NEAR_OPTIONS if name in options}
    if defaults and near:
        near = {"sinks": 0, "merge": DEFAULT_MERGE, "memory": MEMORIES[0], **near}
        options = mixers.memory_options(mixer, options)
    elif defaults:
        options = asdict(mixers.find_options(mixer).from_dict(options))
    options = {name: near[name] for name in NEAR_OPTIONS if name in near} | options
    listed = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{mixer} ({listed})" if listed else mixer


@torch.no_grad()
def cache_sizes(student: SubquadForCausalLM, context: int) -> tuple[int, int]:
    """Bytes of the cache of `student`, a meta model, and of its teacher's, after one sequence of `context` tokens; both
    in the student's dtype."""
    own, teacher, itemsize = 0, 0, student.dtype.itemsize
    for layer in student.mixer_layers:
        spec = layer.spec
        whole = head_groups((None,) * spec.num_kv_heads, 0, spec.window)
        teacher += cached_numbers(spec, whole, context) * itemsize
        if isinstance(layer, AttentionLayer):
            own += cached_numbers(spec, layer.head_groups, context) * itemsize
            own += layer.memory_nbytes() if isinstance(layer, NearFarLayer) else 0
        else:
            x = torch.empty(1, 1, layer.spec.hidden_size, dtype=student.dtype, device="meta")
            own += sum(state.nbytes for state in layer.mixer(x)[1])
    return own, teacher


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
    parameters = f"{student.num_parameters():,} parameters, {str(student.dtype).removeprefix('torch.')}"
    lines = [f"subquad student of a {model_type} teacher: {len(config.layer_specs)} layers, {parameters}"]
    if config.max_learned_positions is not None:
        lines.append(f"learned positions: at most {config.max_learned_positions:,} tokens")
    ranges = layer_ranges(config)
    width = max(len(label) for label, _ in ranges)
    lines += ["", "layers", *(f"  {label.ljust(width)}  {describe_layer(spec)}" for label, spec in ranges)]
    with_mixers = [spec for _, spec in ranges if spec["mixer"] not in mixers.KEPT_ATTENTION]
    if with_mixers:  # each once
        lines += ["", "options", *dict.fromkeys(f"  {describe_layer(spec, defaults=True)}" for spec in with_mixers)]
    sizes = [cache_sizes(student, context) for context in CONTEXTS]
    table = [
        ["cache of a sequence of", *(f"{context // 1024}k" for context in CONTEXTS), "tokens"],
        ["  student", *(format_bytes(own) for own, _ in sizes)],
        ["  teacher", *(format_bytes(teacher) for _, teacher in sizes)],
        ["  ratio", *(f"{teacher / own:,.{0 if teacher > 9.5 * own else 1}f}" for own, teacher in sizes)],
    ]
    lines += ["", *("".join([label.ljust(29), *(c.rjust(10) for c in cells)]).rstrip() for label, *cells in table)]
    return "\n".join(lines)


def summary_values(config: SubquadConfig) -> dict[str, Any]:
    """What `summary` says, as JSON; bytes of the cache of one sequence."""
    student = meta_model(config)
    return {
        "teacher_model_type": config.base_config.model_type,  # type: ignore[union-attr]
        "parameters": student.num_parameters(),
        "dtype": str(student.dtype).removeprefix("torch."),
        "max_learned_positions": config.max_learned_positions,
        "layers": config.layer_specs,
        "cache_bytes": [
            dict(zip(("tokens", "student", "teacher"), (n, *cache_sizes(student, n)), strict=True)) for n in CONTEXTS
        ],
    }


UNTRAINED = "all other weights are the teacher's. Nothing is trained."


def teacher_name(reference: str) -> str:
    """A hub id or a name as it is; of a directory or a file its name, without the path."""
    return Path(reference).name if Path(reference).expanduser().exists() else reference


def model_card(config: SubquadConfig, teacher: str, notes: str = "", trained: bool = False) -> str:
    """Markdown with the metadata of a hub's model card.

    teacher: what the student was made from, as `load_teacher` takes it. notes: more Markdown.
    """
    student, positions = meta_model(config), config.max_learned_positions
    sizes = [(f"{n:,}", *map(format_bytes, cache_sizes(student, n))) for n in CONTEXTS]
    stated = read_license(teacher) or {"license": getattr(config.base_config, "license", None)}
    stated = {key: value for key, value in stated.items() if value}
    name = stated.get("license_name") or stated.get("license")
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return template.format(
        teacher=teacher_name(teacher),
        metadata=yaml.safe_dump(stated) if stated else "",
        license=f" ({name})" if name else "",
        origin="the other weights start from the teacher's." if trained else UNTRAINED,
        parameters=student.num_parameters(),
        model_type=config.base_config.model_type,  # type: ignore[union-attr]
        notes=notes,
        limit=f"\nIt has {positions:,} learned positions and cannot read longer sequences.\n" if positions else "",
        layers="\n".join(f"| {label} | {describe_layer(spec)} |" for label, spec in layer_ranges(config)),
        caches="\n".join(f"| {' | '.join(cells)} |" for cells in sizes),
        **{package.__name__: package.__version__ for package in (subquad, transformers, torch)},
    )
