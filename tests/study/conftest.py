"""A tiny recipe and a cache directory for all tests of studies."""

import pytest

from tests.helpers.recipes import tiny_recipe


@pytest.fixture(scope="session")
def study_recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def _cache_directory(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
