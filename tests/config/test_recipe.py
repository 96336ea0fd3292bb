"""Recipes: accepted values, mistakes and their messages, YAML."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from subquad.config import MixtureSource, Recipe, Student, different_keys, load_recipe, load_study
from subquad.distill.recipe_stages import stage_keys
from subquad.utils import UserError, nearest
from tests.helpers.recipe_files import BASE, mistake, mistakes

RECIPES = Path(__file__).parents[2] / "subquad" / "recipes"


def test_defaults_and_numbers(write):
    recipe = load_recipe(write(BASE))
    assert recipe.stages.hidden.tokens == 20_000
    assert recipe.stages.hidden.lr == 0.002
    assert recipe.stages.matrix is None
    assert recipe.stages.end_to_end is None
    assert recipe.student == Student(mixer="gla", copy_qkv=True, mixer_kwargs={})
    assert (recipe.data.seq_len, recipe.data.validation) == (512, None)
    assert (recipe.checkpoint.save_steps, recipe.checkpoint.save_total_limit) == (50, 2)
    assert (recipe.evaluation.eval_tokens, recipe.seed) == (16_384, 0)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1


TOKENS = {"1e6": 1_000_000, "2.0e+3": 2000, "010": 10, "1_000": 1000, "64.0": 64}
RATES = {"2e-3": 0.002, "2.0e-3": 0.002, ".5": 0.5, "1": 1.0, "1E-4": 1e-4}


@pytest.mark.parametrize(("key", "notations"), [("tokens", TOKENS), ("lr", RATES)])
def test_notations_of_numbers(write, key, notations):
    for written, value in notations.items():
        found = getattr(load_recipe(write(BASE), [f"stages.hidden.{key}={written}"]).stages.hidden, key)
        assert (found, type(found)) == (value, type(value))


AS_WRITTEN = """
stages.hidden.tokens='abc' stages.hidden.tokens='5' stages.hidden.tokens=true stages.hidden.tokens=1.5
stages.hidden.tokens=-1 stages.hidden.tokens=0 stages.hidden.lr=0 stages.hidden.lr=-0.001 stages.hidden.lr='fast'
stages.hidden.batch_size=0 stages.hidden.warmup=1 stages.hidden.weight_decay=-1 stages.hidden.max_grad_norm=0
stages.hidden.param_groups.mixer.lr=0 stages.hidden.micro_batch_size=3 stages.hidden.target='layer'
stages.hidden.ema_decay=1 stages.hidden.lr_scheduler=5 data.seq_len=1 teacher='' student.copy_qkv=1 student.mixer=5
student.mixer_kwargs=3 student.mixer_kwargs.half_life='long' checkpoint.save_total_limit=1 evaluation.eval_tokens=0
seed=-1 seed=4294967296
"""
"""Overrides whose value is quoted as it is written."""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        *((override, override.replace("=", ": got ")) for override in AS_WRITTEN.split()),
        ("stages.hidden.tokens=1e999", "stages.hidden.tokens: got inf"),
        ("stages.hidden.tokens=12:30", "stages.hidden.tokens: got '12:30'"),
        ("stages.hidden.lr=.nan", "stages.hidden.lr: got nan"),
        ("stages.hidden.lr=.inf", "stages.hidden.lr: got inf"),
        ("stages.hidden.lr=", "stages.hidden.lr: got null"),
        ("teacher=", "teacher: got null"),
        ("student.copy_qkv=yes", "student.copy_qkv: got 'yes'"),
        ("stages.hidden.param_groups.mixers.lr=1", "unknown key 'stages.hidden.param_groups.mixers'; did you mean"),
        (
            "evaluation.load_best_model_at_end=true",
            "evaluation.load_best_model_at_end: got true without evaluation.eval_steps",
        ),
        ("student.layer_types={default: glaa}", "unknown mixer 'glaa'; did you mean 'gla'?"),
        ("student.layer_types={}", "student.layer_types: got an empty mapping"),
        ("student={budget_context: 96}", "student.budget_context: got 96 without student.budget"),
        ("student={budget: 96, mixer: gla}", "student.budget: got 96 and mixer, expected a budget alone"),
        (
            "stages.hidden.lr_scheduler=cosin",
            "lr_scheduler: got 'cosin', expected one of linear, cosine, constant, wsd; did you mean 'cosine'?",
        ),
        ("stages.hidden=5", "stages.hidden: got 5, expected a mapping with the keys tokens, lr,"),
        ("data=5", "data.source: got 5"),
        ("data=", "data: got null, expected a mapping with the keys source, seq_len,"),
        ("data={seq_len: 8}", "data.source is missing; expected: `python-stdlib`, a text file"),
        ("student.mixer=glaa", "student.mixer: unknown mixer 'glaa'; did you mean 'gla'?"),
        (
            "student.mixer_kwargs.half_live=3",
            "student.mixer_kwargs.half_live: unknown mixer option 'half_live'; did you mean 'half_life'?",
        ),
        (
            "student={mixer: gla, mixer_kwargs: {window: 0, sinks: 2}}",
            "student.mixer_kwargs.window: got 0, expected a whole number of tokens, at least 1",
        ),
        (
            "student={mixer: gla, mixer_kwargs: {window: 8, merge: mas}}",
            "student.mixer_kwargs.merge: got 'mas'; did you mean 'mass'?",
        ),
        (
            "student={mixer: gla, mixer_kwargs: {sinks: 8}}",
            "student.mixer_kwargs.window: missing; expected a number of tokens for sinks",
        ),
        (
            "student={mixer: softmax, mixer_kwargs: {half_life: 3}}",
            "student.mixer_kwargs.half_life: unknown option; softmax has none",
        ),
        ("stages.hidden=null", "stages: got no stage"),
        (
            "stages.end_to_end={tokens: 5, lr: 1, ce_weight: 0, kl_weight: 0}",
            "stages.end_to_end.kl_weight: got 0 for kl_weight and ce_weight",
        ),
        ("stages.end_to_end={tokens: 5, lr: 1, temperature: 0}", "stages.end_to_end.temperature: got 0"),
        ("stages.matrix.lr=1", "stages.matrix.tokens is missing; expected: Training tokens"),
        ("stages.hiden.lr=1", "unknown key 'stages.hiden'; did you mean 'stages.hidden'?"),
        ("student.foo.bar=2", "unknown key 'student.foo'; expected one of mixer, copy_qkv, calibration_tokens,"),
        ("mixer=gla", "unknown key 'mixer'; did you mean 'student.mixer'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'stages.matrix.lr' or 'stages.hidden.lr' or 'stages.end_to_end.lr'?"),
        ("checkpoint.save_step=5", "unknown key 'checkpoint.save_step'; did you mean 'checkpoint.save_steps'?"),
        ("seed=" + "9" * 5000, "seed: got '9999999999"),
        ("teacher_dtype=bfloat16", "teacher_dtype: got bfloat16 with precision float32, expected precision bfloat16"),
        ("device=gpu", "device: got 'gpu'"),
        ("seed", "expected key=value, such as stages.hidden.lr=1e-3"),
        ("=1", "expected key=value, such as stages.hidden.lr=1e-3"),
        ("stages..lr=1", "expected key=value, such as stages.hidden.lr=1e-3"),
        ("stages.hidden.lr=[", "not YAML: expected the node content, but found '<stream end>'"),
        (
            "student.mixer=[gla, retnet]",
            'student.mixer: got ["gla", "retnet"], expected text; `subquad study` runs all',
        ),
    ],
)
def test_wrong_override(write, override, expected):
    line = mistake(write(BASE), [override])
    assert expected in line
    assert re.search("expected|did you mean|unknown option|not YAML", line)
    assert line.startswith("recipe.yaml:5: " if "no stage" in expected else f"--set {override[:70]}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml:1: got null, expected a mapping of keys to values"),
        ("# nothing\n", "recipe.yaml:1: got null, expected a mapping of keys to values"),
        ("- a\n- b\n", 'recipe.yaml:1: got ["a", "b"], expected a mapping'),
        ("just words", "recipe.yaml:1: got 'just words', expected a mapping"),
        (BASE + "seed: [1, 2\n", "recipe.yaml:10: not YAML: "),
        (BASE + "seed: 1\nseed: 2\n", "recipe.yaml:10: seed: this key is given twice, first at recipe.yaml:9"),
        (BASE + "    lr: 1\n", "recipe.yaml:9: stages.hidden.lr: this key is given twice, first at recipe.yaml:8"),
        (BASE + "? [a]\n: 1\n", "recipe.yaml:9: recipe: got a list or mapping as a key"),
        (BASE + "1: 2\n", "recipe.yaml:9: unknown key '1'; expected one of teacher, data, student, stages,"),
        (BASE + "sed: 1\n", "recipe.yaml:9: unknown key 'sed'; did you mean 'seed'?"),
        (
            BASE.replace("    lr: 2e-3\n", ""),
            "recipe.yaml:6: stages.hidden.lr is missing; expected: Peak learning rate",
        ),
        (BASE.replace("20_000", "many"), "recipe.yaml:7: stages.hidden.tokens: got 'many'"),
        (
            BASE.replace("mixer: gla", "mixer: mamba"),
            "recipe.yaml:4: student.mixer: unknown mixer 'mamba'; did you mean",
        ),
        (BASE.replace("teacher: nano\n", ""), "recipe.yaml:1: teacher is missing; expected: `nano`, `smollm2-135m`,"),
        (BASE + "---\nseed: 1\n", "recipe.yaml:9: not YAML: but found another document"),
        (BASE + "seed: !!python/object:os.system x\n", "recipe.yaml:9: not YAML: could not determine a constructor"),
        (BASE + "seed: \x01\n", "recipe.yaml:9: not YAML: special characters are not allowed"),
        ("[" * 5000, "nested too deep"),
        (b"teacher: \xff\n", "byte 0xff in position 9: invalid start byte); expected a recipe in YAML"),
        (BASE + "seed: [0, 1]\n", "recipe.yaml:9: seed: got [0, 1], expected a whole number; `subquad study` runs"),
    ],
)
def test_wrong_file(write, text, expected):
    assert expected in mistake(write(text))


def test_messages_in_full(write):
    text = BASE.replace("20_000", "many").replace("nano", "''").replace("mixer: gla", "mixer: [gla, retnt]")
    keys = "source, seq_len, validation, document_masking, column, chat, assistant_only_loss, split, subset, streaming"
    keys += ", shuffle_buffer"
    assert mistakes(write(text + "sed: 1\n"), ["data="], load=load_study) == [
        "recipe.yaml:1: teacher: got '', expected text that is not empty",
        "recipe.yaml:4: student.mixer: unknown mixer 'retnt'; did you mean 'retnet'?",
        "recipe.yaml:7: stages.hidden.tokens: got 'many', expected a whole number",
        "recipe.yaml:9: unknown key 'sed'; did you mean 'seed'?",
        f"--set data=: data: got null, expected a mapping with the keys {keys}",
    ]


def test_mistakes_of_all_sections_at_once(write):
    text = """\
