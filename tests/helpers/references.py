"""Reference implementations by other projects."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest


def fla_reference(family, function):
    """A function of `fla/ops/<family>/naive.py`, loaded by its path, since `import fla` needs Triton."""
    pytest.importorskip("einops", reason="fla's references need einops")
    try:
        files = importlib.metadata.files("fla-core") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fla-core is not installed: pip install fla-core==0.6.0")
    file = next(f for f in files if Path(f).as_posix() == f"fla/ops/{family}/naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{family}", file.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)
