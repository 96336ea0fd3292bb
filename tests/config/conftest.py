from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes `recipe.yaml` into the working directory, so that messages have a short path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "recipe.yaml"

    return write
