"""What lies beside every result: versions, commit and device; and files that are written whole or not at all."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def versions() -> dict[str, Any]:
    """The head of every result: what measured it, and on what."""
    from subquad import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    packages = {
        "subquad": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"versions": packages, "commit": git_commit(), "device": device}


def git_commit() -> str | None:
    """Of the checkout that this package runs from; None where it is installed from elsewhere."""
    where = Path(__file__).resolve().parents[1]
    if not (where / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
