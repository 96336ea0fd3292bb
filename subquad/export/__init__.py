"""Takes a student out of Subquad: to a model that runs where Subquad is not installed.

    export("student", "served", "qwen3_5")          a directory for transformers, vLLM, SGLang
    export("student", "student.gguf", "gguf")       a file for llama.cpp
    export("student", "served", "bamba")            a directory, of a mamba2 student

Nothing is written before the new model has given the student's logits; what cannot go is refused with the reason.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from subquad.export.bamba import to_bamba
from subquad.export.gguf import TYPES, write_gguf
from subquad.export.qwen3_5 import to_qwen3_5
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.summary import config_dtype, read_config
from subquad.modeling.teachers import load_teacher
from subquad.utils import UserError, nearest

__all__ = ["FORMATS", "TYPES", "export", "to_bamba", "to_qwen3_5", "write_gguf"]

FORMATS = ("qwen3_5", "gguf", "bamba")


def export(directory: str | os.PathLike, output: str | os.PathLike, format: str, type: str | None = None) -> str:
    """Writes the student that is saved in `directory` to `output`, which must not be there yet; returns a line that
    says what was written.

    Args:
        output: a file for "gguf", a directory for the others.
        format: one of `FORMATS`.
        type: of the numbers in a GGUF file, one of `TYPES`; by default "f16".

    Raises:
        UserError: no student there, something at `output`, an unknown format or type, or a student that cannot go.
    """
    if format not in FORMATS:
        raise UserError(f"format: unknown {format!r}{nearest(format, FORMATS)}")
    if type is not None and format != "gguf":
        raise UserError(f"type: got {type!r}, but a {format} model keeps the student's own; expected it with gguf only")
    if type is not None and type not in TYPES:
        raise UserError(f"type: unknown {type!r}{nearest(type, TYPES)}")
    output = Path(output)
    if output.exists():
        raise UserError(f"output {str(output)!r} exists; expected a new {'file' if format == 'gguf' else 'directory'}")
    student, tokenizer = load_teacher(directory, config_dtype(read_config(Path(directory))))
    assert isinstance(student, SubquadForCausalLM)
    model = to_bamba(student) if format == "bamba" else to_qwen3_5(student)
    with published(output) as part:
        if format == "gguf":
            write_gguf(model, tokenizer, part, type or "f16", name=Path(directory).resolve().name)
        else:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return f"{model.num_parameters():,} parameters as {format} in {output}"


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """A place beside `output` to write to; what stands there in the end is moved to `output`, whole, and after an error
    nothing is left."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"output {str(output)!r}: there is no directory {str(output.parent)!r}")
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        yield work / output.name
        (work / output.name).rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
