"""The command line: output, files, exit codes, and one line on stderr for each mistake of the user."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from subquad import mixers
from subquad.cli import build_parser, main
from subquad.distill.target_cache import TargetCache
from tests.helpers.processes import run_cli as run
from tests.helpers.processes import run_python
from tests.helpers.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("cli run"))


def test_help_lists_commands(capsys):
    code, text, _ = run(capsys)
    assert code == 0
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == text
    assert all(command in text for command in ("distill", "study", "linearize", "mixers", "inspect", "generate"))


def test_help_names_each_default():
    commands = build_parser().commands.choices
    for name, action in ((name, action) for name, command in commands.items() for action in command._actions):
        if action.default in (None, False, [], "", "==SUPPRESS=="):
            continue
        shown = ",".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        assert action.help.endswith(f"(default: {shown})"), (name, action.option_strings)
        assert action.help.count("default") == 1
    assert "(default: 64)" in " ".join(commands["generate"].format_help().split())


def test_mixers_lists_names_and_options(capsys):
    code, out, _ = run(capsys, "mixers")
    out, beside_attention = out.split("\n\n")
    assert "merge=mass|denominator|lolcats|fixed|add, memory=outside|all" in beside_attention
    assert code == 0
    assert [line for line in out.splitlines() if not line.startswith(" ")] == mixers.names()
    assert "half_life=" in out
    listed = json.loads(run(capsys, "mixers", "--json")[1])
    assert [mixer["name"] for mixer in listed] == mixers.names()
    assert "half_life" in next(mixer["options"] for mixer in listed if mixer["name"] == "gla")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("gen", ["generate"]),
        ("generate nano text --dr", ["--draft", "--draft-tokens"]),
        ("select nano --by ", ["retrieval", "kl", "halo", "uniform"]),
        ("select nano --by k", ["kl"]),
        ("linearize nano --mixer gated", ["gated_deltanet"]),
        ("export student --format mi", ["ministral"]),
        ("distill rec", []),
    ],
)
def test_completion(typed, expected, capsys):
    if (bash := shutil.which("bash")) is None:
        pytest.skip("without bash")
    script = run(capsys, "completion")[1]
    words = " ".join(f"'{word}'" for word in ["subquad", *typed.split(" ")])
    script += f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _subquad; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_a_misspelt_option_is_named_rather_than_called_missing(capsys):
    code, _, err = run(capsys, "distill", "recipe.yaml", "--outputt", "student")
    assert code == 2
    assert "unknown option --outputt; did you mean '--output'?" in err


def test_completion_in_zsh(capsys, tmp_path):
    if (zsh := shutil.which("zsh")) is None:
        pytest.skip("without zsh")
    script = f"autoload -U compinit; compinit -u -d {tmp_path}/dump\n" + run(capsys, "completion")[1]
    script += "\nprint -r -- ${_comps[subquad]}; whence -w _subquad"
    done = subprocess.run([zsh, "-fc", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["_bash_complete -o default -F _subquad", "_subquad: function"]


def test_study_saves_students_and_prints_their_table(capsys, recipe_path, tmp_path):
    tiny = ["--set", "stages.matrix=null", "--set", "stages.hidden.tokens=128", "--set", "stages.end_to_end=null"]
    argv = ["study", recipe_path, "--output", tmp_path / "s", "--set", "student.mixer=[retnet, xlstm]", *tiny]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert [result["mixer"] for result in results["results"]] == ["retnet", "xlstm"]
    columns = (
        "mixer parameters tokens perplexity teacher_perplexity unigram_perplexity kl_at_init kl top1_agreement "
        "recovered_share seconds decode_tokens_per_second state_bytes"
    )
    assert set(columns.split()) <= results["results"][0].keys()
    assert {"versions", "device", "recipes"} <= results.keys()
    assert "recovered" in out
    for mixer in ("retnet", "xlstm"):
        assert f"{mixer} " in out
        code, text, _ = run(capsys, "generate", tmp_path / "s" / mixer, "The red", "--tokens", 4)
        assert code == 0
        assert text.startswith("The red")
    code, again, _ = run(capsys, *argv)
    assert code == 0
    assert again.splitlines()[-5:] == out.splitlines()[-5:]


def test_targets_of_a_teacher_are_computed_once(capsys, recipe_path, tmp_path, monkeypatch):
    """By `cache-teacher`, for all runs of a study; then `distill` and another `cache-teacher` find them."""
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    sets = ["stages.matrix=null", "stages.hidden=null", "stages.end_to_end.teacher_targets=top_k"]
    sets += ["stages.end_to_end.target_size=8", "evaluation={eval_tokens: 64, eval_steps: 6}"]
    given = [recipe_path, *(text for value in sets for text in ("--set", value))]
    code, out, err = run(capsys, "cache-teacher", *given, "--set", "student.mixer=[gla, retnet]")
    assert code == 0, err
    pattern = r"gla: 26 rows, 806 tokens, [\d,]+ bytes, [\d.]+ bytes per token, [\d.]+% of the probability left out, "
    assert re.match(pattern, out.splitlines()[0])
    assert out.splitlines()[1].startswith("retnet: 26 rows")
    monkeypatch.setattr(TargetCache, "compute", None)
    assert run(capsys, "cache-teacher", *given)[0] == 0
    assert run(capsys, "distill", *given, "--output", tmp_path / "s")[0] == 0
    records = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["stage"] == "end_to_end" for record in records)
    assert any("validation_loss" in record for record in records)


MISTAKES = {
    "cache-teacher RECIPE": "stages.end_to_end.teacher_targets: got none or full, expected sampled or top_k",
    "linearize TEACHER --mixer gla --keep-groups 1": "--keep-groups: got the layer types gla (default), expected",
    "linearize TEACHER --keep-groups 0": "argument --keep-groups: got '0', expected a whole number",
    "distill RECIPE --set student.keep_groups=1": "student.keep_groups: got the layer types gla (default), expected",
    "select TEACHER --by retreival": "argument --by: got 'retreival'; did you mean 'retrieval'?",
    "select TEACHER --by uniform --top 4": "by: got 'uniform' for groups, expected it for layers",
    "select TEACHER --top 5 --by kl": "keep: got 5, expected a number from 1 to 4, the number of groups",
    "select TEACHER --text missing.txt": "--text 'missing.txt': no such file",
    "select TEACHER --text SHORT": "short.txt': got at most 6 tokens, expected at least 512",
    "select TEACHER --device gpu": "device: got 'gpu', expected auto, cpu, cuda or cuda:N",
    "linearize TEACHER --calibrate SHORT": "subquad: --calibrate '",
    "eval TEACHER --corpus SHORT": "subquad: --corpus '",
    "distill nano.yml": "nano.yml",
    "distill RECIPE --set stages.hiden.lr=1": "did you mean 'stages.hidden'",
    "distill RECIPE --set student.mixer=gal": "did you mean 'gla'",
    "distill RECIPE --set seed=[0,1]": "subquad study",
    "distill RECIPE --set stages.hidden.tokens=-5": "stages.hidden.tokens",
    "distill RECIPE --set data.source=missing.txt": "missing.txt",
    "distill RECIPE --set teacher=nanoo": "did you mean 'nano'",
    "distill RECIPE --set teacher=.": "config.json",
    "study RECIPE --set sead=[1]": "did you mean 'seed'",
    "study RECIPE --jobs 0": "argument --jobs: got '0', expected a whole number, at least 1",
    "linearize TEACHER --mixer rwkv": "unknown mixer 'rwkv'",
    "linearize TEACHER --mixer gla --option halflife=3": "did you mean 'half_life'",
    "linearize TEACHER --option half_life": "NAME=VALUE",
    "linearize TEACHER --layer-types gla": "a mapping",
    "linearize TEACHER --budget 8": "--budget: got no --calibrate",
    "linearize TEACHER --budget-context 8": "--budget-context: got 8 without --budget",
    "linearize TEACHER --budget-memory gla": "--budget-memory: got gla without --budget",
    "linearize TEACHER --budget 8 --budget-memory glaa --calibrate a": "unknown mixer 'glaa'; did you mean 'gla'?",
    "linearize TEACHER --budget 8 --mixer gla --no-copy": "--budget cannot be used with --mixer, --no-copy",
    "linearize TEACHER --budget some --calibrate python-stdlib": "budget: got 'some', expected a number of tokens",
    "linearize TEACHER --layer-types '{default: [gla]}'": "got [",
    "linearize TEACHER --layer-types '{default: gal}'": "--layer-types: default: unknown mixer 'gal'; did you mean",
    "linearize TEACHER --layer-types '{default: gla, 7: attention}'": "there is no layer 7",
    "linearize TEACHER --layer-types '{default: gla}' --mixer gla": "with --mixer, --option or --keep",
    "linearize TEACHER --layer-types '{default: gla}' --keep 1": "with --mixer, --option or --keep",
    "linearize TEACHER --keep 1:3": "--keep: got '1:3', expected layer numbers like 9,19,29 or 0-3",
    "linearize TEACHER --keep 1,7": "there is no layer 7",
    "linearize TEACHER --keep 1 --budget 8 --calibrate python-stdlib": "--budget cannot be used with --keep",
    "inspect TEACHER": "is a llama model; expected a student",
    "inspect FOLDER": "holds no config.json",
    "generate no/such/dir x": "neither a file nor a directory",
    "generate TEACHER x --tokens 0": "at least 1",
    "generate TEACHER x --tokens many": "argument --tokens: got 'many', expected a whole number",
    "generate TEACHER x --chat": "no chat template",
    "generate TEACHER x --draft no/such/dir": "neither a file nor a directory",
    "generate TEACHER x --draft TEACHER --draft-tokens 0": "at least 1",
    "export TEACHER --format ggu": "did you mean 'gguf'",
    "distil x": "unknown command 'distil'; did you mean 'distill'?",
    "generate TEACHER x --token-count 3": "unknown option --token-count; did you mean '--tokens'? (see `subquad gen",
    "generate TEACHER x --temprature=0.5": "unknown option --temprature; did you mean '--temperature'?",
    "generate TEACHER x y": "unexpected argument 'y' (see `subquad generate --help`)",
    "generate TEACHER x --dtype float": "argument --dtype: got 'float'; did you mean 'float32'?",
    "generate no/such/dir x --tokens 4": "model 'no/such/dir': neither",
    "inspect nano": "subquad: 'nano' is a teacher; expected the directory of a saved student\n",
    "inspect no/such/dir": "subquad: 'no/such/dir': no such directory\n",
    "export no/such/dir --format gguf": "subquad: 'no/such/dir': no such directory\n",
    "report ./subquat": "no such directory; did you mean 'subquad'?",
    "distill": "the following arguments are required: RECIPE",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_user_error_is_one_line_and_exit_code_2(command, capsys, recipe_path):
    folder = recipe_path.parent
    (folder / "short.txt").write_text("text\n")
    places = {"RECIPE": recipe_path, "TEACHER": folder / "teacher", "FOLDER": folder, "SHORT": folder / "short.txt"}
    argv = [places.get(word, word) for word in shlex.split(command)]
    output = ["-o", folder / "never"] if argv[0] in ("distill", "study", "linearize", "export") else []
    code, _, err = run(capsys, *argv, *output)
    assert code == 2
    assert err.startswith("subquad: ")
    assert err.count("\n") == 1
    assert MISTAKES[command] in err
    assert not (folder / "never").exists()


def test_each_mistake_of_a_recipe_is_a_line(capsys, recipe_path):
    argv = ["distill", recipe_path, "-o", recipe_path.parent / "never", "--set", "seed=x", "--set", "data.seq_len=0"]
    code, _, err = run(capsys, *argv)
    assert code == 2
    first, second = err.splitlines()
    assert first.startswith("subquad: --set data.seq_len=0: data.seq_len: got 0, ")
    assert second.startswith("  --set seed=x: seed: got 'x', ")


def test_bench_needs_the_repository(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "benchmarks.ops", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, _, err = run(capsys, "bench", "ops", "--sizes", "16")
    assert code == 2
    assert err == "subquad: bench needs the repository: clone it and run the command from its root\n"


def test_interruption_is_exit_code_130(capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("subquad.config.load_study", interrupt)
    assert run(capsys, "recipe", "recipe.yaml") == (130, "", "subquad: interrupted\n")
    continued = "subquad: interrupted; the same command continues it\n"
    assert run(capsys, "study", "recipe.yaml", "-o", "s") == (130, "", continued)
    monkeypatch.setattr("subquad.evaluate.command.run", interrupt)
    would = "subquad: interrupted; with --output, the same command would continue it\n"
    assert run(capsys, "eval", "nano") == (130, "", would)
    assert run(capsys, "eval", "nano", "-o", "e") == (130, "", continued)


def test_one_process_of_torchrun_prints(capsys, monkeypatch, recipe_path, tmp_path):
    monkeypatch.setattr("subquad.distill.pipeline.distill", lambda *args, **options: {})
    monkeypatch.setattr("subquad.study.progress.format_table", lambda results, width: "the table")
    argv = ["distill", recipe_path, "-o", tmp_path / "s"]
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        code, out, _ = run(capsys, *argv)
        assert (code, out.startswith("the table")) == (0, printed)
        assert bool(out) == printed


CALIBRATED = ["--set", "stages.matrix=null", "--set", "stages.end_to_end=null", "--set", "stages.hidden.tokens=128"]
CALIBRATED += ["--set", "student.calibration_tokens=64"]


def test_an_interrupted_calibration_is_not_said_to_continue(capsys, monkeypatch, recipe_path, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("subquad.modeling.calibrate.calibrate_layer", interrupt)
    code, _, err = run(capsys, "distill", recipe_path, "-o", tmp_path / "s", *CALIBRATED)
    assert (code, err) == (130, "subquad: interrupted; the same command builds the student anew\n")


def test_distill_says_what_it_does_unless_it_is_quiet(capsys, recipe_path, tmp_path):
    code, out, err = run(capsys, "distill", recipe_path, "-o", tmp_path / "s", *CALIBRATED)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("calibrating 2 layers: ")
    assert lines[1] == "s: stage hidden, 128 tokens"
    assert "\x1b" not in out + err  # colours
    code, quiet, err = run(capsys, "distill", recipe_path, "-o", tmp_path / "q", *CALIBRATED, "--quiet")
    assert (code, err) == (0, "")
    assert quiet.splitlines()[0].startswith("mixer ")


def test_it_runs_as_a_module():
    assert "gated_deltanet" in run_python("-m", "subquad.cli", "mixers")


def test_public_names_print_no_warnings_and_keep_log_levels():
    """transformers imports torchao where it is installed, which warns about libraries that it cannot load."""
    program = "import logging, subquad; subquad.linearize; print(logging.getLogger('torchao').level)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert "torchao" not in done.stderr
    assert "_pytree" not in done.stderr
