"""Devices and dtypes of models, with faked numbers of GPUs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from subquad.cli import main
from subquad.config import load_recipe
from subquad.distill import pipeline
from subquad.distill.pipeline import distill
from subquad.distill.teacher_checks import teacher_placement
from subquad.distill.training_arguments import training_arguments
from subquad.evaluate.runner import load_eval_model
from subquad.modeling.placement import Placement, find_device
from subquad.modeling.teachers import load_placed
from subquad.utils import UserError
from tests.helpers.architectures import build_teacher
from tests.helpers.recipes import tiny_recipe
from tests.helpers.students import make_student


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("placement"))


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs torch says that it finds."""

    def fake(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return fake


@pytest.mark.parametrize(
    ("count", "name", "rank", "expected"),
    [
        (0, "auto", None, "cpu"),
        (2, "auto", None, "cuda:0"),
        (2, "cpu", "1", "cpu"),
        (8, "auto", "5", "cuda:5"),  # each process of torchrun has its own
        (8, "cuda", "5", "cuda:5"),
        (8, "cuda:3", "5", "cuda:3"),
    ],
)
def test_each_process_finds_its_device(gpus, monkeypatch, count, name, rank, expected):
    gpus(count)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert find_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (0, "cuda", "device: got 'cuda', but torch .* finds no GPU; expected auto or cpu"),
        (0, "gpu", "device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
        (2, "cuda:2", "device: GPU 2 needs more than the 2 GPUs"),
        (2, "tpu", "device: got 'tpu'"),
    ],
)
def test_devices_that_there_are_not(gpus, count, name, message):
    gpus(count)
    with pytest.raises(UserError, match=message):
        find_device(name)


def test_more_processes_than_gpus(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="device: process 2 needs more than the 2 GPUs"):
        find_device()


@pytest.mark.parametrize(
    ("count", "changes", "expected"),
    [
        (0, {}, Placement("cpu", "float32")),
        (0, {"precision": "bfloat16"}, Placement("cpu", "float32")),
        (2, {"precision": "bfloat16"}, Placement("cuda:1", "bfloat16")),
        (2, {}, Placement("cuda:1", "float32")),
        (2, {"device": "cpu", "precision": "bfloat16", "teacher_dtype": "bfloat16"}, Placement("cpu", "bfloat16")),
        (0, {"attn_implementation": "eager"}, Placement("cpu", "float32", "eager")),
    ],
)
def test_teacher_of_a_recipe(gpus, monkeypatch, recipe_path, count, changes, expected):
    gpus(count)
    monkeypatch.setenv("LOCAL_RANK", "1")
    recipe = load_recipe(recipe_path, [f"{key}={value}" for key, value in changes.items()])
    assert teacher_placement(recipe) == expected


def test_one_process_does_not_split_batches_over_several_gpus(gpus, recipe_path, tmp_path):
    """`Trainer` would wrap the student in DataParallel if it saw two."""
    recipe = load_recipe(recipe_path, ["device=cpu"])
    gpus(2)
    arguments = training_arguments(recipe, recipe.stages.end_to_end, tmp_path, "run")
    assert arguments.n_gpu <= 1
    assert arguments.device.type == "cpu"


def test_weights_have_the_dtype_and_attention_that_are_named(recipe_path):
    teacher, _ = load_placed(recipe_path.parent / "teacher", Placement(dtype="bfloat16", attn_implementation="eager"))
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert teacher.config._attn_implementation == "eager"
    plain, other = (
        load_eval_model(str(recipe_path.parent / "teacher"), None, p) for p in (None, Placement("cpu", "bfloat16"))
    )
    assert plain.key != other.key  # stored outcomes of one are not those of the other


@pytest.mark.usefixtures("own_cache")
def test_a_bfloat16_teacher_gives_a_float32_student(recipe_path, tmp_path):
    plain = distill(load_recipe(recipe_path), tmp_path / "plain")
    result = distill(
        load_recipe(recipe_path, ["precision=bfloat16", "teacher_dtype=bfloat16", "attn_implementation=eager"]),
        tmp_path / "bf16",
    )
    assert {x.dtype for x in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.float32}
    assert result["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)
    assert result["perplexity"] != plain["perplexity"]


@pytest.mark.usefixtures("own_cache")
def test_processes_are_joined_before_the_teacher_is_loaded(recipe_path, tmp_path, monkeypatch):
    """Otherwise every process of torchrun would put its teacher on the first GPU."""
    calls = []
    monkeypatch.setattr(pipeline, "start_processes", lambda recipe, parallel: calls.append("processes"))

    def load(reference, placement):
        calls.append(placement)
        raise UserError("enough")

    monkeypatch.setattr(pipeline, "load_placed", load)
    with pytest.raises(UserError, match="enough"):
        distill(load_recipe(recipe_path), tmp_path / "run")
    assert calls == ["processes", Placement("cpu", "float32")]


def test_commands_take_devices_and_dtypes(recipe_path, tmp_path, capsys):
    teacher = str(recipe_path.parent / "teacher")
    assert main(["linearize", teacher, "--mixer", "gla", "--dtype", "bfloat16", "-o", str(tmp_path / "s")]) == 0
    assert {x.dtype for x in load_file(tmp_path / "s" / "model.safetensors").values()} == {torch.bfloat16}
    assert (
        main(["generate", str(tmp_path / "s"), "The", "--tokens", "3", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    )
    for command in (["generate", teacher, "x"], ["eval", teacher], ["linearize", teacher, "-o", str(tmp_path / "n")]):
        assert main([*command, "--device", "cuda:7"]) == 2
        assert "device: " in capsys.readouterr().err
    assert not (tmp_path / "n").exists()
    argv = ["eval", str(tmp_path / "s"), "--suite", "language", "--dtype", "bfloat16", "--attn", "eager", "--json"]
    assert main([*argv, "--teacher", teacher, "--corpus", str(recipe_path.parent / "text.txt")]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == {}


@torch.no_grad()
def test_flash_attention_gets_no_masks(monkeypatch):
    """It takes masks of two dimensions only: padding, and tokens after a cache, are left to sdpa."""
    student = make_student(build_teacher("llama"), layer_types={"default": "gla", "1": "attention"}).eval()
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def outputs():
        cache = student.new_cache()
        pieces = [student(piece, past_key_values=cache).logits for piece in ids.split([5, 4, 1], 1)]
        return torch.cat([*pieces, student(ids, attention_mask=mask, use_cache=False).logits], 1)

    expected, masks = outputs(), []

    def flash(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    monkeypatch.setattr(student.mixer_layers[1].config, "_attn_implementation_internal", "flash_attention_2")
    assert torch.allclose(outputs(), expected, atol=1e-5)
    assert masks == [None, None]  # of the first tokens and of the last
