"""Keeps libraries from saying what no user of a command can act on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

COMPLAINING = ("torchao", "torch.utils._pytree")
"""They warn of what they lack whenever they are imported, which `transformers` does where torchao is installed."""


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Those warnings are held back for a while; the levels are afterwards what they were."""
    loggers = [logging.getLogger(name) for name in COMPLAINING]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def quiet_libraries() -> None:
    """Of the libraries only what is wrong; to be called before they are used."""
    for name in COMPLAINING:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
