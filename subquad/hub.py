"""Access to the Hugging Face hub: whether it can be reached, and what its caches hold.

The hub's clients repeat a failed request for half a minute or longer. One request of a few seconds says as much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subquad.utils import UserError

TIMEOUT = 5.0
"""Seconds for the hub to answer."""


def hub_problem() -> str | None:
    """Why the hub cannot be reached; None if it can, or in offline mode, in which nobody asks it."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of httpx or requests
        return f"{constants.ENDPOINT} cannot be reached: {error}"
    return None


@contextmanager
def hub_access(is_cached: bool, failure: str) -> Iterator[None]:
    """For downloads in its block. Without a network, files in the cache are used.

    Raises:
        UserError: there is no network and no file in the cache; before the block, beginning with `failure`.
    """
    problem = hub_problem()
    if problem is None:
        yield
    elif not is_cached:
        raise UserError(f"{failure} (no network: {problem})")
    else:
        with offline_mode():
            yield


@contextmanager
def offline_mode() -> Iterator[None]:
    """Inside, the libraries of the hub read their caches alone, as with `HF_HUB_OFFLINE=1`."""
    import datasets.config
    from huggingface_hub import constants

    modules: tuple[Any, ...] = constants, datasets.config
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def is_dataset_cached(name: str) -> bool:
    """Whether `datasets` has read the hub's dataset `name` before."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    return Path(config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(last)])).exists()


def any_dataset_cached() -> bool:
    """Whether `datasets` has read any dataset of the hub before."""
    from datasets import config

    return any(Path(config.HF_DATASETS_CACHE).glob("*___*"))
