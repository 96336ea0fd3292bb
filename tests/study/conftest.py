"""A tiny recipe and a cache directory for all tests of studies."""

import pytest

from tests.helpers.recipes import tiny_recipe


@pytest.fixture(scope="session")
def study_recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True, scope="module")
def _own_cache(own_cache):
    pass
