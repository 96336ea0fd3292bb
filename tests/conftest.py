"""What every test shares: no Triton kernels bound without a GPU, one thread, and tiny random teachers."""

import os
import sys

# Processes that tests start: two threads that share a core with another worker wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if torch.cuda.is_available():
    # Trying all configurations of a kernel takes minutes; the first one serves a test.
    from triton.runtime.autotuner import Autotuner

    prune_configs = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, kwargs: prune_configs(self, kwargs)[:1]  # type: ignore[method-assign]
else:
    # Where fla can be imported, transformers binds its kernels at import, and they fail at the first call.
    sys.modules["fla"] = None  # type: ignore[assignment]

import pytest
from transformers import PreTrainedModel

from subquad import load_teacher
from tests.helpers.teachers import SIZES, tiny_teacher


@pytest.fixture(autouse=True, scope="session")
def single_thread():
    """Two threads on tensors this small wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """The package's cache directory is one of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBQUAD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def nano():
    """The model and the tokenizer; a module may change them."""
    return load_teacher("nano")


@pytest.fixture
def make_teacher():
    return tiny_teacher


@pytest.fixture
def teacher() -> PreTrainedModel:
    return tiny_teacher()


@pytest.fixture
def ids() -> torch.Tensor:
    """[3, 11] tokens, none of them special."""
    return torch.randint(3, SIZES["vocab_size"], (3, 11), generator=torch.Generator().manual_seed(5))
