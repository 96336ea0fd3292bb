"""The argument parser, and types of options."""

import argparse
from collections.abc import Callable
from typing import Any

from subquad.utils import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting. `commands`: the subparsers."""

    commands: Any

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")

    def command(self, name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> "Parser":
        """Adds a command whose exit code is what `run` returns; None is 0."""
        command = self.commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    def option(self, flags: str, metavar: str, text: str, **settings: Any) -> None:
        """Adds an argument. flags: its name, or its flags separated by blanks. settings: see `add_argument`."""
        self.add_argument(*flags.split(), metavar=metavar, help=text, **settings)

    def flag(self, name: str, text: str) -> None:
        self.add_argument(name, help=text, action="store_true")


def split_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """A list of whole numbers of at least 1."""
    return [count(item) for item in split_list(text)]
