"""Exports a student to a model that runs without Subquad.

    export("student", "served", "qwen3_5")          a directory for transformers, vLLM, SGLang
    export("student", "student.gguf", "gguf")       a file for llama.cpp
    export("student", "served", "mlx")              a directory for mlx-lm
    export("student", "served", "granite_hybrid")   a directory, from a mamba2 student
    export("student", "served", "kimi_linear")      a directory, from a kda student
    export("student", "served", "ministral")        a directory, from a student of attention with windows
    export("student", "served", "onnx")             a directory for onnxruntime, also in a browser

Files are written only after the new model's logits have been compared with the student's.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from subquad.mixers.options import ATTENTION
from subquad.modeling.export_target import GRANITE_HYBRID, KIMI_LINEAR, QWEN3_5
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.summary import read_config
from subquad.modeling.teachers import load_teacher
from subquad.registry import EXPORT_TARGETS
from subquad.utils import UserError, nearest, needs_extra, saving

if TYPE_CHECKING:
    from subquad.export.converter import Converter

__all__ = ["convert", "export"]

FORMATS = ("gguf", "mlx", "onnx")
"""Formats besides those of `subquad.registry.EXPORT_TARGETS`."""


def convert(student: SubquadForCausalLM, target: str) -> PreTrainedModel:
    """The student as a model of the architecture `target`, such as "qwen3_5"; see `Converter.convert`."""
    return EXPORT_TARGETS.find(target)().convert(student)


def converter_of(file_format: str, student: SubquadForCausalLM) -> "Converter":
    """The converter to the model that is written in `file_format`."""
    mixers = {spec["mixer"] for spec in student.config.layer_specs}
    if file_format == "gguf" and GRANITE_HYBRID.mixer in mixers:
        from subquad.export.granite_hybrid import LlamaCppConverter

        return LlamaCppConverter()
    if file_format in FORMATS and KIMI_LINEAR.mixer in mixers:
        from subquad.export import kimi_linear

        return kimi_linear.LlamaCppConverter() if file_format == "gguf" else kimi_linear.KimiLinearConverter()
    if file_format == "mlx" and mixers == {ATTENTION}:
        from subquad.export.ministral import MLXConverter

        return MLXConverter()
    return EXPORT_TARGETS.find(QWEN3_5.key if file_format in FORMATS else file_format)()


def export(
    directory: str | os.PathLike, output: str | os.PathLike, file_format: str, weight_type: str | None = None
) -> str:
    """Exports the student saved in `directory` to `output`; returns a line that says what was written.

    Args:
        output: a new file for "gguf", a new directory for the other formats.
        file_format: "gguf", "mlx", "onnx", or one of `subquad.registry.EXPORT_TARGETS`.
        weight_type: of the weights in a GGUF file, one of `subquad.export.gguf.TYPES`; "f16" by default.

    Raises:
        UserError: no student in `directory`, an existing `output`, an unknown format or weight type.
        ExportError: a student with something that the format does not have.
    """
    if file_format not in (*FORMATS, *EXPORT_TARGETS):
        raise UserError(f"format: unknown {file_format!r}{nearest(file_format, [*EXPORT_TARGETS, *FORMATS])}")
    if weight_type is not None and file_format != "gguf":
        raise UserError(f"type: got {weight_type!r}, expected none for {file_format}, which keeps the student's dtype")
    if file_format == "gguf":
        with needs_extra("format gguf", "export"):
            from subquad.export.gguf import TYPES, write_gguf
        if weight_type is not None and weight_type not in TYPES:
            raise UserError(f"type: unknown {weight_type!r}{nearest(weight_type, TYPES)}")
    output = Path(output)
    if output.exists():
        raise UserError(
            f"output {str(output)!r} exists; expected a new {'file' if file_format == 'gguf' else 'directory'}"
        )
    if not output.absolute().parent.is_dir():
        raise UserError(f"output {str(output)!r}: there is no directory {str(output.parent)!r}")
    read_config(directory)  # refuses a directory without a student
    student, tokenizer = load_teacher(directory, "auto")
    assert isinstance(student, SubquadForCausalLM)
    converter = None if file_format == "onnx" else converter_of(file_format, student)
    model = student if converter is None else converter.convert(student)
    parent = output.absolute().parent
    with saving(output, "the export", remove=False), tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as work:
        partial = Path(work, output.name)
        if file_format == "gguf":
            write_gguf(model, tokenizer, partial, weight_type or "f16", name=Path(directory).resolve().name)
        elif file_format == "mlx" and converter is not None and converter.target is QWEN3_5:
            from subquad.export.mlx import write_mlx

            write_mlx(model, tokenizer, partial)
        elif converter is None:
            with needs_extra("format onnx", "onnx"):
                from subquad.export.onnx import write_onnx

                write_onnx(student, tokenizer, partial)
        else:
            converter.save(model, partial)
            tokenizer.save_pretrained(partial)
        partial.rename(output)
    return f"{model.num_parameters():,} parameters as {file_format} in {output}"
