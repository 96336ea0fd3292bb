"""A package outside the repository, built from the text of CONTRIBUTING.md about other packages, and its commands."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from subquad.registry import Registry
from subquad.utils import UserError
from tests.helpers.processes import run_python

ROOT = Path(__file__).parents[1]
LOAD = """
import sys
from transformers import AutoModelForCausalLM
import subquad
student = AutoModelForCausalLM.from_pretrained("study/fixed_decay")
print(type(student.mixer_layers[0].mixer).__module__, student.mixer_layers[0].mixer.options.half_life)
print(AutoModelForCausalLM.from_pretrained("served").dtype)
"""


def install(package: Path, project: dict) -> None:
    """What pip writes for the entry points of a package."""
    info = package / f"my_subquad-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The files of the section, installed in `site`, and the recipe."""
    directory = tmp_path_factory.mktemp("plugins")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Extend Subquad from another package\n")[2].partition("\n## ")[0]
    for name, content in re.findall(r"```(?:toml|python|yaml)\n# (\S+)\n(.*?)```", section, re.DOTALL):
        path = directory / name if name == "extended.yaml" else directory / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    install(directory / "site", tomllib.loads((directory / "site" / "pyproject.toml").read_text())["project"])
    commands = [shlex.split(line) for line in re.findall(r"^\$ subquad (.*)$", section, re.MULTILINE)]
    return directory, commands


def run(directory: Path, *argv: str, code: int = 0) -> str:
    """The output of a new Python process that sees the package."""
    environment = {"PYTHONPATH": f"{directory / 'site'}:{ROOT}"}
    return run_python(*argv, code=code, environment=environment, cwd=directory)


@pytest.mark.slow
@pytest.mark.sample
def test_a_package_from_the_text_of_contributing(workspace):
    directory, commands = workspace
    out = {argv[0]: run(directory, "-m", "subquad.cli", *argv) for argv in commands}
    assert "fixed_decay\n  A learned decay per state" in out["mixers"]
    assert "fixed_decay (half_life=32" in out["inspect"]
    assert run(directory, "-c", LOAD).splitlines() == ["my_subquad.fixed_decay 32", "torch.bfloat16"]
    metrics = (directory / "study" / "fixed_decay" / "metrics.jsonl").read_text().splitlines()
    assert list(dict.fromkeys(json.loads(line)["stage"] for line in metrics)) == ["hidden", "logits"]
    results = json.loads((directory / "study" / "evaluation" / "results.json").read_text())["results"]
    entropies = {result["model"]: result["value"] for result in results if result["metric"] == "entropy"}
    windows = {name for name in entropies if name.startswith("nano, window ")}  # one of equal bytes for each student
    assert set(entropies) - windows == {"fixed_decay", "gated_deltanet", "nano"}
    assert len(windows) == 2
    assert all(0 < value < 20 for value in entropies.values())
    page = next((directory / "study").glob("**/*.html")).read_text()
    assert "fixed decay" in page
    assert "stage logits" in page
    assert "entropy" in page


MISTAKES = {
    "student.mixer=fixed_deca": "unknown mixer 'fixed_deca'; did you mean 'fixed_decay'?",
    "student={mixer: fixed_decay, mixer_kwargs: {half_live: 3}}": "unknown mixer option 'half_live'",
    "student={mixer: gla, export_target: qwen3_5_bf16}": "gla cannot be exported to Qwen3.5 in bfloat16",
    "stages.logits.exponent=0": "stages.logits.exponent: got 0, expected a number greater than 0",
    "stages.logits.exponnent=1": "unknown key 'stages.logits.exponnent'; did you mean 'stages.logits.exponent'?",
    "stages.logit.lr=1": "unknown key 'stages.logit'; did you mean 'stages.logits'?",
    "stages.logits={lr: 1}": "stages.logits.tokens is missing; expected: Training tokens",
}
CHECK = """
import sys
from subquad.config import load_study, schema
from subquad.distill.recipe_stages import recipe_stages, stage_keys
from subquad.utils import UserError
for override in sys.argv[1:]:
    try:
        load_study("extended.yaml", [override])
    except UserError as error:
        print(*error.problems, sep=" | ")
more = "stages.end_to_end={tokens: 128, lr: 1}"
all_three, without = [load_study("extended.yaml", [more, *others])[0] for others in ([], ["stages.logits=null"])]
print(list(recipe_stages(all_three)), list(recipe_stages(without)))
print(all_three == type(all_three).model_validate(all_three.model_dump(mode="json")))
shared = [stage_keys(recipe)["hidden"] for recipe in (all_three, without)]
print(shared[0] == shared[1], "logits" in without.to_yaml(), "exponent: 1.5" in all_three.to_yaml())
print("exponent" in schema()["$defs"]["Stages"]["properties"]["logits"]["anyOf"][0]["properties"])
"""


def test_recipes_of_other_packages_are_checked(workspace):
    directory, _ = workspace
    *errors, order, same, keys, described = run(directory, "-c", CHECK, *MISTAKES).splitlines()
    assert len(errors) == len(MISTAKES)
    for line, message in zip(errors, MISTAKES.values(), strict=True):
        assert message in line
    assert order == "['hidden', 'logits', 'end_to_end'] ['hidden', 'end_to_end']"
    assert (same, keys, described) == ("True", "True False True", "True")


def test_entry_points_that_fail(tmp_path):
    """A module that cannot be imported, and one that registers nothing."""
    points = {"broken": "my_subquad.broken", "empty": "my_subquad.empty", "gla": "my_subquad.broken"}
    install(tmp_path / "site", {"name": "my-subquad", "version": "1", "entry-points": {"subquad.mixers": points}})
    (tmp_path / "site" / "my_subquad").mkdir()
    (tmp_path / "site" / "my_subquad" / "empty.py").write_text("")
    for name, message in {"broken": "cannot be imported: ModuleNotFound", "empty": "does not register it"}.items():
        argv = ["-m", "subquad.cli", "linearize", "nano", "--mixer", name, "-o", "never"]
        assert f"mixer {name!r}: my_subquad.{name} {message}" in run(tmp_path, *argv, code=2)
    program = "import sys; from subquad import mixers; mixers.find_options('gla'); print('my_subquad' in sys.modules)"
    assert run(tmp_path, "-c", program) == "False\n"


def test_a_name_is_taken_once():
    registry = Registry("mixer", "subquad.none", {"gla": "subquad.mixers.gla:GLA"})
    one, again, other = (type("New", (), {"__module__": module}) for module in ("a", "a", "b"))
    registry.register("new", one)
    registry.register("new", again)
    assert registry["new"] is again
    for name in ("new", "gla"):
        with pytest.raises(UserError, match=f"mixer '{name}' exists; expected another name"):
            registry.register(name, other)
