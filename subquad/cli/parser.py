"""What the modules of commands share."""

import argparse
import sys
from collections.abc import Callable
from typing import Protocol


class AddCommand(Protocol):
    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int | None], summary: str
    ) -> argparse.ArgumentParser:
        """Adds a command whose exit code is what `run` returns; None is 0."""


class Parser(argparse.ArgumentParser):
    """Prints errors in one line, without the usage."""

    def error(self, message: str):
        print(f"{self.prog}: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def split_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
