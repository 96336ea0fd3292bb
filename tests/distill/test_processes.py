"""Training in several processes (gloo): replicas (DDP), shards (FSDP2) and shares of the layers train the student that
one process trains."""

import json

import pytest
import torch
from safetensors.torch import load_file

from subquad.config import load_recipe
from subquad.distill.pipeline import distill
from subquad.distill.recipe_stages import STAGE_NAMES
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError
from tests.helpers.processes import run_python
from tests.helpers.recipes import save_tiny_teacher, sentences, tiny_recipe
from tests.helpers.stage_runs import Case, train, train_in_processes

pytestmark = pytest.mark.usefixtures("own_cache")
STEPS = 20
HYBRID = "student.layer_types={default: gla, '1': attention}"
WINDOWS = "student.layer_types={default: {mixer: attention, window: 8, sinks: 2}}"
MEMORY = "student={mixer: gla, calibration_tokens: null, mixer_kwargs: {window: 8, memory: outside}}"
BEST = "evaluation={eval_tokens: 128, eval_steps: 5, load_best_model_at_end: true}"
VARIANTS = {
    "mixer": [],
    "hybrid": [HYBRID],
    "windows": [WINDOWS],
    "tied": ["teacher=TIED"],
    "ema": ["STAGE.ema_decay=0.9"],
    "lora": ["STAGE.lora={rank: 2, alpha: 4}"],
    "micro_batches": ["STAGE.micro_batch_size=1"],
    "gradient_checkpointing": ["STAGE.gradient_checkpointing=true"],
}
"""Trained by each stage. STAGE stands for its key, TIED for a teacher with tied embeddings."""
MORE = {
    "matrix-memory": [MEMORY],
    "hidden-memory": [MEMORY, "STAGE.far_weight=1.0", "STAGE.window_dropout=[0.9, 0.3]"],
    "hidden-decoder_layer": ["STAGE.target=decoder_layer"],
    "end_to_end-sampled": ["STAGE.teacher_targets=sampled", "STAGE.target_size=8"],
    "end_to_end-untied": ["teacher=TIED", "STAGE.untie_head=true"],
    "end_to_end-frozen": ["STAGE.param_groups={backbone: {frozen: true}, embeddings: {frozen: true}}"],
    "hidden-best": [BEST, "checkpoint.save_steps=5", "STAGE.lr=1.0", "STAGE.lr_scheduler=constant"],
    "end_to_end-best": [BEST, "checkpoint.save_steps=5", "STAGE.lr=3.0", "STAGE.lr_scheduler=constant"],  # step 10
}
CASES = {**{f"{stage}-{name}": more for stage in STAGE_NAMES for name, more in VARIANTS.items()}, **MORE}
SIX_ROWS = [f"STAGE.tokens={STEPS * 6 * 32}", "STAGE.batch_size=6", "STAGE.micro_batch_size=1"]
DEEP = ["teacher=DEEP", HYBRID, "data.source=DOCUMENTS", "data.document_masking=true", *SIX_ROWS]
UNEVEN = {
    "matrix-deep": DEEP,
    "hidden-deep": [*DEEP, "STAGE.param_groups={mixer: {lr: 3e-3}, attention_projections: {frozen: true}}"],
}
"""Trained by layers in three processes. DEEP stands for a teacher of six layers, of which stage 2 trains five;
DOCUMENTS for short and long ones, so that some rows have several and some one."""
LAYOUTS = ("one", "ddp", "fsdp", "layers")
REPLICATED = [(a, b) for a in LAYOUTS[:3] for b in LAYOUTS[:3] if a != b]
CHANGES = {
    "hidden-ema": [*REPLICATED, ("one", "layers"), ("layers", "ddp"), ("fsdp", "layers")],
    "end_to_end-lora": REPLICATED,
}
"""Layouts of a run before and after its interruption."""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    stages = {name: {"tokens": STEPS * 4 * 32, "lr": 1e-3, "batch_size": 4} for name in STAGE_NAMES}
    return tiny_recipe(tmp_path_factory.mktemp("run"), stages=stages, checkpoint={"save_steps": 4})


@pytest.fixture(scope="module")
def cases(recipe_path, tmp_path_factory):
    """The case of a name in a layout."""
    directory = tmp_path_factory.mktemp("cases")
    teachers = {"TIED": {"tie_word_embeddings": True}, "DEEP": {"num_hidden_layers": 6}}
    for key, options in teachers.items():
        save_tiny_teacher(directory / key, **options)
    documents = directory / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": sentences(1 + i % 9, i)}) + "\n" for i in range(400)))

    def case(name, layout, run=None, stop_at=None):
        stage = name.partition("-")[0]
        given = [text.replace("STAGE", f"stages.{stage}") for text in {**CASES, **UNEVEN}[name]]
        given = [f"teacher={directory / text[8:]}" if text[8:] in teachers else text for text in given]
        given = [text.replace("DOCUMENTS", str(documents)) for text in given]
        overrides = [f"stages.{other}=null" for other in STAGE_NAMES if other != stage] + given
        return Case(
            str(recipe_path),
            overrides,
            str(directory / f"{name}-{run or layout}"),
            "ddp" if layout == "one" else layout,
            stop_at,
        )

    return case


