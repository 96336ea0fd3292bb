"""Saving and loading: equal logits in another process, config.json, and checkpoints that do not match it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import subquad
from subquad import SubquadConfig, SubquadForCausalLM
from subquad.utils import UserError
from tests.helpers.processes import run_python
from tests.helpers.students import MIXERS_AND_SOFTMAX, logits, make_student, reloaded
from tests.helpers.teachers import tiny_teacher

# "plain" has untied embeddings, "wide-biased-tied" tied ones.
CASES = [(family, mixer) for family in ("plain", "wide-biased-tied") for mixer in MIXERS_AND_SOFTMAX]
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
    """The directory of all students, and the logits of each in this and in another process."""
    root = tmp_path_factory.mktemp("students")
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, root / "ids.safetensors")
    here = {}
    for family, mixer in CASES:
        teacher = tiny_teacher("plain" if family == "bfloat16" else family)
        if family == "bfloat16":  # loaded in bfloat16: `.to` would also round the rotary frequencies
            teacher.save_pretrained(root.with_suffix(".teacher"))
            teacher = AutoModelForCausalLM.from_pretrained(root.with_suffix(".teacher"), dtype=torch.bfloat16)
        student = make_student(teacher, mixer)
        here[f"{family}-{mixer}"] = logits(student, ids)
        student.save_pretrained(root / f"{family}-{mixer}")
    run_python("-c", IN_ANOTHER_PROCESS, root)
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


@pytest.mark.parametrize("mixer", MIXERS_AND_SOFTMAX)
def test_config_holds_the_teachers_config_and_layer_specs(make_teacher, tmp_path, mixer):
    teacher = make_teacher("qwen2")
    options = {} if mixer == "softmax" else {"short_conv": 2}
    teacher.save_pretrained(tmp_path / "teacher")
    subquad.linearize(teacher, mixer, **options).save_pretrained(tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["model_type"] == "subquad"
    assert written["architectures"] == ["SubquadForCausalLM"]
    assert "import subquad" in written["requires"]
    assert written["layer_specs"] == [{"mixer": mixer, **options}] * 2
    assert written["base_config"]["model_type"] == "qwen2"
    config = AutoConfig.from_pretrained(tmp_path / "student")
    assert type(config) is SubquadConfig
    expected = AutoConfig.from_pretrained(tmp_path / "teacher")
    assert type(config.base_config) is type(expected)
    # the path that a configuration was read from, and by which version, may differ
    ignored = {"_name_or_path", "transformers_version", "architectures"}
    base, own = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config.base_config, expected))
    assert base == own
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (61, 32, 2)
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)
    assert config.layers_with_attention == [mixer == "softmax"] * 2
    with pytest.raises(AttributeError, match="num_experts"):
        _ = config.num_experts


def test_generation_config_is_kept_without_cache_implementation(teacher, tmp_path):
    teacher.generation_config.max_new_tokens = 3
    teacher.generation_config.cache_implementation = "static"
    loaded = reloaded(subquad.linearize(teacher, "gla"), tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generate(torch.tensor([[5, 6]])).shape == (1, 5)
    assert teacher.generation_config.cache_implementation == "static"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_loading_in_another_dtype(teacher, tmp_path, dtype):
    student = make_student(teacher, "gla")
    student.config.base_config.dtype = torch.float32  # as in the configuration of a teacher that was loaded
    loaded = reloaded(student, tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_loading_with_a_device_map(teacher, ids, tmp_path, device_map):
    pytest.importorskip("accelerate")
    student = make_student(teacher, "retnet")
    loaded = reloaded(student, tmp_path, device_map=device_map)
    assert "LlamaDecoderLayer" in loaded._no_split_modules
    found = logits(loaded, ids.to(loaded.device)).cpu()
    assert torch.allclose(found, logits(student, ids), atol=1e-5)


def test_retnet_decay_is_as_published_after_loading(teacher, tmp_path):
    mixer = reloaded(subquad.linearize(teacher, "retnet"), tmp_path).mixer_layers[0].mixer
    core, _ = mixer.op_inputs(torch.zeros(1, 2, 32), None, None, None)
    assert torch.allclose(core["log_decay"][0, 0].exp(), 1 - 2.0 ** (-5 - torch.arange(4.0)))


@pytest.mark.parametrize("mixer", ["gla", "softmax", "gated_deltanet"])
def test_state_dict_loads_into_another_student(teacher, ids, mixer):
    student, other = make_student(teacher, mixer), subquad.linearize(teacher, mixer, copy_qkv=False, seed=9)
    other.load_state_dict(student.state_dict())
    assert torch.equal(logits(other, ids), logits(student, ids))


# ---------------------------------------------------------------------- invalid checkpoints


@pytest.fixture
def checkpoint(teacher, tmp_path):
    """A saved student, and a function that rewrites its weights."""
    make_student(teacher, "gated_deltanet").save_pretrained(tmp_path)

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
def test_checkpoint_with_wrong_keys_or_shapes_is_refused(checkpoint, load, change, message):
    path, rewrite = checkpoint
    rewrite(change)
    with pytest.raises(UserError, match=message):
        load(path)


def update_spec(name, index, **changes):
    return lambda config: config[name][index].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(layer_specs=[{"mixer": "gla"}] * 2), "missing: .*decay_down.weight.*; unexpected: .*"),
        (lambda c: c["layer_specs"].pop(), "layer_specs: got 1 layers, expected 2"),
        (lambda c: c.pop("layer_specs"), "layer_specs: got 0 layers, expected 2"),
        (lambda c: c.pop("attention_specs"), "layer_specs: got 2 layers, expected 0"),
        (lambda c: c.update(layer_specs="gla"), "layer_specs: got 'gla', expected a list of mappings"),
        (lambda c: c.pop("base_config"), "base_config: missing"),
        (lambda c: c["base_config"].pop("model_type"), "base_config: unknown model_type None"),
        (lambda c: c["base_config"].update(model_type="nope"), "base_config: unknown model_type 'nope'"),
        (lambda c: c["layer_specs"][0].pop("mixer"), "layer_specs: 0: unknown mixer None"),
        (update_spec("layer_specs", 1, mixer="gal"), "layer_specs: 1: unknown mixer 'gal'; did you mean 'gla'"),
        (update_spec("layer_specs", 1, foo=3), "unknown mixer option 'foo'"),
        (update_spec("layer_specs", 1, mixer="attention", window="a"), "layer_specs: 1: window: got 'a'"),
        (update_spec("layer_specs", 1, mixer="attention", windw=3), "layer_specs: 1: unknown option 'windw' of attent"),
        (
            update_spec("attention_specs", 1, path="model.nothing"),
            "attention_specs: 1: path: no module 'model.nothing'",
        ),
        (lambda c: c["attention_specs"][0].pop("head_dim"), "attention_specs: 0: missing head_dim"),
        (update_spec("attention_specs", 0, extra=1), "attention_specs: 0: unknown extra"),
    ],
)
def test_invalid_config_is_refused_with_its_key(checkpoint, change, message):
    path, _ = checkpoint
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [lambda whole: whole[: len(whole) // 2], lambda whole: b"xx" * 90], ids=["truncated", "overwritten"]
)
def test_damaged_weights_are_refused(checkpoint, content):
    path, _ = checkpoint
    file = path / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(UserError, match="weights of this student cannot be read"):
        AutoModelForCausalLM.from_pretrained(path)


def test_output_loading_info(checkpoint):
    path, _ = checkpoint
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