teacher: 5
data: {source: books.txt, seq_len: long}
student: {mixer: gla, copy_qkv: 1}
stages:
  hidden: {tokens: 100, lr: 1e-3, lr_scheduler: cosin}
checkpoint: {save_step: 3}
evaluation: {eval_tokens: 0}
"""
    found = mistakes(write(text), ["seed=x", "precision"])
    starts = ["1: teacher:", "2: data.seq_len:", "3: student.copy_qkv:", "5: stages.hidden.lr_scheduler:"]
    starts = [f"recipe.yaml:{start}" for start in [*starts, "6: unknown key", "7: evaluation.eval_tokens:"]]
    starts += ["--set precision: expected key=value", "--set seed=x: seed: got 'x'"]
    assert len(found) == len(starts)
    assert all(line.startswith(start) for line, start in zip(found, starts, strict=True)), found


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        (
            "student: {mixer: gla, copy_qkv: 1, foo: 2, mixer_kwargs: {half_live: 3, short_conv: x, zz: 1}}",
            ["student.copy_qkv", "'student.foo'", "kwargs.half_live", "kwargs.short_conv", "kwargs.zz"],
        ),
        ("student: {mixer: retnt, copy_qkv: 1, mixer_kwargs: {half_life: x}}", ["mixer 'retnt'", "copy_qkv"]),
        ("student: {mixer: 5, mixer_kwargs: 3, export_target: x}", [".mixer:", ".mixer_kwargs:", ".export_target"]),
        (
            "student: {layer_types: {0: {mixer: {a: 1}}, 1: {}}}",
            ["types.0: unknown mixer {'a", "types.1: unknown mixer"],
        ),
        ("student: {layer_types: {}, mixer_kwargs: {half_life: 3}}", ["student.layer_types"]),
        ("student: {layer_types: {0-: gla, x: {mixer: kda, a: 1}}}", ["types.0-: ", "types.x: ", "types.x: unknown"]),
        (
            "student: {layer_types: {0: glaa, 1: {mixer: gla, a: 1, b: 2}, 2: {mixer: attention, window: x}}}",
            ["layer_types.0", "layer_types.1: unknown mixer option 'a'", "option 'b'", "layer_types.2"],
        ),
        (
            "stages: {hidden: {tokens: 0, lr: fast, lr_scheduler: cosin, batch_size: 4, micro_batch_size: 3, foo: 1}}",
            ["hidden.tokens", "hidden.lr:", "hidden.lr_scheduler", "hidden.micro_batch_size", "'stages.hidden.foo'"],
        ),
        (
            "stages: {end_to_end: {tokens: 1, lr: 1, ce_weight: 0, kl_weight: 0, temperature: 0}}",
            ["kl_weight", "temperature"],
        ),
        (
            "data: {source: {a.txt: 0, b.txt: {weigth: 1, chat: 5}}, seq_len: 0, assistant_only_loss: 1}",
            ["a.txt.weight", "'data.source.b.txt.weigth'", "b.txt.chat", "data.seq_len", "data.assistant_only_loss"],
        ),
        ("data: {source: a, column: 5, assistant_only_loss: true}", ["data.column", "data.assistant_only_loss"]),
        (
            "evaluation: {eval_steps: 30, load_best_model_at_end: true, eval_tokens: 0}\n"
            "checkpoint: {save_total_limit: 0}",
            ["evaluation.eval_tokens", "save_total_limit", "checkpoint.save_steps: got 50"],
        ),
        (
            "evaluation: {eval_steps: 0, load_best_model_at_end: true}\ncheckpoint: {save_steps: 3}",
            ["eval_steps: got 0"],
        ),
        (
            "stages: {hidden: {tokens: 1, lr: 1, ema_decay: 0.9}, end_to_end: {tokens: 1, lr: 1, ema_decay: 0.9}}\n"
            "evaluation: {eval_steps: 25, load_best_model_at_end: true}\nseed: -1",
            ["evaluation.load_best_model_at_end: got true with", "seed"],
        ),
        ("student: {}\nstudent: {}\n? [a]\n: 1\nseed: -1", ["given twice", "as a key", "seed: got -1"]),
        ("seed: [0, []]\nstudent: []\nprecision: x", ["seed: got []", "student.mixer: got []", "precision"]),
        (
            "student: [gla, {mixer: gla, mixer_kwargs: {a: 1, b: 2}}, retnt]\nseed: [0, -1]",
            ["'a'", "'b'", "'retnt'", "seed: got -1"],
        ),
        (
            "checkpoint: {save_steps: []}\nevaluation: {eval_steps: 3, load_best_model_at_end: true}",
            ["save_steps: got []"],
        ),
    ],
)
def test_mistakes_do_not_hide_each_other(write, section, keys):
    kept = {key: value for key, value in yaml.safe_load(BASE).items() if f"{key}: " not in f"\n{section}"}
    found = mistakes(write(yaml.safe_dump(kept) + section), load=load_study)
    assert len(found) == len(keys), found
    assert all(any(key in line for line in found) for key in keys), found


def test_a_misspelled_key_is_one_mistake(write):
    assert "did you mean 'teacher'" in mistake(write(BASE.replace("teacher", "techer")))


def test_missing_file_and_directory(write):
    expected = "nowhere.yaml: cannot be read (No such file or directory); expected a recipe in YAML"
    assert mistake("nowhere.yaml") == expected
    Path("folder").mkdir()
    assert mistake("./folder/").startswith("recipe: got './folder/', no file and no recipe of the package")


def test_byte_order_mark(write):
    assert load_recipe(write(b"\xef\xbb\xbf" + BASE.encode())).teacher == "nano"


def test_overrides_add_replace_and_remove(write):
    path = write(BASE)
    recipe = load_recipe(
        path,
        [
            "stages.end_to_end.tokens=500",
            "stages.end_to_end.lr=1e-4",
            "stages.hidden=null",
            "student.mixer_kwargs.half_life=32",
            "data.source=a=b.txt",
            " seed = 7",
        ],
    )
    assert recipe.stages.hidden is None
    assert (recipe.stages.end_to_end.tokens, recipe.stages.end_to_end.lr) == (500, 1e-4)
    assert recipe.student.mixer_kwargs == {"half_life": 32}
    assert recipe.data.source == "a=b.txt"
    assert recipe.seed == 7
    assert load_recipe(path, ["seed=1", "seed=2"]).seed == 2


def test_yaml_round_trip(write):
    path = write(BASE)
    awkward = ["teacher='1e6'", "data.source='yes'", "data.validation='null'", "stages.hidden.lr=1e-5"]
    for overrides in ([], awkward, ["data.source='012'", "data.validation='a: b # ü'"]):
        recipe = load_recipe(path, overrides)
        text = recipe.to_yaml()
        assert load_recipe(write(text)) == recipe
        assert yaml.safe_load(text)["data"] == recipe.data.model_dump()
        path = write(BASE)


def test_digest_depends_on_content_only(write):
    plain = load_recipe(write(BASE)).digest()
    reordered = "seed: 0\n" + BASE.replace("20_000", "2e4").replace("2e-3", "0.002") + "    batch_size: 8\n"
    assert load_recipe(write(reordered)).digest() == plain
    assert load_recipe(write(BASE), ["seed=1"]).digest() != plain
    assert re.fullmatch("[0-9a-f]{64}", plain)


def test_digest_is_the_same_with_all_defaults_and_without_a_new_key(write):
    recipe = load_recipe(write(BASE))
    written = load_recipe(write(recipe.to_yaml()))
    assert (written.digest(), stage_keys(written)) == (recipe.digest(), stage_keys(recipe))
    longer = type("Recipe", (Recipe,), {"__annotations__": {"new_key": int}, "new_key": 3, "__module__": __name__})
    values = yaml.safe_load(recipe.to_yaml())
    assert longer.model_validate(values).digest() == recipe.digest()
    assert stage_keys(longer.model_validate(values)) == stage_keys(recipe)
    assert longer.model_validate({**values, "new_key": 4}).digest() != recipe.digest()


def test_different_keys_are_named_with_their_values(write):
    recipe = load_recipe(write(BASE))
    assert different_keys(recipe, load_recipe(write(recipe.to_yaml()))) == {}
    changes = ["seed=1", "student.mixer_kwargs.half_life=32", "stages.hidden.lr=1e-5"]
    other = load_recipe(write(BASE), changes)
    found = different_keys(recipe, other)
    assert found["seed"] == (0, 1)
    assert found["student.mixer_kwargs.half_life"] == ("not set", 32)
    assert found["stages.hidden.lr"] == (recipe.stages.hidden.lr, 1e-5)
    assert different_keys(other, recipe) == {key: (there, here) for key, (here, there) in found.items()}


def test_shorthand(write):
    text = "teacher: nano\ndata: books.txt\nstudent: gla\nstages: {hidden: {tokens: 20_000, lr: 0.002}}\n"
    short = load_recipe(write(text))
    full = load_recipe(write(BASE), ["data.source=books.txt"])
    assert (short, short.digest(), short.to_yaml()) == (full, full.digest(), full.to_yaml())
    assert yaml.safe_load(short.to_yaml())["student"]["mixer"] == "gla"
    assert Recipe.model_validate(yaml.safe_load(text)) == short


def test_shorthand_keeps_its_place_in_messages(write):
    text = BASE.replace("student:\n  mixer: gla\n", "student:\n- gla\n- glaa\n")
    assert mistake(write(text), load=load_study).startswith("recipe.yaml:5: student.mixer: unknown mixer 'glaa'")


def test_weights_of_a_mixture(write):
    source = load_recipe(write(BASE), ["data.source={a.txt: 2, b.txt: {weight: 0.5, column: body}}"]).data.source
    assert source == {"a.txt": MixtureSource(weight=2.0), "b.txt": MixtureSource(weight=0.5, column="body")}


def test_recipe_of_the_readme(write):
    text = (Path(__file__).parents[2] / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    recipe = load_recipe(write(text))
    assert recipe.teacher == "nano"
    assert all([recipe.stages.matrix, recipe.stages.hidden, recipe.stages.end_to_end])


@pytest.mark.parametrize(
    ("name", "valid", "expected"),
    [
        ("glaa", ["gla", "metala"], "; did you mean 'gla'?"),
        ("GLA", ["gla", "metala"], "; did you mean 'gla'?"),
        ("xyz", ["gla", "metala"], "; expected one of gla, metala"),
        (None, ["gla"], "; expected one of gla"),
        ("a", [], ""),
    ],
)
def test_nearest(name, valid, expected):
    assert nearest(name, valid) == expected


def test_user_error_has_a_line_for_each_problem():
    error = UserError("first\n   second", "third")
    assert str(error) == "first second\nthird"
    assert error.problems == ("first second", "third")


def test_recipes_of_the_package_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("small-budget") == load_recipe(RECIPES / "small-budget.yaml")
    (tmp_path / "small-budget").mkdir()  # no recipe
    assert load_recipe("small-budget") == load_recipe(RECIPES / "small-budget.yaml")
    with pytest.raises(UserError, match="no file and no recipe of the package; did you mean 'small-budget'"):
        load_recipe("smal-budget")
    with pytest.raises(UserError, match="No such file"):
        load_recipe("small-budget.yaml")
