"""Export to GGUF: the tensors in the file, and the model in transformers and llama.cpp."""

import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import subquad
from subquad.export import convert, export
from subquad.export.gguf import check_config, pre_tokenizer_name, token_list
from subquad.modeling.export_target import ExportError
from subquad.utils import UserError
from tests.helpers.exports import (
    IRREGULAR,
    KDA,
    LLAMA3,
    MAMBA2,
    PURE,
    REGULAR,
    needs_group_norm,
    saved_student,
    student_of,
)
from tests.helpers.llama_cpp import log_probabilities, needs_llama_cpp, run
from tests.helpers.ops import error
from tests.helpers.students import logits

PRECISION = {"f32": 1e-5, "f16": 1e-2, "q8_0": 0.2}
"""Relative errors of the logits. Random weights amplify rounding; those of a trained student are smaller."""
SENTENCE = "The old fox sees the small river.\n\nThe  red stone 123 is near."


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Directories with a saved student and its GGUF file, by the name of its layer types."""
    directories = {}
    for name, layers in (("pure", PURE), ("regular", REGULAR), ("irregular", IRREGULAR)):
        directory = tmp_path_factory.mktemp(name)
        saved_student(directory, layers, max_position_embeddings=512)
        export(directory / "student", directory / "student.gguf", "gguf", "f32")
        directories[name] = directory
    return directories


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.mark.parametrize("layer_types", ["pure", "regular", "irregular"])
def test_file_has_every_tensor_in_llama_cpps_form(layer_types, students):
    directory = students[layer_types]
    student, _ = subquad.load_teacher(directory / "student")
    weights = {name: t.numpy() for name, t in convert(student, "qwen3_5").state_dict().items()}
    fields, tensors, _ = read(directory / "student.gguf")
    linear = next(i for i, keep in enumerate(student.config.layers_with_attention) if not keep)
    prefix = f"model.layers.{linear}.linear_attn."
    assert np.allclose(tensors[f"blk.{linear}.ssm_a"], -np.exp(weights[prefix + "A_log"]), rtol=1e-6)
    assert np.array_equal(tensors[f"blk.{linear}.ssm_dt.bias"], weights[prefix + "dt_bias"])
    assert np.array_equal(tensors[f"blk.{linear}.ssm_conv1d.weight"], weights[prefix + "conv1d.weight"][:, 0])
    assert np.array_equal(tensors[f"blk.{linear}.ssm_norm.weight"], weights[prefix + "norm.weight"])
    assert np.array_equal(tensors[f"blk.{linear}.attn_qkv.weight"], weights[prefix + "in_proj_qkv.weight"])
    assert np.allclose(tensors["output_norm.weight"], weights["model.norm.weight"] + 1)
    assert np.array_equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert len(tensors) == len(weights)
    assert sum(t.size for t in tensors.values()) == sum(w.size for w in weights.values())
    assert fields["general.architecture"] == "qwen35"
    placement = [fields.get("qwen35.full_attention_interval"), fields.get("qwen35.attention.recurrent_layers")]
    expected = {"pure": [5, None], "regular": [2, None], "irregular": [None, [False, True, True, False]]}
    assert placement == expected[layer_types]


@pytest.mark.parametrize("number_type", PRECISION)
@pytest.mark.parametrize("layer_types", ["pure", "regular"])
def test_transformers_loads_the_file_with_the_same_logits(layer_types, number_type, students):
    directory = students[layer_types]
    student, tokenizer = subquad.load_teacher(directory / "student")
    if not (directory / f"{number_type}.gguf").exists():
        export(directory / "student", directory / f"{number_type}.gguf", "gguf", number_type)
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=f"{number_type}.gguf", dtype=torch.float32
    ).eval()
    assert type(loaded).__name__ == "Qwen3_5ForCausalLM"
    ids = torch.randint(3, 300, (2, 50), generator=torch.Generator().manual_seed(3))
    assert error(logits(loaded, ids), logits(student, ids)) < PRECISION[number_type]
    loaded_tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=f"{number_type}.gguf")
    assert loaded_tokenizer(SENTENCE).input_ids == tokenizer(SENTENCE).input_ids
    assert loaded_tokenizer.eos_token_id == tokenizer.eos_token_id


def test_norms_gates_and_convolutions_stay_in_float32(students):
    directory = students["regular"]
    export(directory / "student", directory / "small.gguf", "gguf", "q8_0")
    _, _, types = read(directory / "small.gguf")
    assert types["blk.0.attn_qkv.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 48 numbers are not whole blocks
    assert {
        types[f"blk.0.{name}"] for name in ("ssm_a", "ssm_beta.weight", "ssm_conv1d.weight", "attn_norm.weight")
    } == {"F32"}


@needs_llama_cpp
def test_q4_k_is_of_whole_blocks_and_runs_in_llama_cpp(tmp_path):
    """Rows of 256 numbers; llama.cpp's log probabilities are those of the dequantized weights in `transformers`."""
    saved_student(tmp_path, REGULAR, hidden_size=256, head_dim=64, initializer_range=0.05)
    export(tmp_path / "student", tmp_path / "student.gguf", "gguf", "q4_k")
    _, _, types = read(tmp_path / "student.gguf")
    assert types["blk.0.attn_qkv.weight"] == types["blk.0.ssm_out.weight"] == "Q4_K"
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 48
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ssm_beta.weight"] == types["blk.0.ssm_a"] == "F32"
    student, tokenizer = subquad.load_teacher(tmp_path / "student")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="student.gguf", dtype=torch.float32).eval()
    prompt = tokenizer(SENTENCE).input_ids
    expected, exact = (logits(model, torch.tensor([prompt]))[0, -1].log_softmax(-1) for model in (quantized, student))
    assert 0.01 < error(expected, exact) < 0.2
    (answer,) = run(tmp_path / "student.gguf", [prompt], 1, probabilities=300)
    found = {step["id"]: step["logprob"] for step in answer["completion_probabilities"][0]["top_logprobs"]}
    near = torch.tensor([found[i] for i in range(1, 300)])  # 0 ends the text
    assert error(near.log_softmax(-1), expected[1:].log_softmax(-1)) < 0.05


