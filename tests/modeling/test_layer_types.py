"""`layer_types`: what is resolved to layer specs, what is refused, and that no torch is imported."""

import subprocess
import sys

import pytest

from subquad.modeling.layer_types import resolve_layer_types
from subquad.utils import UserError

GLA, ATTENTION = {"mixer": "gla"}, {"mixer": "attention"}
WINDOW = {"mixer": "attention", "window": 8, "sinks": 2}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"default": "gla"}, [GLA] * 4),
        ({"default": "gla", "0,3": "attention"}, [ATTENTION, GLA, GLA, ATTENTION]),
        ({"0-2": "gla", "3": WINDOW}, [GLA, GLA, GLA, WINDOW]),
        ({" 0 , 2-3": "softmax", 1: "gla"}, [{"mixer": "softmax"}, GLA, {"mixer": "softmax"}, {"mixer": "softmax"}]),
        ({"default": {"mixer": "gla", "decay_rank": 4}}, [{"mixer": "gla", "decay_rank": 4}] * 4),
    ],
)
def test_layer_types_are_resolved_to_one_spec_a_layer(given, expected):
    specs = resolve_layer_types(given, 4)
    assert specs == expected
    specs[0]["half_life"] = 3.0  # the specs of different layers are different dicts
    assert specs[1:] == expected[1:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "layer_types: got {}"),
        ("gla", "layer_types: got 'gla'"),
        ({"default": "gal"}, "layer_types: default: unknown mixer 'gal'; did you mean 'gla'"),
        ({"default": ["gla"]}, r"layer_types: default: got \['gla'\]"),
        ({"default": {"decay_rank": 4}}, "layer_types: default: unknown mixer None"),
        ({"default": {"mixer": "gla", "decay_rnk": 4}}, "layer_types: default: .*decay_rnk.*did you mean 'decay_rank'"),
        ({"default": {"mixer": "softmax", "window": 4}}, "layer_types: default: window"),
        ({"default": {"mixer": "attention", "windw": 4}}, "layer_types: default: .*windw.*did you mean 'window'"),
        ({"default": {"mixer": "attention", "window": 0}}, "window: got 0"),
        ({"default": {"mixer": "attention", "window": True}}, "window: got True"),
        ({"default": {"mixer": "attention", "sinks": 4}}, "sinks: got 4 without a window"),
        ({"default": {"mixer": "attention", "qk_norm": 1}}, "qk_norm: got 1"),
        ({"0-3": "gla", "2": "attention"}, "layer_types: 2: layer 2 is listed twice"),
        ({"0-1": "gla"}, "layer_types: layer 2, 3 is missing"),
        ({"default": "gla", "4": "attention"}, "layer_types: 4: there is no layer 4"),
        ({"default": "gla", "-1": "attention"}, "layer_types: -1: got '-1'"),
        ({"default": "gla", "first": "attention"}, "layer_types: first: got 'first'"),
    ],
)
def test_invalid_layer_types_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        resolve_layer_types(given, 4)


IMPORTS = """
import sys
from subquad.modeling.layer_types import resolve_layer_types
assert resolve_layer_types({"default": "gla"}, 2) == [{"mixer": "gla"}] * 2
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_layer_types_import_neither_torch_nor_transformers():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