def layouts(name):
    """Those in which a case is trained."""
    if name == "hidden-best":
        return ("one", "layers")
    # what these change is not in the layers of stages 1 and 2
    return LAYOUTS[:3] if name.startswith("end_to_end") or name.endswith(("tied", "checkpointing")) else LAYOUTS


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory):
    """The result of each case in each layout."""
    found = {(name, layout): cases(name, layout) for name in CASES for layout in layouts(name)}
    train_in_processes([c for (_, layout), c in found.items() if layout != "one"], tmp_path_factory.mktemp("two"))
    for name in CASES:
        train(found[name, "one"])
    return {key: case.result() for key, case in found.items()}


def difference(found, expected):
    """The largest difference of a weight matrix relative to its largest entry."""
    assert found.keys() == expected.keys()
    assert all(w.dtype == torch.float64 for w in found.values())
    return max(float((found[k] - w).abs().max() / w.abs().max().clamp_min(1e-3)) for k, w in expected.items())


def check_equal(found, expected):
    """Weights, and losses and gradient norms of all steps."""
    assert difference(found["weights"], expected["weights"]) < 1e-6
    for curve in ("loss", "grad_norm"):
        assert len(expected[curve]) == STEPS
        assert found[curve] == pytest.approx(expected[curve], rel=1e-6), curve


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in CASES for layout in layouts(name)[1:]])
def test_two_processes_match_one(name, layout, results):
    """The weights after 20 steps of the same global batches, in float64."""
    one, two = results[name, "one"], results[name, layout]
    print(f"{name}, {layout}: {difference(two['weights'], one['weights']):.1e}")
    check_equal(two, one)
    assert two["share"] == 1 if layout == "ddp" else 0.4 < two["share"] < 0.7


@pytest.mark.slow
def test_layers_are_spread_unevenly(cases, tmp_path):
    """The first of three processes trains two of six layers, or of five mixers beside frozen attention."""
    three = {name: cases(name, "layers") for name in UNEVEN}
    train_in_processes([*three.values()], tmp_path, processes=3)
    for name, case in three.items():
        one = cases(name, "one")
        train(one)
        check_equal(case.result(), one.result())
        assert case.result()["share"] == pytest.approx({"matrix-deep": 2 / 6, "hidden-deep": 2 / 5}[name], rel=0.01)


@pytest.mark.slow
def test_a_run_continues_in_another_layout(cases, tmp_path):
    """Interrupted after step 10, continued from the checkpoint of step 8; the optimizer's state holds the average."""
    for name, changes in CHANGES.items():
        whole = cases(name, "one", "whole")
        train(whole)
        runs = {change: [cases(name, layout, "to".join(change)) for layout in change] for change in changes}
        for (first, _), (before, _) in runs.items():
            if first == "one":
                train(before._replace(stop_at=10))
        parallel = [b._replace(stop_at=10) for (first, _), (b, _) in runs.items() if first != "one"]
        parallel += [after for (_, last), (_, after) in runs.items() if last != "one"]
        train_in_processes(parallel, tmp_path)
        for (_, last), (_, after) in runs.items():
            if last == "one":
                train(after)
        for change, (_, after) in runs.items():
            assert difference(after.result()["weights"], whole.result()["weights"]) < 1e-6, (name, change)


def run_command(recipe_path, output, *more):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "subquad.cli"]
    environment = {"OMP_NUM_THREADS": "1"}
    run_python(*torchrun, "distill", recipe_path, "--output", output, *more, environment=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["ddp", *(pytest.param(layout, marks=pytest.mark.sample) for layout in ("fsdp", "layers+fsdp"))]
)
def test_the_command_saves_the_student_of_one_process(layout, recipe_path, tmp_path):
    """All stages in float32. The student loads in a process of its own."""
    sizes = [f"stages.{stage}.tokens=512" for stage in STAGE_NAMES]
    expected = distill(load_recipe(recipe_path, sizes), tmp_path / "one")
    run_command(
        recipe_path, tmp_path / "two", "--parallel", layout, *[text for size in sizes for text in ("--set", size)]
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4, msg=name)
    found = json.loads((tmp_path / "two" / "result.json").read_text())["result"]
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert type(SubquadForCausalLM.from_pretrained(tmp_path / "two")) is SubquadForCausalLM


def test_layouts_need_several_processes(recipe_path, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="got 'rows', expected one of ddp, fsdp, layers"):
        distill(load_recipe(recipe_path), tmp_path / "out", parallel="rows")
    for layout in ("fsdp", "layers"):
        with pytest.raises(UserError, match=f"parallel: got {layout} in one process"):
            distill(load_recipe(recipe_path), tmp_path / "out", parallel=layout)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="got --use_fsdp"):
        distill(load_recipe(recipe_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