def test_q4_k_without_ggml_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    saved_student(tmp_path, PURE, hidden_size=256)
    with pytest.raises(UserError, match="q4_k needs ggml's quantizer"):
        export(tmp_path / "student", tmp_path / "student.gguf", "gguf", "q4_k")


@needs_llama_cpp
@pytest.mark.parametrize("layer_types", ["pure", "regular", "irregular"])
def test_llama_cpp_generates_the_same_tokens(layer_types, students):
    directory = students[layer_types]
    assert_llama_cpp_equals(*subquad.load_teacher(directory / "student"), directory / "student.gguf")


def assert_llama_cpp_equals(student, tokenizer, path):
    """32 greedy tokens and their log probabilities, and the tokens of a second turn and of another text after the same
    beginning, for which the server keeps its cache (`cache_prompt`)."""
    prompt = tokenizer(SENTENCE).input_ids
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # llama.cpp does not generate the end of text here
    options["suppress_tokens"] = [tokenizer.eos_token_id]
    prompts = [prompt, [*prompt, *range(40, 60)], [*prompt[:-4], *range(70, 90)]]
    answers = run(path, prompts, 32)
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer["tokens"] == student.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    text = torch.tensor([[*prompt, *answers[0]["tokens"]]])
    full = logits(student, text)[0, len(prompt) - 1 : -1].log_softmax(-1)
    found = log_probabilities(answers[0])
    assert len(found) > 8
    assert max(abs(value - full[i, answers[0]["tokens"][i]].item()) for i, value in found) < 1e-4


GRANITE = {
    "pure": (MAMBA2, {"hidden_size": 64}),  # mixers of twice the hidden size, as llama.cpp has them
    "hybrid-filled-up": ({**MAMBA2, "0,3": "attention"}, {"hidden_size": 128, "tie_word_embeddings": True}),
}


@needs_llama_cpp
@needs_group_norm
@pytest.mark.parametrize("case", GRANITE)
def test_llama_cpp_generates_the_tokens_of_a_mamba2_student(case, tmp_path):
    layers, changes = GRANITE[case]
    student, tokenizer = subquad.load_teacher(
        saved_student(tmp_path, layers, "granite_hybrid", max_position_embeddings=512, **changes)
    )
    export(tmp_path / "student", tmp_path / "student.gguf", "gguf", "f32")
    fields, _, _ = read(tmp_path / "student.gguf")
    assert fields["general.architecture"] == "granitehybrid"
    assert fields["granitehybrid.ssm.inner_size"] == 2 * changes["hidden_size"]
    assert fields["granitehybrid.ssm.group_count"] * 32 == 2 * changes["hidden_size"]
    assert_llama_cpp_equals(student, tokenizer, tmp_path / "student.gguf")


