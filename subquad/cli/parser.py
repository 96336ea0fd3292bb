"""The argument parser, and types of options."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from subquad.utils import UserError

if TYPE_CHECKING:
    from subquad.modeling.placement import Placement


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

    def device(self) -> None:
        """Adds `--device`; see `find_device`."""
        device = "auto (default): a GPU where there is one, else the CPU; cpu, cuda or cuda:N"
        self.option("--device", "NAME", device, default="auto")

    def placement(self) -> None:
        """Adds `--device`, `--dtype` and `--attn`; see `placement_of`."""
        self.device()
        dtypes = ["float32", "bfloat16", "float16"]
        self.option(
            "--dtype",
            "NAME",
            "of the weights: float32 (default), bfloat16 or float16",
            choices=dtypes,
            default="float32",
        )
        self.option(
            "--attn", "NAME", "attention of transformers: sdpa, eager, flash_attention_2 ... (default: its own)"
        )

    def flag(self, name: str, text: str) -> None:
        self.add_argument(name, help=text, action="store_true")


def placement_of(args: argparse.Namespace) -> "Placement":
    """What the options of `Parser.placement` say. Raises UserError for a device that there is not."""
    from subquad.modeling.placement import Placement, find_device

    find_device(args.device)
    return Placement(args.device, args.dtype, args.attn)


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
