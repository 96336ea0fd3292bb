"""The recipe: what it accepts, what it refuses in which words, and the study that lists in it make."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from subquad import mixers
from subquad.config import Recipe, Student, _keys, _section, load_recipe, load_study, run_name
from subquad.utils import UserError, nearest

RECIPES = Path(__file__).parent.parent / "recipes"
BASE = """\
teacher: nano
data: {source: python-stdlib}
student:
  mixer: gla
stages:
  hidden:
    tokens: 20_000
    lr: 2e-3
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes `recipe.yaml` into the working directory, so that messages name it as a user would see it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "recipe.yaml"

    return write


def refusal(*args, load=load_recipe) -> str:
    with pytest.raises(UserError) as caught:
        load(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_defaults_and_numbers(write):
    recipe = load_recipe(write(BASE))
    assert recipe.stages.hidden.tokens == 20_000
    assert recipe.stages.hidden.lr == 0.002
    assert recipe.stages.matrix is None
    assert recipe.stages.end_to_end is None
    assert recipe.student == Student(mixer="gla", copy_qkv=True, mixer_kwargs={})
    assert (recipe.data.seq_len, recipe.data.validation) == (512, None)
    assert (
        recipe.checkpoint.save_steps,
        recipe.checkpoint.save_total_limit,
        recipe.evaluation.eval_tokens,
        recipe.seed,
    ) == (
        50,
        2,
        16_384,
        0,
    )
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e6", 1_000_000), ("2.0e+3", 2000), ("010", 10), ("1_000", 1000), ("64.0", 64)],
)
def test_whole_numbers_as_people_write_them(write, written, value):
    tokens = load_recipe(write(BASE), [f"stages.hidden.tokens={written}"]).stages.hidden.tokens
    assert tokens == value
    assert type(tokens) is int


