"""Students on disk: the same numbers in another process, and no checkpoint that does not match its plan."""

import json
import subprocess
import sys

import pytest
import torch
from modeling_cases import ALL, logits, student_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import subquad
from subquad import SubquadConfig, SubquadForCausalLM
from subquad.utils import UserError

# plain is untied, the other tied; bfloat16 must come back as what it was
CASES = [(family, mixer) for family in ("plain", "wide-biased-tied") for mixer in ALL]
CASES += [("bfloat16", mixer) for mixer in ("gla", "gated_deltanet", "softmax")]

IN_ANOTHER_PROCESS = """
import sys
sys.modules["fla"] = None
from pathlib import Path
import torch
torch.set_num_threads(1)
import subquad
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
found = {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    torch.manual_seed(hash(folder) % 1000)
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert type(student).__name__ == "SubquadForCausalLM" and not student.training
    with torch.no_grad():
        found[folder.name] = student(input_ids=ids).logits
save_file(found, root / "logits.safetensors")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of all students, and the logits of each here and in another process."""
    from tests.conftest import tiny_teacher

    root = tmp_path_factory.mktemp("students")
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, root / "ids.safetensors")
    here = {}
    for family, mixer in CASES:
        teacher = tiny_teacher("plain" if family == "bfloat16" else family)
        if family == "bfloat16":  # loaded as such: `.to` would round the frequencies of the rotary embedding too
            teacher.save_pretrained(root.with_suffix(".teacher"))
            teacher = AutoModelForCausalLM.from_pretrained(root.with_suffix(".teacher"), dtype=torch.bfloat16)
        student = student_of(teacher, mixer)
        here[f"{family}-{mixer}"] = logits(student, ids)
        student.save_pretrained(root / f"{family}-{mixer}")
    run = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(root)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return root, here, load_file(root / "logits.safetensors")


@pytest.mark.parametrize(("family", "mixer"), CASES, ids=["-".join(case) for case in CASES])
def test_new_process_gives_the_same_logits(saved, family, mixer):
    root, here, there = saved
    name = f"{family}-{mixer}"
    assert there[name].dtype == (torch.bfloat16 if family == "bfloat16" else torch.float32)
    assert torch.equal(there[name], here[name])
    files = sorted(p.name for p in (root / name).iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    stored = load_file(root / name / "model.safetensors")
    assert ("base.lm_head.weight" in stored) == (family != "wide-biased-tied")


@pytest.mark.parametrize("mixer", ALL)
def test_configuration_holds_the_teachers_unchanged_and_the_plan(make_teacher, tmp_path, mixer):
    teacher = make_teacher("qwen2")
    options = {} if mixer == "softmax" else {"short_conv": 2}
    teacher.save_pretrained(tmp_path / "teacher")
    subquad.linearize(teacher, mixer, **options).save_pretrained(tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["model_type"] == "subquad"
    assert written["architectures"] == ["SubquadForCausalLM"]
    assert written["layer_specs"] == [{"mixer": mixer, **options}] * 2
    assert written["base_config"]["model_type"] == "qwen2"
    config = AutoConfig.from_pretrained(tmp_path / "student")
    assert type(config) is SubquadConfig
    expected = AutoConfig.from_pretrained(tmp_path / "teacher")
    assert type(config.base_config) is type(expected)
    # where a configuration was read from and by which version is no part of it
    ignored = {"_name_or_path", "transformers_version", "architectures"}
    base, own = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config.base_config, expected))
    assert base == own
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (61, 32, 2)
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)
    assert config.keeps_attention == [mixer == "softmax"] * 2
    with pytest.raises(AttributeError, match="no attribute 'num_experts'"):
        _ = config.num_experts


def test_generation_settings_of_the_teacher_are_kept_without_its_cache(teacher, tmp_path):
    teacher.generation_config.max_new_tokens = 3
    teacher.generation_config.cache_implementation = "static"
    student = subquad.linearize(teacher, "gla")
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generate(torch.tensor([[5, 6]])).shape == (1, 5)
    assert teacher.generation_config.cache_implementation == "static"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_loading_in_another_dtype(teacher, tmp_path, dtype):
    student_of(teacher, "gla").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_loading_with_a_device_map(teacher, ids, tmp_path, device_map):
    pytest.importorskip("accelerate")
    student = student_of(teacher, "retnet")
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert "LlamaDecoderLayer" in loaded._no_split_modules
    found = logits(loaded, ids.to(loaded.device)).cpu()
    assert torch.allclose(found, logits(student, ids), atol=1e-5)


def test_retnet_forgets_as_published_right_after_loading(teacher, tmp_path):
    subquad.linearize(teacher, "retnet").save_pretrained(tmp_path)
    mixer = AutoModelForCausalLM.from_pretrained(tmp_path).mixer_layers[0].mixer
    core, _ = mixer.op_inputs(torch.zeros(1, 2, 32), None, None, None)
    assert torch.allclose(core["log_decay"][0, 0].exp(), 1 - 2.0 ** (-5 - torch.arange(4.0)))


