"""The model card of a student: README.md beside its weights."""

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


def model_card(
    config: SubquadConfig, teacher: str, training: str = "It is not taught yet: its mixers stand at their start."
) -> str:
    """Markdown with the front matter of the hub.

    teacher: what the student was made from: a hub id, or the name of a directory or a file.
    taught: how it was trained, in a sentence.
    """
    student = meta_model(config)
    plan = "\n".join(f"| {label} | {describe_layer(entry)} |" for label, entry in layer_ranges(config))
    states = "\n".join(
        f"| {context:,} | {format_bytes(own)} | {format_bytes(theirs)} |"
        for context in CONTEXTS
        for own, theirs in [(student_cache_bytes(student, context), teacher_cache_bytes(config, context))]
    )
    base = config.base_config.model_type  # type: ignore[union-attr]
    limit = (
        ""
        if config.max_learned_positions is None
        else f"\nIt has {config.max_learned_positions:,} learned positions, and ends there.\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- subquad
- linear-attention
---

# A subquadratic student of {teacher}

A causal language model of {student.num_parameters():,} parameters, made by Subquad from {teacher} ({base}).
Attention is replaced layer by layer as below; everything else is the teacher's. {training}
{limit}
| layer | token mixer |
|---|---|
{plan}

Held for one sequence while it writes:

| tokens of context | student | teacher's keys and values |
|---|---|---|
{states}

## Use

```python
import subquad  # registers the architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```

No remote code is loaded: `import subquad` is needed first.

Made with subquad {subquad.__version__}, transformers {transformers.__version__}, torch {torch.__version__}.
The teacher's licence holds for what was copied from it.
"""


def write_model_card(directory: str | os.PathLike, config: SubquadConfig, teacher: str) -> None:
    (Path(directory) / "README.md").write_text(model_card(config, teacher), encoding="utf-8")
