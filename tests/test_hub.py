"""Access to the hub without a network, and names of files that do not exist."""

import datasets.config
import pytest
from huggingface_hub import constants

from subquad import hub
from subquad.data import corpora
from subquad.data.sources import resolve
from subquad.utils import UserError, nearest_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse():
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", refuse)


def test_files_in_the_cache_are_read_without_a_network(no_network):
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with hub.hub_access(True, "model 'a/b'"):
        assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (True, True)
        assert hub.hub_problem() is None
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    with (
        pytest.raises(UserError, match=r"^model 'a/b': unknown \(no network: http.* Name or service not known\)$"),
        hub.hub_access(False, "model 'a/b': unknown"),
    ):
        pytest.fail("the block ran")


def test_a_dataset_without_a_network_is_refused_at_once(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "train.txt").write_text("a")
    with pytest.raises(UserError, match=r"'book/train': no such file or directory; did you mean 'books/train.txt'\?"):
        corpora.hub_dataset(resolve("book/train"))


def test_datasets_in_the_cache_are_known(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert not hub.any_dataset_cached()
    (tmp_path / "EleutherAI___lambada_openai").mkdir()
    assert hub.any_dataset_cached()
    assert hub.is_dataset_cached("EleutherAI/lambada_openai")
    assert not hub.is_dataset_cached("baber/piqa")


def test_nearest_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "gla").mkdir(parents=True)
    assert nearest_path("demoo/gla") == "; did you mean 'demo/gla'?"
    assert nearest_path("demo/gal") == "; did you mean 'demo/gla'?"
    assert nearest_path(str(tmp_path / "demoo")) == f"; did you mean '{tmp_path / 'demo'}'?"
    assert nearest_path("Qwen/Qwen3-0.6B") == ""
