"""Studies: their runs in order, names of runs, mistakes in lists."""

import re
from pathlib import Path

import pytest

from subquad import mixers
from subquad.config import load_recipe, load_study, run_name
from tests.helpers.recipe_files import BASE, mistake

RECIPES = Path(__file__).parents[2] / "subquad" / "recipes"


def test_study_is_the_product_of_lists_in_order(write):
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
        ("seed=[]", "--set seed=[]: seed: got [], expected a whole number"),
        ("seed=[[0]]", "--set seed=[[0]]: seed: got [0], expected a whole number"),
        ("student.mixer=[gla, retnt]", "student.mixer: unknown mixer 'retnt'; did you mean 'retnet'?"),
    ],
)
def test_wrong_study(write, override, expected):
    assert expected in mistake(write(BASE), [override], load=load_study)


def test_mistake_in_a_list_has_its_own_line(write):
    text = BASE.replace("mixer: gla", "mixer:\n  - gla\n  - glu\n")
    assert mistake(write(text), load=load_study).startswith("recipe.yaml:6: student.mixer: unknown mixer 'glu'")


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


def test_run_names_are_valid_directory_names(write):
    study = load_study(write(BASE), ["data.source=[a/b.txt, a_b.txt, 'a b.txt', " + "x" * 300 + ".txt]"])
    names = [run_name(recipe, study) for recipe in study]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._=+-]{1,120}", name) for name in names)
    assert names[1] == "gla-source=a_b.txt"


def test_run_names_differ_by_mixer_kwargs(write):
    study = load_study(
        write(BASE), ["student.mixer_kwargs=[{}, {short_conv: 4}, {half_life: 32}, {short_conv: 4, half_life: 32}]"]
    )
    assert len({run_name(recipe, study) for recipe in study}) == 4


@pytest.mark.parametrize(
    ("overrides", "students"),
    [
        (["student=retnet"], [("retnet", True)]),
        (["student=retnet", "student.copy_qkv=false"], [("retnet", False)]),
        (["student=[gla, retnet]"], [("gla", True), ("retnet", True)]),
        (["student=[gla, {mixer: softmax, copy_qkv: false}]"], [("gla", True), ("softmax", False)]),
        (
            ["student=[gla, retnet]", "student.copy_qkv=[true, false]"],
            [("gla", True), ("gla", False), ("retnet", True), ("retnet", False)],
        ),
    ],
)
def test_shorthand_in_studies_and_overrides(write, overrides, students):
    text = BASE.replace("student:\n  mixer: gla\n", "student: gla\n")
    assert [(r.student.mixer, r.student.copy_qkv) for r in load_study(write(text), overrides)] == students


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
