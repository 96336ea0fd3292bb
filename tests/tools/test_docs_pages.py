"""docs/use.md and docs/tutorial.md: every block is run, section by section, without network. Of the other pages and of
the README, every command can be parsed."""

import contextlib
import doctest
import io
import re
import shlex
import socket
from pathlib import Path

import pytest

from subquad.cli import build_parser
from tests.helpers.processes import run_python

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
USE, TUTORIAL = (dict(HEADING.findall((ROOT / "docs" / page).read_text())) for page in ("use.md", "tutorial.md"))
FIRST, *OTHERS = USE
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
EXTRAS = {"train": ["trl", "peft"], "eval": ["lm_eval"]}
"""What the extras that the page names install."""
PROGRAMS = {"python": [], "subquad": ["-m", "subquad.cli"]}


def blocks(section: str) -> list[tuple[str, str, str | None]]:
    """Language and content of each code block of a text, and the output that a block of text after it states."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
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


def run_block(content: str, name: str, namespace: dict) -> str:
    """What a Python block prints. One that hides a module needs a process in which it was not imported before."""
    if "sys.modules" in content:
        return run_python("-c", content, environment=OFFLINE)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(content, name, "exec"), namespace)
    return printed.getvalue()


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
            out = run_block(content, section[:40], namespace)
        if stated is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(stated, out, flags), out


def no_network(host, *_, **__):
    raise OSError(f"{host}: the page is run without network")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The directory after the first section, which makes the student of the others."""
    directory = tmp_path_factory.mktemp("use")
    run_section(USE[FIRST], directory)
    return directory


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.parametrize("section", OTHERS)
def test_section(section, workspace, monkeypatch):
    for extra in re.findall(r"^Extra `(\w+)`", USE[section], re.MULTILINE):
        for module in EXTRAS[extra]:
            pytest.importorskip(module, exc_type=ImportError)
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    run_section(USE[section], workspace)


@pytest.mark.slow
@pytest.mark.sample
def test_tutorial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for section in TUTORIAL.values():
        run_section(section, tmp_path)
    assert (tmp_path / "runs" / "report.html").exists()


def commands(page: Path) -> list[str]:
    """The commands of the console blocks, without comments and variables before them."""
    found = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(found).replace("\\\n", " ").splitlines()
    return [line[2:].partition(" #")[0] for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_can_be_parsed(page):
    """Their names and options exist; files that they name need not."""
    parser = build_parser()
    for command in commands(page):
        program, *argv = shlex.split(command)
        if program == "subquad":
            parser.parse_args(argv)
