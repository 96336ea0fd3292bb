"""docs/use.md: every block of the page is run, section by section, in one directory, without network."""

import contextlib
import doctest
import io
import re
import shlex
import socket
from pathlib import Path

import pytest

from tests.helpers.processes import run_python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "use.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
FIRST, *OTHERS = SECTIONS
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
EXTRAS = {"train": ["trl", "peft"], "eval": ["lm_eval"]}
"""What the extras that the page names install."""
PROGRAMS = {"python": [], "subquad": ["-m", "subquad.cli"]}

pytestmark = [pytest.mark.slow, pytest.mark.sample]


def blocks(section: str) -> list[tuple[str, str, str | None]]:
    """Language and content of each code block, and the output that a block of text after it states."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)
    following = [*found, ("", "")][1:]
    return [
        (language, content, next_content if next_language == "text" else None)
        for (language, content), (next_language, next_content) in zip(found, following, strict=True)
        if language != "text"
    ]


def run_commands(content: str, directory: Path, code: int) -> str:
    lines = content.replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines)
    out = []
    for program, *argv in map(shlex.split, (line[2:] for line in lines)):
        out.append(run_python(*PROGRAMS[program], *argv, code=code, environment=OFFLINE, cwd=directory))
    return "".join(out)


def run_section(section: str, directory: Path) -> None:
    """Writes the files of a section and runs its programs, which share their names, and its commands."""
    namespace: dict = {}
    for language, content, stated in blocks(section):
        if language in ("yaml", "json"):
            name, _, text = content.partition("\n")
            path = directory / name.removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            continue
        if language == "console":
            out = run_commands(content, directory, code=int(stated is not None and "Error: " in stated))
        else:
            assert language == "python"
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(content, f"docs/use.md, {section}", "exec"), namespace)
            out = printed.getvalue()
        if stated is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(stated, out, flags), out


def no_network(host, *_, **__):
    raise OSError(f"{host}: the page is run without network")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The directory after the first section, which makes the student of the others."""
    directory = tmp_path_factory.mktemp("use")
    run_section(FIRST, directory)
    return directory


@pytest.mark.parametrize("section", OTHERS)
def test_section(section, workspace, monkeypatch):
    for extra in re.findall(r"^Extra `(\w+)`", SECTIONS[section], re.MULTILINE):
        for module in EXTRAS[extra]:
            pytest.importorskip(module, exc_type=ImportError)
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    run_section(section, workspace)
