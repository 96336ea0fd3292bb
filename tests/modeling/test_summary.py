"""`subquad inspect`: cache sizes and parameters match real students; ranges of layers; the model card."""

import json

import pytest
import torch
import yaml

import subquad
from subquad.modeling.cache import cache_bytes
from subquad.modeling.summary import cache_sizes, layer_ranges, meta_model, model_card, read_config, summary
from subquad.modeling.teachers import read_license
from subquad.utils import UserError
from tests.helpers.architectures import LAYER_TYPES, cached_student, cached_teacher
from tests.helpers.students import MIXERS_AND_SOFTMAX, logits, make_student


def kv_bytes(teacher, ids):
    """Bytes of the keys and values that `transformers` caches."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in teacher(ids, use_cache=True).past_key_values.layers)


@pytest.mark.parametrize(
    "mixer", [*MIXERS_AND_SOFTMAX, {"mixer": "xlstm", "state_heads": "key_value", "state_dtype": "bfloat16"}], ids=str
)
def test_cache_bytes_and_parameters_match_a_real_student(make_teacher, ids, mixer):
    teacher = make_teacher("wide-biased-tied")
    model = make_student(teacher, layer_types={"default": mixer})
    cache = model.new_cache()
    logits(model, ids[:1], past_key_values=cache)
    meta = meta_model(model.config)
    assert cache_sizes(meta, 11) == (cache_bytes(cache), kv_bytes(teacher, ids[:1]))
    assert meta.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("layer_types", LAYER_TYPES)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_bigcode", "gpt_oss"])
def test_cache_bytes_with_windows_and_grouped_heads(name, layer_types):
    model, ids = cached_student(name, layer_types), torch.randint(3, 61, (1, 21))
    cache = model.new_cache()
    logits(model, ids, past_key_values=cache)
    expected = cache_bytes(cache), kv_bytes(cached_teacher(name), ids)
    assert cache_sizes(meta_model(model.config), 21) == expected


def test_cache_bytes_in_bfloat16(teacher, tmp_path):
    make_student(teacher.to(torch.bfloat16), "softmax").save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert cache_sizes(meta_model(config), 10) == (2 * 10 * 2 * (8 + 8) * 2,) * 2
    assert "bfloat16" in summary(config)


def test_equal_adjacent_layers_are_merged(make_teacher):
    teacher = make_teacher(num_hidden_layers=6)
    model = subquad.linearize(
        teacher, layer_types={"default": "gla", "2": "attention", "4,5": {"mixer": "gla", "decay_rank": 2}}
    )
    labels = [label for label, _ in layer_ranges(model.config)]
    assert labels == ["0-1", "2", "3", "4-5"]
    text = summary(model.config)
    assert "  0-1  gla\n  2    attention\n  3    gla\n  4-5  gla (decay_rank=2)\n" in text
    assert text.count(" half_life=") == 2


def test_learned_positions_are_shown():
    assert "learned positions: at most 64 tokens" in summary(cached_student("gpt2", "retnet").config)
    assert "64 learned positions" in model_card(cached_student("gpt2", "retnet").config, "gpt2")


def test_directory_without_a_student_is_refused(teacher, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path)
    teacher.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="llama"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


CARDS = {
    "---\nlicense: mit\ntags: [a]\n---\n# A model\n": {"license": "mit"},
    "---\nlicense: other\nlicense_name: own\nlicense_link: L\n---\n": {
        "license": "other",
        "license_name": "own",
        "license_link": "L",
    },
    "# A model\n": {},
    "---\nlicense: [\n---\n": {},
    None: {},
}


@pytest.mark.parametrize("text", CARDS, ids=["mit", "other", "no metadata", "not YAML", "no card"])
def test_the_card_states_the_license_of_the_teacher(text, teacher, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    config, expected = make_student(teacher).config, CARDS[text]
    card = model_card(config, str(tmp_path))
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected
    assert (
        (f"license ({list(expected.values())[len(expected) > 1]})" in card) if expected else "license applies" in card
    )
    if not expected:
        config.base_config.license = "bsd"
        assert yaml.safe_load(model_card(config, str(tmp_path)).split("---\n")[1])["license"] == "bsd"


def test_the_license_of_bundled_teachers():
    assert read_license("nano") == read_license("smollm2-135m") == {"license": "apache-2.0"}