@pytest.mark.parametrize("mixer", ["gla", "softmax", "gated_deltanet"])
def test_state_dict_goes_back_and_forth(teacher, ids, mixer):
    student, other = student_of(teacher, mixer), subquad.linearize(teacher, mixer, copy_qkv=False, seed=9)
    other.load_state_dict(student.state_dict())
    assert torch.equal(logits(other, ids), logits(student, ids))


# ---------------------------------------------------------------------- checkpoints that do not match


@pytest.fixture
def checkpoint(teacher, tmp_path):
    """A saved student, and a function that rewrites its weights."""
    student_of(teacher, "gated_deltanet").save_pretrained(tmp_path)

    def rewrite(change):
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    return tmp_path, rewrite


GATE = "base.model.layers.1.self_attn.mixer.A_log"


@pytest.mark.parametrize(
    "load", [AutoModelForCausalLM.from_pretrained, SubquadForCausalLM.from_pretrained], ids=["auto", "own class"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(GATE), f"missing: {GATE}$"),
        (lambda w: w.update({"base.extra": torch.ones(2)}), "unexpected: base.extra$"),
        (lambda w: w.update({GATE: torch.ones(7)}), rf"wrong shape: {GATE} \[7\] for \[4\]"),
        (lambda w: w.update({GATE + "s": w.pop(GATE)}), f"missing: {GATE}; unexpected: {GATE}s$"),
        (lambda w: [w.pop(k) for k in list(w) if "layers.1" in k], "missing: base.model.layers.1.* and .* more"),
    ],
    ids=["missing", "unexpected", "size", "renamed", "a layer"],
)
def test_checkpoint_that_does_not_match_is_refused_by_its_keys(checkpoint, load, change, message):
    path, rewrite = checkpoint
    rewrite(change)
    with pytest.raises(UserError, match=message):
        load(path)


def test_checkpoint_of_another_mixer_is_refused(checkpoint):
    path, _ = checkpoint
    config = json.loads((path / "config.json").read_text())
    config["layer_specs"] = [{"mixer": "gla"}] * 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"missing: .*decay_down.weight.*; unexpected: .*"):
        AutoModelForCausalLM.from_pretrained(path)


def test_plan_of_another_length_is_refused(checkpoint):
    path, _ = checkpoint
    config = json.loads((path / "config.json").read_text())
    config["layer_specs"] = config["layer_specs"][:1]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="layer_specs: got 1 layers, expected 2"):
        AutoModelForCausalLM.from_pretrained(path)


def entry(name, index, **changes):
    return lambda config: config[name][index].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("layer_specs"), "layer_specs: got 0 layers, expected 2"),
        (lambda c: c.pop("attention_specs"), "layer_specs: got 2 layers, expected 0"),
        (lambda c: c.update(layer_specs="gla"), "layer_specs: got 'gla', expected a list of mappings"),
        (lambda c: c.pop("base_config"), "base_config: missing; expected the configuration of the teacher"),
        (lambda c: c["base_config"].pop("model_type"), "base_config: unknown model_type None"),
        (lambda c: c["base_config"].update(model_type="nope"), "base_config: unknown model_type 'nope'"),
        (lambda c: c["layer_specs"][0].pop("mixer"), "layer_specs: 0: unknown mixer None"),
        (entry("layer_specs", 1, mixer="gal"), "layer_specs: 1: unknown mixer 'gal'; did you mean 'gla'"),
        (entry("layer_specs", 1, foo=3), "unknown mixer option 'foo'"),
        (entry("layer_specs", 1, mixer="attention", window="a"), "layer_specs: 1: window: got 'a'"),
        (entry("layer_specs", 1, mixer="attention", windw=3), "layer_specs: 1: unknown option 'windw' of attention"),
        (
            entry("attention_specs", 1, path="model.nothing"),
            "attention_specs: 1: path: no module 'model.nothing'",
        ),
        (
            lambda c: c["attention_specs"][0].pop("head_dim"),
            "attention_specs: 0: missing head_dim",
        ),
        (entry("attention_specs", 0, extra=1), "attention_specs: 0: unknown extra"),
    ],
)
def test_broken_configuration_is_one_line_that_says_where(checkpoint, change, message):
    path, _ = checkpoint
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [lambda whole: whole[: len(whole) // 2], lambda whole: b"xx" * 90], ids=["cut", "x"]
)
def test_broken_weights_are_told(checkpoint, content):
    path, _ = checkpoint
    file = path / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(UserError, match="the weights of this student cannot be read"):
        AutoModelForCausalLM.from_pretrained(path)


def test_loading_information_is_given_where_asked_for(checkpoint):
    path, _ = checkpoint
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
