"""Inputs for the fuzz tests: valid ones with mistakes, and arbitrary ones."""

import copy
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

cheap, with_model = settings.get_profile("cheap"), settings.get_profile("model")
"""Number of inputs of tests that load no model, and of those that do."""

NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 10**9, 2**31, 2**60, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            "..",
            "../x",
            "/etc/passwd",
            "gla",
            "auto",
            "null",
            "a" * 10_000,
            "\0",
            "\ud800",
            "<script>",
            "{{ 7 * 7 }}",
        ]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 70_000), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def paths(value: Any, at: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value, its own first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, child in items for path in paths(child, (*at, key)))]


@st.composite
def mutated(draw: Any, valid: Any) -> Any:
    """A JSON value with up to three values replaced, removed or added."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(JSON)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            parent[path[-1]] = draw(JSON)
        elif action == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(TEXTS)] = draw(JSON)
    return value


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: Any, valid: bytes, head: int = 4096) -> bytes:
    """A file with bytes changed (mostly among the first `head`), cut off, removed or inserted."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = (
            draw(st.integers(0, min(len(data), head) - 1))
            if draw(st.booleans())
            else draw(st.integers(0, len(data) - 1))
        )
        action = draw(st.sampled_from(["change", "change", "cut", "remove", "insert", "number"]))
        if action == "change":
            data[at] = draw(st.integers(0, 255))
        elif action == "cut":
            del data[at:]
        elif action == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:  # a size or an offset that is huge
            data[at : at + 8] = draw(st.sampled_from([2**60, 2**63, 2**32, 2**64 - 1])).to_bytes(8, "little")
    return bytes(data)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fails if its block runs longer: what an input may take at most, many times what it takes."""

    def fail(*_: Any) -> None:
        pytest.fail(f"not finished after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
