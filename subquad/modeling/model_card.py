"""The model card of a student: the README.md in its directory."""

import os
from pathlib import Path

import torch
import transformers

import subquad
from subquad.modeling.modeling_subquad import SubquadConfig
from subquad.modeling.summary import (
    CONTEXTS,
    describe_layer,
    format_bytes,
    layer_ranges,
    meta_model,
    student_cache_bytes,
    teacher_cache_bytes,
)


def model_card(config: SubquadConfig, teacher: str) -> str:
    """Markdown with the metadata of a hub's model card, for an untrained student.

    teacher: what the student was made from: a hub id, or the name of a directory or a file.
    """
    student = meta_model(config)
    layers = "\n".join(f"| {label} | {describe_layer(spec)} |" for label, spec in layer_ranges(config))
    caches = "\n".join(
        f"| {context:,} | {format_bytes(student_cache_bytes(student, context))} "
        f"| {format_bytes(teacher_cache_bytes(config, context))} |"
        for context in CONTEXTS
    )
    model_type = config.base_config.model_type  # type: ignore[union-attr]
    limit = ""
    if config.max_learned_positions is not None:
        limit = f"\nIt has {config.max_learned_positions:,} learned positions and cannot read longer sequences.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- subquad
- linear-attention
---

# A subquadratic student of {teacher}

A causal language model of {student.num_parameters():,} parameters, made by Subquad from {teacher} ({model_type}).
Attention is replaced layer by layer as below; all other weights are the teacher's. Untrained: the mixers are at their
initialization.
{limit}
| layer | token mixer |
|---|---|
{layers}

Cache of one sequence:

| tokens | student | teacher |
|---|---|---|
{caches}

## Use

```python
import subquad  # registers the architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```

`import subquad` is required; no remote code is loaded.

Made with subquad {subquad.__version__}, transformers {transformers.__version__}, torch {torch.__version__}.
The teacher's license applies to the weights copied from it.
"""


def write_model_card(directory: str | os.PathLike, config: SubquadConfig, teacher: str) -> None:
    (Path(directory) / "README.md").write_text(model_card(config, teacher), encoding="utf-8")
