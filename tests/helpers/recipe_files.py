"""A small recipe, and the messages about mistakes in recipes."""

import pytest

from subquad.config import load_recipe
from subquad.utils import UserError

BASE = """\
teacher: nano
data: {source: python-stdlib}
student:
  mixer: gla
stages:
  hidden:
    tokens: 20_000
    lr: 2e-3
"""


def mistakes(*args, load=load_recipe) -> list[str]:
    """The lines of the UserError that `load(*args)` raises."""
    with pytest.raises(UserError) as caught:
        load(*args)
    assert all(len(line) < 400 for line in caught.value.problems)
    return str(caught.value).split("\n")


def mistake(*args, load=load_recipe) -> str:
    (line,) = mistakes(*args, load=load)
    return line
