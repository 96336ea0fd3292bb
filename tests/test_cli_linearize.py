"""`subquad linearize`, `select`, `inspect` and `generate`: files, output, exit codes."""

import json
import re

import pytest

import subquad
from tests.helpers.processes import run_cli as run
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("cli run"))


def test_linearize_generate_and_inspect(capsys, recipe_path, tmp_path):
    teacher = recipe_path.parent / "teacher"
    argv = ["linearize", teacher, "--mixer", "mamba2", "--option", "discretization=zoh", "--output", tmp_path / "s"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "mamba2 student" in out
    assert run(capsys, "generate", tmp_path / "s", "The", "--tokens", 3)[0] == 0
    assert run(capsys, "generate", tmp_path / "s", "", "--tokens", 3, "--temperature", 0.8)[0] == 0
    text = run(capsys, "generate", teacher, "The red", "--tokens", 12)[1]
    drafted = ["--draft", tmp_path / "s", "--draft-tokens", 3]
    assert run(capsys, "generate", teacher, "The red", "--tokens", 12, *drafted) == (0, text, "")
    assert "another vocabulary" in run(capsys, "generate", "nano", "The", "--draft", tmp_path / "s")[2]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert "not empty" in err
    code, out, err = run(capsys, "inspect", tmp_path / "s")
    assert code == 0, err
    assert "subquad student of a llama teacher: 2 layers, " in out
    assert "  0-1  mamba2 (discretization=zoh)" in out.splitlines()
    code, values, err = run(capsys, "inspect", tmp_path / "s", "--json")
    assert code == 0, err
    assert json.loads(values)["layers"] == [{"mixer": "mamba2", "discretization": "zoh"}] * 2
    assert [size["tokens"] for size in json.loads(values)["cache_bytes"]] == [1024, 8192, 65536]
    assert f"{json.loads(values)['parameters']:,} parameters, float32" in out
    assert "mamba2 (qk_activation=silu, " in out
    card = (tmp_path / "s" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# A subquadratic student of teacher\n" in card
    assert str(tmp_path) not in card
    assert str(recipe_path.parent) not in card


def cache_sizes(out):
    """The cache sizes that `subquad inspect` prints, in bytes, by the first word of their line."""
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    rows = {}
    for line in out.splitlines():
        if line.startswith(("  student", "  teacher")):
            words = line.split()[-6:]
            rows[line.split()[0]] = [float(n) * units[unit] for n, unit in zip(words[::2], words[1::2], strict=True)]
    return rows


def test_linearize_with_a_budget(capsys, recipe_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words and a number such as 12345 in one line\n" * 400)
    argv = [
        "linearize",
        recipe_path.parent / "teacher",
        "--budget",
        "8",
        "--calibrate",
        text,
        "--output",
        tmp_path / "s",
    ]
    code, found, err = run(capsys, *argv)
    assert code == 0, err
    assert re.search(r"budget 8: 4 key/value heads with windows of \d+ to \d+ tokens and 4 sinks\n", found)
    assert "at any length" in found
    card = (tmp_path / "s" / "README.md").read_text()
    assert "- budget 8: " in card
    assert "](windows.svg)" in card
    assert (tmp_path / "s" / "windows.svg").stat().st_size > 1000
    assert "window=[" in run(capsys, "inspect", tmp_path / "s")[1]
    found = run(capsys, *argv[:-1], tmp_path / "whole", "--budget-context", "2")[1]
    assert "4 keep all tokens" in found


def test_linearize_with_layer_types(capsys, recipe_path, tmp_path):
    layer_types = "{default: {mixer: gla, decay_rank: 4}, 1: {mixer: attention, window: 5, sinks: 2}}"
    argv = ["linearize", recipe_path.parent / "teacher", "--layer-types", layer_types, "--output", tmp_path / "s"]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    assert "hybrid student" in out
    written = json.loads((tmp_path / "s" / "config.json").read_text())["layer_specs"]
    assert written == [{"mixer": "gla", "decay_rank": 4}, {"mixer": "attention", "window": 5, "sinks": 2}]
    code, out, err = run(capsys, "inspect", tmp_path / "s")
    assert code == 0, err
    lines = out.splitlines()
    assert "  0  gla (decay_rank=4)" in lines
    assert any(line.startswith("  1  attention (") for line in lines)
    student, _ = subquad.load_teacher(tmp_path / "s")
    assert f" {student.num_parameters():,} parameters, float32" in lines[0]
    found = cache_sizes(out)
    # states of gla; keys and values of 2 + 5 - 1 tokens; cos and sin at the position at which sinks stay
    expected = 4 * 8 * 8 * 4 + 6 * 2 * (8 + 8) * 4 + 2 * 8 * 4
    assert found["student"] == pytest.approx([expected] * 3, rel=0.01)
    assert found["teacher"] == pytest.approx([2 * 2 * (8 + 8) * 4 * n for n in (1024, 8192, 65536)], rel=0.01)
    card = (tmp_path / "s" / "README.md").read_text()
    assert "| 0 | gla (decay_rank=4) |" in card
    assert "import subquad" in card
    namespace = {}
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(tmp_path / "s"))
    exec(code, namespace)
    assert type(namespace["model"]).__name__ == "SubquadForCausalLM"


def test_linearize_keeps_layers(capsys, recipe_path, tmp_path):
    argv = ["linearize", recipe_path.parent / "teacher", "--mixer", "gla", "--option", "decay_rank=4", "--keep", "1"]
    code, out, err = run(capsys, *argv, "--output", tmp_path / "s")
    assert code == 0, err
    assert out.startswith("hybrid student")
    written = json.loads((tmp_path / "s" / "config.json").read_text())["layer_specs"]
    assert written == [{"mixer": "gla", "decay_rank": 4}, {"mixer": "attention"}]


def test_select_prints_layer_types_that_linearize_takes(capsys, recipe_path, tmp_path):
    text = recipe_path.parent / "text.txt"
    argv = ["select", recipe_path.parent / "teacher", "--by", "kl", "--top", 1, "--window", 8, "--text", text]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    layer, head, score = out.splitlines()[1].split()
    types = out.splitlines()[-1]
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["ranking"]) == 4
    first = found["ranking"][0]
    assert (str(first["layer"]), str(first["kv_head"]), f"{first['score']:.4f}") == (layer, head, score)
    assert found["layer_types"] == json.loads(types)
    argv = ["linearize", recipe_path.parent / "teacher", "--layer-types", types, "--output", tmp_path / "s"]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    specs = json.loads((tmp_path / "s" / "config.json").read_text())["layer_specs"]
    windows = [[8, 8], [8, 8]]
    windows[int(layer)][int(head)] = "full"
    assert [spec["window"] if isinstance(spec["window"], list) else [8, 8] for spec in specs] == windows
    code, out, err = run(
        capsys, "select", recipe_path.parent / "teacher", "--by", "uniform", "--unit", "layer", "--top", 1
    )
    assert code == 0, err
    assert out.splitlines()[1].split() == ["1", "all", "1.0000"]


@pytest.mark.parametrize("others", [["--mixer", "attention", "--option", "window=8"], ["--budget", "8"]], ids=str)
def test_linearize_keeps_groups_whole(others, capsys, recipe_path, tmp_path):
    text = ["--calibrate", recipe_path.parent / "text.txt"]
    argv = ["linearize", recipe_path.parent / "teacher", *others, *text, "--keep-groups", 2, "--keep-by", "kl"]
    code, out, err = run(capsys, *argv, "--output", tmp_path / "s")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("groups that keep all tokens"))
    kept = {tuple(map(int, group.split("."))) for group in line.partition(": ")[2].split(", ")}
    assert len(kept) == 2
    specs = json.loads((tmp_path / "s" / "config.json").read_text())["layer_specs"]
    windows = [spec["window"] if isinstance(spec["window"], list) else [spec["window"]] * 2 for spec in specs]
    assert {(i, head) for i, own in enumerate(windows) for head in range(2) if own[head] == "full"} == kept