@needs_llama_cpp
@pytest.mark.parametrize("tied", [False, True])
def test_llama_cpp_generates_the_tokens_of_a_kda_student(tied, tmp_path):
    directory = saved_student(tmp_path, KDA, "kimi_linear", max_position_embeddings=512, tie_word_embeddings=tied)
    export(directory, tmp_path / "student.gguf", "gguf", "f32")
    fields, tensors, _ = read(tmp_path / "student.gguf")
    assert fields["general.architecture"] == "kimi-linear"
    assert fields["kimi-linear.attention.head_count_kv"] == [0, 0, 0, 0, 1]
    assert not any(tensors[name].any() for name in tensors if name.startswith("blk.4."))
    assert_llama_cpp_equals(*subquad.load_teacher(directory), tmp_path / "student.gguf")


def test_decays_gates_and_convolutions_of_kda_stay_in_float32(tmp_path):
    export(saved_student(tmp_path, KDA, "kimi_linear"), tmp_path / "small.gguf", "gguf", "q8_0")
    _, _, types = read(tmp_path / "small.gguf")
    assert types["blk.0.attn_q.weight"] == types["blk.0.ssm_g_a.weight"] == "Q8_0"
    names = ("a", "dt.bias", "f_a.weight", "f_b.weight", "beta.weight", "norm.weight", "conv1d_q.weight")
    assert {types[f"blk.0.ssm_{name}"] for name in names} == {"F32"}


@needs_group_norm
def test_mixers_wider_than_those_of_llama_cpp_are_refused(tmp_path):
    saved_student(tmp_path, MAMBA2, "granite_hybrid")
    with pytest.raises(ExportError, match=r"128 channels in heads of 32; llama\.cpp expects 64, or fewer"):
        export(tmp_path / "student", tmp_path / "student.gguf", "gguf")


@needs_llama_cpp
def test_llama_cpp_tokenizes_the_same_way(students):
    directory = students["pure"]
    _, tokenizer = subquad.load_teacher(directory / "student")
    ids = tokenizer(SENTENCE).input_ids
    of_text, of_tokens = run(directory / "student.gguf", [SENTENCE, ids], 8)
    assert of_text["tokens_evaluated"] == len(ids)
    assert of_text["tokens"] == of_tokens["tokens"]


def test_rope_type_that_llama_cpp_cannot_read_is_refused(tmp_path):
    saved_student(tmp_path, REGULAR, rope_parameters=LLAMA3)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match="rope_type: got 'llama3'"):
        export(tmp_path / "student", tmp_path / "student.gguf", "gguf")
    assert sorted(tmp_path.iterdir()) == before


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(expression):
    splitter = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [splitter, {**BYTES, "use_regex": False}]}


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, "smollm"),
        (split(QWEN2), "qwen2"),
        (split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "llama-bpe"),
        (split(QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\p{L}\p{N}]+", r"\p{L}\p{M}\p{N}]+")), "qwen35"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pre_tokenizer_name(pre, name):
    assert pre_tokenizer_name(pre) == name


@pytest.mark.parametrize(
    ("pre", "reason"),
    [
        (None, "by nothing"),
        ({"type": "Metaspace"}, "by Metaspace"),
        ({**BYTES, "add_prefix_space": True}, "by ByteLevel"),
        ({"type": "Sequence", "pretokenizers": [{**DIGITS, "individual_digits": False}, BYTES]}, "unknown settings"),
        (split("a|b"), "by Split and ByteLevel"),
    ],
    ids=lambda value: "",
)
def test_unknown_pre_tokenizer_is_refused(pre, reason):
    with pytest.raises(ExportError, match=f"tokenizer: .*{reason}"):
        pre_tokenizer_name(pre)


def test_embedding_rows_without_a_token_get_an_unused_one():
    spec = {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [
            {"id": 2, "content": "<s>", "special": True},
            {"id": 4, "content": "<think>", "special": False},
        ],
    }
    tokens, types = token_list(spec, 6)
    assert tokens == ["a", "b", "<s>", "[UNUSED3]", "<think>", "[UNUSED5]"]
    assert types == [1, 1, 3, 5, 4, 5]
    with pytest.raises(ExportError, match=r"token id 4, .* 3 rows"):
        token_list(spec, 3)


def test_linear_rope_scaling_is_in_the_file(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    saved_student(tmp_path, REGULAR, rope_parameters=rope)
    export(tmp_path / "student", tmp_path / "student.gguf", "gguf", "f32")
    fields, _, _ = read(tmp_path / "student.gguf")
    assert fields["qwen35.rope.scaling.type"] == "linear"
    assert fields["qwen35.rope.scaling.factor"] == 4.0
    assert fields["qwen35.rope.freq_base"] == 5000.0


def test_value_size_other_than_key_size_is_refused():
    model = convert(student_of(), "qwen3_5")
    model.config.linear_value_head_dim = 8
    with pytest.raises(ExportError, match="linear_value_head_dim: got 8"):
        check_config(model.config)
