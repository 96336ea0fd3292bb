"""The core works where every optional package is missing, and what needs one says which extra to install."""

import json
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.processes import run_python
from tests.helpers.recipes import tiny_recipe

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
WITHOUT = """
import contextlib, io, json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from subquad.cli import main
"""
RUN = WITHOUT + "sys.exit(main(sys.argv[2:]))"
RUN_ALL = (
    WITHOUT
    + """
outcomes = []
for argv in json.loads(sys.argv[2]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        outcomes.append((main(argv), errors.getvalue()))
print(json.dumps(outcomes))
"""
)


def missing_modules() -> list[str]:
    """The importable names of all packages of extras that neither the core nor the tests need."""
    extras = PROJECT["optional-dependencies"]
    names = {canonicalize_name(Requirement(r).name) for extra in extras if extra != "dev" for r in extras[extra]}
    names -= {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]} | {"pandas"}  # of datasets
    modules = {m for m, owners in packages_distributions().items() if names & {canonicalize_name(o) for o in owners}}
    return sorted(modules | {"fla", "triton", "ray"})


def run(*argv: object, code: int = 0) -> str:
    return run_python("-c", RUN, ",".join(missing_modules()), *argv, code=code)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("core")
    return tiny_recipe(directory).parent


def test_the_list_of_missing_modules_has_every_extra():
    assert {"matplotlib", "jinja2", "scipy", "gguf", "lm_eval", "torchao", "peft"} <= set(missing_modules())
    assert not {"torch", "transformers", "numpy", "subquad"} & set(missing_modules())


def test_linearize_distill_and_generate_need_no_extra(inputs):
    run("linearize", inputs / "teacher", "--mixer", "gla", "-o", inputs / "linear")
    out = run("distill", inputs / "recipe.yaml", "-o", inputs / "student")
    assert out.count('loss.svg is not drawn: matplotlib is missing; pip install ".[report]" in a clone of Subquad') == 1
    assert not (inputs / "student" / "loss.svg").exists()
    run("generate", inputs / "student", "The red", "--tokens", "3")


def test_what_needs_an_extra_names_it(inputs, tmp_path):
    student, figures = inputs / "linear", tmp_path / "figures"
    if not student.exists():
        run("linearize", inputs / "teacher", "--mixer", "gla", "-o", student)
    lora = yaml.safe_load((inputs / "recipe.yaml").read_text())
    lora["stages"]["end_to_end"]["lora"] = {"rank": 2}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(lora))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    cases = (
        ("report", ["report", tmp_path]),
        ("report", ["eval", student, "--figures", "-o", figures]),
        ("export", ["export", student, "--format", "gguf", "-o", tmp_path / "student.gguf"]),
        ("export", ["linearize", tmp_path / "model.gguf", "--mixer", "gla", "-o", tmp_path / "linear"]),
        ("eval", ["eval", student, "--suite", "zero-shot", "--tasks", "piqa"]),
        ("lora", ["distill", tmp_path / "lora.yaml", "-o", tmp_path / "lora"]),
        ("cluster", ["study", inputs / "recipe.yaml", "--engine", "ray", "-o", tmp_path / "study"]),
    )
    commands = json.dumps([[str(word) for word in argv] for _, argv in cases])
    outcomes = json.loads(run_python("-c", RUN_ALL, ",".join(missing_modules()), commands).splitlines()[-1])
    for (extra, argv), (code, message) in zip(cases, outcomes, strict=True):
        assert (code, f'pip install ".[{extra}]"' in message) == (2, True), (argv, message)
        assert "Traceback" not in message