@pytest.mark.parametrize(
    ("written", "value"), [("2e-3", 0.002), ("2.0e-3", 0.002), (".5", 0.5), ("1", 1.0), ("1E-4", 1e-4)]
)
def test_rates_as_people_write_them(write, written, value):
    lr = load_recipe(write(BASE), [f"stages.hidden.lr={written}"]).stages.hidden.lr
    assert lr == value
    assert type(lr) is float


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.hidden.tokens=abc", "stages.hidden.tokens: got 'abc', expected a whole number"),
        ("stages.hidden.tokens='5'", "stages.hidden.tokens: got '5', expected a whole number"),
        ("stages.hidden.tokens=true", "stages.hidden.tokens: got true, expected a whole number"),
        ("stages.hidden.tokens=1.5", "stages.hidden.tokens: got 1.5, expected a whole number"),
        ("stages.hidden.tokens=1e999", "stages.hidden.tokens: got inf, expected a whole number"),
        ("stages.hidden.tokens=-1", "stages.hidden.tokens: got -1, expected a number greater than 0"),
        ("stages.hidden.tokens=0", "stages.hidden.tokens: got 0, expected a number greater than 0"),
        ("stages.hidden.tokens=12:30", "stages.hidden.tokens: got '12:30', expected a whole number"),
        ("stages.hidden.lr=0", "stages.hidden.lr: got 0, expected a number greater than 0"),
        ("stages.hidden.lr=-1e-3", "stages.hidden.lr: got -0.001, expected a number greater than 0"),
        ("stages.hidden.lr=.nan", "stages.hidden.lr: got nan, expected a finite number"),
        ("stages.hidden.lr=.inf", "stages.hidden.lr: got inf, expected a finite number"),
        ("stages.hidden.lr=", "stages.hidden.lr: got null, expected a number"),
        ("stages.hidden.lr=fast", "stages.hidden.lr: got 'fast', expected a number"),
        ("stages.hidden.batch_size=0", "stages.hidden.batch_size: got 0, expected a number greater than 0"),
        ("stages.hidden.warmup=1", "stages.hidden.warmup: got 1, expected a number less than 1"),
        ("stages.hidden.weight_decay=-1", "weight_decay: got -1, expected a number greater than or equal to 0"),
        ("stages.hidden.max_grad_norm=0", "max_grad_norm: got 0, expected a number greater than 0"),
        ("stages.hidden.param_groups.mixer.lr=0", "groups.mixer.lr: got 0, expected a number greater than 0"),
        ("stages.hidden.param_groups.mixers.lr=1", "unknown key 'stages.hidden.param_groups.mixers'; did you mean"),
        ("stages.hidden.micro_batch_size=3", "micro_batch_size: got 3, expected a divisor of batch_size (8)"),
        ("stages.hidden.target=layer", "target: got 'layer', expected one of mixer, decoder_layer"),
        ("stages.hidden.ema_decay=1", "ema_decay: got 1, expected a number less than 1"),
        (
            "evaluation.load_best_model_at_end=true",
            "evaluation.load_best_model_at_end: got true without evaluation.eval_steps",
        ),
        ("student.layer_types={default: glaa}", "unknown mixer 'glaa'; did you mean 'gla'?"),
        ("student.layer_types={}", "an empty plan"),
        (
            "stages.hidden.lr_scheduler=cosin",
            "lr_scheduler: got 'cosin', expected one of linear, cosine, constant, wsd; did you mean 'cosine'?",
        ),
        ("stages.hidden.lr_scheduler=5", "lr_scheduler: got 5, expected one of linear, cosine, constant"),
        (
            "stages.hidden=5",
            "stages.hidden: got 5, expected a mapping with the keys tokens, lr, batch_size, micro_batch_size,",
        ),
        ("data.seq_len=1", "data.seq_len: got 1, expected a number greater than or equal to 2"),
        ("data=5", "data: got 5, expected a mapping with the keys source, seq_len, validation"),
        ("data={seq_len: 8}", "data.source is missing; expected: `python-stdlib`, a text file"),
        ("teacher=", "teacher: got null, expected text"),
        ("teacher=''", "teacher: got '', expected text that is not empty"),
        ("student.copy_qkv=yes", "student.copy_qkv: got 'yes', expected true or false"),
        ("student.copy_qkv=1", "student.copy_qkv: got 1, expected true or false"),
        ("student.mixer=glaa", "student.mixer: unknown mixer 'glaa'; did you mean 'gla'?"),
        ("student.mixer=5", "student.mixer: got 5, expected text"),
        ("student.mixer_kwargs=3", "student.mixer_kwargs: got 3, expected a mapping of names to values"),
        (
            "student.mixer_kwargs.half_live=3",
            "student.mixer_kwargs: unknown mixer option 'half_live'; did you mean 'half_life'?",
        ),
        (
            "student.mixer_kwargs.half_life=long",
            "student.mixer_kwargs: half_life: got 'long', expected a number",
        ),
        (
            "student={mixer: softmax, mixer_kwargs: {half_life: 3}}",
            "student.mixer_kwargs: softmax has no options; got half_life",
        ),
        ("stages.hidden=null", "stages: no stage is left; expected at least one of matrix, hidden, end_to_end"),
        (
            "stages.end_to_end={tokens: 5, lr: 1, ce_weight: 0, kl_weight: 0}",
            "stages.end_to_end: ce_weight and kl_weight are both 0; expected one of them above 0",
        ),
        (
            "stages.end_to_end={tokens: 5, lr: 1, temperature: 0}",
            "stages.end_to_end.temperature: got 0, expected a number greater than 0",
        ),
        ("stages.matrix.lr=1", "stages.matrix.tokens is missing; expected: Tokens to train on"),
        ("stages.hiden.lr=1", "unknown key 'stages.hiden'; did you mean 'stages.hidden'?"),
        ("student.foo.bar=2", "unknown key 'student.foo'; expected one of mixer, copy_qkv, calibration_tokens,"),
        ("mixer=gla", "unknown key 'mixer'; did you mean 'student.mixer'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'stages.matrix.lr' or 'stages.hidden.lr' or 'stages.end_to_end.lr'?"),
        ("checkpoint.save_step=5", "unknown key 'checkpoint.save_step'; did you mean 'checkpoint.save_steps'?"),
        ("checkpoint.save_total_limit=0", "checkpoint.save_total_limit: got 0, expected a number greater than 0"),
        ("evaluation.eval_tokens=0", "evaluation.eval_tokens: got 0, expected a number greater than 0"),
        ("seed=-1", "seed: got -1, expected a number greater than or equal to 0"),
        ("seed=4294967296", "seed: got 4294967296, expected a number less than 4294967296"),
        ("seed=" + "9" * 5000, ": seed: cannot be read (Exceeds the limit"),
        ("seed", "expected key=value, such as stages.hidden.lr=1e-3"),
        ("=1", "expected key=value, such as stages.hidden.lr=1e-3"),
        ("stages..lr=1", "expected key=value, such as stages.hidden.lr=1e-3"),
        ("stages.hidden.lr=[", "not YAML: expected the node content, but found '<stream end>'"),
        (
            "student.mixer=[gla, retnet]",
            "student.mixer is a list, which makes this a study of several students; run it with `subquad study`",
        ),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(write, override, expected):
    message = refusal(write(BASE), [override])
    assert expected in message
    if "no stage is left" not in message:
        assert message.startswith(f"--set {override[:70]}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml: is empty; expected a recipe in YAML"),
        ("# nothing\n", "recipe.yaml: is empty; expected a recipe in YAML"),
        ("- a\n- b\n", "recipe.yaml:1: holds list, expected a mapping of keys to values"),
        ("just words", "recipe.yaml:1: holds str, expected a mapping of keys to values"),
        (BASE + "seed: [1, 2\n", "recipe.yaml:10: not YAML: "),
        (BASE + "seed: 1\nseed: 2\n", "recipe.yaml:10: seed: this key is there twice, first at recipe.yaml:9"),
        (BASE + "    lr: 1\n", "recipe.yaml:9: stages.hidden.lr: this key is there twice, first at recipe.yaml:8"),
        (BASE + "? [a]\n: 1\n", "recipe.yaml:9: a key is a list or mapping; expected a name"),
        (BASE + "1: 2\n", "recipe.yaml:9: unknown key '1'; expected one of teacher, data, student, stages,"),
        (BASE + "sed: 1\n", "recipe.yaml:9: unknown key 'sed'; did you mean 'seed'?"),
        (BASE.replace("lr: 2e-3", "learning_rate: 2e-3"), "recipe.yaml:8: unknown key 'stages.hidden.learning_rate';"),
        (
            BASE.replace("    lr: 2e-3\n", ""),
            "recipe.yaml:6: stages.hidden.lr is missing; expected: Peak learning rate",
        ),
        (BASE.replace("20_000", "many"), "recipe.yaml:7: stages.hidden.tokens: got 'many', expected a whole number"),
        (
            BASE.replace("mixer: gla", "mixer: mamba"),
            "recipe.yaml:4: student.mixer: unknown mixer 'mamba'; did you mean",
        ),
        (BASE.replace("teacher: nano\n", ""), "recipe.yaml:1: teacher is missing; expected: `nano`, `smollm2-135m`,"),
        (BASE + "---\nseed: 1\n", "recipe.yaml:9: not YAML: but found another document"),
        (BASE + "seed: !!python/object:os.system x\n", "recipe.yaml:9: not YAML: could not determine a constructor"),
        (BASE + "seed: \x01\n", "recipe.yaml:9: not YAML: special characters are not allowed"),
        ("[" * 5000, "nested too deep"),
        (b"teacher: \xff\n", "recipe.yaml: not UTF-8 text at byte 9; expected a recipe in YAML"),
        (BASE + "seed: [0, 1]\n", "recipe.yaml:9: seed is a list, which makes this a study"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(write, text, expected):
    assert expected in refusal(write(text))


def test_no_file(write):
    assert refusal("nowhere.yaml") == "nowhere.yaml: no such file; expected a recipe in YAML"
    Path("folder").mkdir()
    assert refusal("folder").startswith("folder: cannot be read (Is a directory)")


def test_a_byte_order_mark_is_no_part_of_a_key(write):
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


def test_digest_is_of_the_content(write):
    plain = load_recipe(write(BASE)).digest()
    reordered = "seed: 0\n" + BASE.replace("20_000", "2e4").replace("2e-3", "0.002") + "    batch_size: 8\n"
    assert load_recipe(write(reordered)).digest() == plain
    assert load_recipe(write(BASE), ["seed=1"]).digest() != plain
    assert re.fullmatch("[0-9a-f]{64}", plain)


def test_study_is_the_product_in_order(write):
    study = load_study(write(BASE), ["student.mixer=[gla, retnet]", "seed=[1, 0]"])
    assert [(r.student.mixer, r.seed) for r in study] == [("gla", 1), ("gla", 0), ("retnet", 1), ("retnet", 0)]
    assert load_study(write(BASE)) == [load_recipe(write(BASE))]
    assert len(load_study(write(BASE), ["student.mixer=[gla, gla]"])) == 1


def test_study_over_sections_and_stages(write):
    text = BASE.replace(
        "student:\n  mixer: gla\n", "student:\n- {mixer: [gla, retnet]}\n- {mixer: softmax, copy_qkv: false}\n"
    )
    study = load_study(write(text), ["stages.matrix=[null, {tokens: 10, lr: 1}]"])
    assert [(r.student.mixer, r.student.copy_qkv, r.stages.matrix is None) for r in study] == [
        ("gla", True, True),
        ("gla", True, False),
        ("retnet", True, True),
        ("retnet", True, False),
        ("softmax", False, True),
        ("softmax", False, False),
    ]
    assert {r.student.copy_qkv for r in load_study(write(text), ["student.copy_qkv=false"])} == {False}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=[]", "--set seed=[]: seed: an empty list; expected at least one value"),
        ("seed=[[0]]", "--set seed=[[0]]: seed: a list within a list; expected values"),
        ("student.mixer=[gla, retnt]", "student.mixer: unknown mixer 'retnt'; did you mean 'retnet'?"),
    ],
)
def test_a_wrong_study_is_refused(write, override, expected):
    assert expected in refusal(write(BASE), [override], load=load_study)


