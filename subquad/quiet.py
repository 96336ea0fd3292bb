"""Keeps libraries from saying what no user of a command can act on."""

import logging


def quiet_libraries() -> None:
    """Of the libraries only what is wrong; to be called before they are used."""
    for name in ("torchao", "torch.utils._pytree"):  # warn of what they lack whenever they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
