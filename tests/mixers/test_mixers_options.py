"""The registry of mixers, and invalid options."""

import subprocess
import sys
from pathlib import Path

import pytest

from subquad import mixers
from subquad.utils import UserError
from tests.helpers.mixers import SPECS

ALL = ["linear_attention", "retnet", "mamba2", "gla", "metala", "deltanet", "gated_deltanet", "xlstm", "kda", "hgrn2"]
STUB_PACKAGE = """
import sys, types
package = types.ModuleType("subquad")
package.__path__ = [sys.argv[1]]
sys.modules["subquad"] = package
from subquad.mixers import ATTENTION, OPTIONS, SOFTMAX, AttentionSpec, names
from subquad.mixers.options import find_options
find_options("gla").from_dict({"half_life": 8})
assert not {"torch", "transformers"} & sys.modules.keys()
from subquad.mixers import get
assert get("gla").Options is OPTIONS["gla"]
"""


def test_options_import_no_torch():
    root = Path(mixers.__file__).parents[1]
    subprocess.run([sys.executable, "-c", STUB_PACKAGE, root], check=True)


def test_registry_and_options_describe_the_same_mixers():
    assert list(mixers.MIXERS) == list(mixers.OPTIONS)
    assert all(mixers.MIXERS[name].Options is options for name, options in mixers.OPTIONS.items())
    assert all("arXiv" in options.source for options in mixers.OPTIONS.values())


def test_names_and_classes():
    assert mixers.names() == [*ALL, "softmax"]
    for name in ALL:
        assert mixers.get(name).name == name
        assert type(mixers.create(name, SPECS["plain"])) is mixers.get(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated_delta_net", "'gated_delta_net'.*'gated_deltanet'"),
        ("GLA", "'GLA'.*'gla'"),
        ("mamba", "'mamba'.*'mamba2'"),
        ("softmx", "'softmx'.*'softmax'"),
        ("perceiver", ", ".join(mixers.names())),
    ],
)
def test_unknown_mixer_names_the_nearest_or_all(name, message):
    with pytest.raises(UserError, match=message):
        mixers.get(name)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_convolution": 4}, "'short_convolution'; did you mean 'short_conv'"),
        ({"qk_activation": "sillu"}, "qk_activation: got 'sillu'; did you mean 'silu'"),
        ({"output_gate": "swich"}, "output_gate: got 'swich'; did you mean 'swish'"),
        ({"output_gate": None}, "output_gate: got None"),
        ({"state_heads": "key-value"}, "state_heads: got 'key-value'; did you mean 'key_value'"),
        ({"state_dtype": "float16"}, "state_dtype: got 'float16'; did you mean 'bfloat16'"),
        ({"expand_k": 0}, "expand_k: got 0, expected a positive, finite number"),
        ({"expand_k": 1.3}, "expand_k: got 1.3, expected a multiple of 1/8"),
        ({"short_conv": 1}, "short_conv: got 1"),
        ({"short_conv": -4}, "short_conv: got -4"),
        ({"short_conv": 2.5}, "short_conv: got 2.5, expected an integer"),
        ({"short_conv": True}, "short_conv: got True, expected an integer"),
        ({"rotary": "yes"}, "rotary: got 'yes', expected true or false"),
        ({"rotary": 1}, "rotary: got 1, expected true or false"),
        ({"output_norm": 0}, "output_norm: got 0"),
        ({"half_life": "long"}, "half_life: got 'long', expected a number"),
        ({"half_life": 0}, "half_life: got 0"),
        ({"half_life": -3.0}, "half_life: got -3.0"),
        ({"half_life": float("nan")}, "half_life: got nan"),
        ({"half_life": float("inf")}, "half_life: got inf"),
        ({"longest_half_life": -1.0}, "longest_half_life: got -1.0, expected 0 or a finite number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_invalid_option(name, options, message):
    for option in {"half_life", "longest_half_life"} & options.keys():
        message = message if hasattr(mixers.OPTIONS[name], option) else f"unknown mixer option {option!r}"
    with pytest.raises(UserError, match=message):
        mixers.create(name, SPECS["plain"], **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba2", {"discretization": "zho"}, "discretization: got 'zho'; did you mean 'zoh'"),
        ("gla", {"decay_rank": 0}, "decay_rank: got 0"),
        ("metala", {"decay_rank": -1}, "decay_rank: got -1"),
        ("deltanet", {"beta_init": 1.0}, "beta_init: got 1.0"),
        ("gated_deltanet", {"beta_init": 0.0}, "beta_init: got 0.0"),
        ("gated_deltanet", {"v_activation": "relu"}, "v_activation: got 'relu'"),
        ("gated_deltanet", {"norm_eps": 0.0}, "norm_eps: got 0.0"),
        ("gated_deltanet", {"biases": 0}, "biases: got 0, expected true or false"),
        ("kda", {"beta_init": 1.5}, "beta_init: got 1.5"),
        ("kda", {"low_rank_gate": True, "output_gate": "swish"}, "low_rank_gate: got true with output_gate 'swish'"),
        ("hgrn2", {"lower_bound": 0.5}, "lower_bound: got 0.5"),
        ("hgrn2", {"lower_bound": -0.1}, "lower_bound: got -0.1"),
        ("linear_attention", {"normalizer": True}, "normalizer: got true with qk_activation 'silu'"),
        ("linear_attention", {"normalizer": 1}, "normalizer: got 1"),
        ("gla", {"beta_init": 0.1}, "'beta_init'"),
        ("retnet", {"discretization": "zoh"}, "'discretization'"),
    ],
)
def test_invalid_option_of_one_mixer(name, options, message):
    with pytest.raises(UserError, match=message):
        mixers.create(name, SPECS["plain"], **options)


@pytest.mark.parametrize("half_life", [1e-3, 1, 1e6], ids=str)
@pytest.mark.parametrize("name", [name for name in ALL if hasattr(mixers.OPTIONS[name], "half_life")])
def test_parameters_are_finite_for_any_positive_half_life(name, half_life):
    mixer = mixers.create(name, SPECS["plain"], half_life=half_life)
    assert all(p.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", ALL)
def test_half_life_is_an_option_only_of_mixers_with_a_learned_decay(name):
    errors = mixers.OPTIONS[name].mistakes({"half_life": 8.0})
    assert ("half_life" in errors) == (name in ("linear_attention", "retnet", "deltanet"))