def test_an_error_in_a_list_names_its_own_line(write):
    text = BASE.replace("mixer: gla", "mixer:\n  - gla\n  - glu\n")
    assert refusal(write(text), load=load_study).startswith("recipe.yaml:6: student.mixer: unknown mixer 'glu'")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["gla"]),
        (["student.mixer=[gla, retnet]"], ["gla", "retnet"]),
        (["seed=[0, 1]"], ["gla-seed=0", "gla-seed=1"]),
        (
            ["student.copy_qkv=[true, false]", "seed=[0, 1]"],
            [
                "gla-copy_qkv=true-seed=0",
                "gla-copy_qkv=true-seed=1",
                "gla-copy_qkv=false-seed=0",
                "gla-copy_qkv=false-seed=1",
            ],
        ),
        (["stages.hidden.lr=[1e-3, 2e-5]"], ["gla-hidden.lr=0.001", "gla-hidden.lr=2e-05"]),
        (["stages.matrix=[null, {tokens: 1, lr: 1}]"], ["gla-matrix=off", "gla-matrix=on"]),
        (
            ["stages.matrix=[null, {tokens: 1, lr: 1}, {tokens: 2, lr: 1}]"],
            ["gla-matrix=off", "gla-matrix=on-matrix.tokens=1", "gla-matrix=on-matrix.tokens=2"],
        ),
        (["student.mixer_kwargs=[{}, {half_life: 32}]"], ["gla", "gla-mixer_kwargs.half_life=32"]),
        (
            ["stages=[{matrix: {tokens: 1, lr: 1}, hidden: {tokens: 1, lr: 1}}, {hidden: {tokens: 2, lr: 1}}]"],
            ["gla-matrix=on", "gla-matrix=off"],
        ),
    ],
)
def test_run_names(write, overrides, names):
    study = load_study(write(BASE), overrides)
    assert [run_name(recipe, study) for recipe in study] == names


