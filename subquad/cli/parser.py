"""The argument parser, and types of options."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from subquad.utils import UserError, nearest

if TYPE_CHECKING:
    from subquad.modeling.placement import Placement


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting. `commands`: the subparsers."""

    commands: Any = None

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Names the nearest valid command or value; argparse has no public place for this."""
        if action.choices is None or value in action.choices:
            return
        if action is self.commands:
            self.error(f"unknown command {value!r}{nearest(value, action.choices)}")
        raise argparse.ArgumentError(action, f"got {value!r}{nearest(value, action.choices)}")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Raises UserError for unknown arguments, with the nearest option of the command."""
        if self.commands is None and not any(action.nargs == argparse.REMAINDER for action in self._actions):
            self.refuse_unknown_options(args or [])  # before a required option that is misspelt is called missing
        found, rest = super().parse_known_args(args, namespace)
        self.refuse_unknown_options(rest, prefixes=False)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return found, rest

    def refuse_unknown_options(self, args: Sequence[str], prefixes: bool = True) -> None:
        """prefixes: whether the beginning of an option's name stands for it; without, all `args` are unknown."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        for text in itertools.takewhile(lambda text: text != "--", args):
            given = text.partition("=")[0]
            if prefixes and (not given.startswith("--") or any(name.startswith(given) for name in names)):
                continue
            if given.startswith("-"):
                close = nearest(given, names)
                self.error(f"unknown option {given}{close if 'did you mean' in close else ''}")

    def command(
        self, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, *, resumes: bool = False
    ) -> "Parser":
        """Adds a command whose exit code is what `run` returns; None is 0. resumes: in its `--output`, an interrupted
        command continues."""
        command = self.commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run, resumes=resumes)
        return command

    def quiet(self) -> None:
        """Adds `--quiet` to a command that takes long."""
        self.flag("--quiet", "print results and warnings alone, without progress")

    def option(self, flags: str, metavar: str, text: str, *, words: Iterable[str] = (), **settings: Any) -> None:
        """Adds an argument. flags: its name, or its flags separated by blanks. words: values that a shell completes,
        among others that are allowed. settings: see `add_argument`. The help ends with the default that `settings`
        give."""
        default = settings.get("default")
        if default not in (None, [], ""):
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {shown})"
        action = self.add_argument(*flags.split(), metavar=metavar, help=text, **settings)
        action.words = tuple(words)  # type: ignore[attr-defined]

    def device(self) -> None:
        """Adds `--device`; see `find_device`."""
        device = "cpu, cuda, cuda:N, or auto: a GPU where there is one, else the CPU"
        self.option("--device", "NAME", device, default="auto")

    def placement(self) -> None:
        """Adds `--device`, `--dtype` and `--attn`; see `placement_of`."""
        self.device()
        dtypes = ["float32", "bfloat16", "float16"]
        self.option(
            "--dtype",
            "NAME",
            "of the weights: float32, bfloat16 or float16",
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


@contextmanager
def named(option: str) -> Iterator[None]:
    """In its block, errors about keys of a recipe are about the `option` by which a command is given its text."""
    try:
        yield
    except UserError as error:
        problems = (problem.replace("data.source", option, 1) for problem in error.problems)
        raise UserError(*(problem.replace("data.seq_len = ", "") for problem in problems)) from error


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