def test_run_names_are_directory_names(write):
    study = load_study(write(BASE), ["data.source=[a/b.txt, a_b.txt, 'a b.txt', " + "x" * 300 + ".txt]"])
    names = [run_name(recipe, study) for recipe in study]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._=+-]{1,120}", name) for name in names)
    assert names[1] == "gla-source=a_b.txt"


def test_options_that_only_some_students_have_keep_names_apart(write):
    study = load_study(
        write(BASE), ["student.mixer_kwargs=[{}, {short_conv: 4}, {half_life: 32}, {short_conv: 4, half_life: 32}]"]
    )
    assert len({run_name(recipe, study) for recipe in study}) == 4


def test_every_key_is_described():
    for key in _keys():
        section, _, name = key.rpartition(".")
        field = _section(section.split(".") if section else []).model_fields[name]
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert field.description, key
        assert is_section or len(field.description) > 15, key
    assert Recipe.model_json_schema()["properties"]["seed"]["description"]


def test_shipped_recipes():
    study = load_study(RECIPES / "nano.yaml")
    later = ("kda", "hgrn2")
    assert [run_name(recipe, study) for recipe in study] == [m for m in mixers.names() if m not in later]
    assert all(recipe.student.copy_qkv == (recipe.student.mixer != "softmax") for recipe in study)
    nano, paper = (load_study(RECIPES / f"{name}-grid.yaml") for name in ("nano", "paper"))
    assert (len(nano), len(paper)) == (8 * 3 * 2, 8 * 3 * 2 + 3)
    assert run_name(nano[0], nano) == "linear_attention-copy_qkv=true-matrix=on-hidden=on"
    budgets = {sum(s.tokens for s in (r.stages.matrix, r.stages.hidden, r.stages.end_to_end) if s) for r in paper}
    assert budgets == {3_000_000_000}
    recipe = load_recipe(RECIPES / "smollm2-135m.yaml")
    assert (recipe.teacher, recipe.student.mixer) == ("smollm2-135m", "gated_deltanet")
    assert (recipe.stages.hidden.lr, recipe.stages.hidden.param_groups.attention_projections.lr) == (2e-3, 5e-4)


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


def test_a_user_error_is_one_line():
    assert str(UserError("first\n   second")) == "first second"
