"""YAML trees in which every value keeps the place where it was written, for error messages.

Scalars follow YAML 1.2: `2e-3` is a number (PyYAML reads text), `010` is ten, `yes` and `12:30` are text. Digits may be
grouped, as in `20_000`.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from subquad.utils import UserError

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?[0-9][0-9_]*$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (as PyYAML declares it)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:[tT]rue|TRUE|[fF]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
# These make the dumper quote text that would be read as a number.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


INVALID = object()
"""The plain value of a node whose mistake is already reported."""


@dataclass(frozen=True)
class Node:
    """A value (a scalar, a dict of nodes or a list of nodes) and its place: `recipe.yaml:7` or `--set seed=1`."""

    value: Any
    where: str

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def origin(self, path: tuple[str, ...]) -> str:
        """The place of the value at `path`, or of the innermost mapping around it that was written."""
        if path and isinstance(self.value, dict) and path[0] in self.value:
            return self.value[path[0]].origin(path[1:])
        return self.where

    def put(self, path: tuple[str, ...], new: "Node") -> "Node":
        """A copy with the value at `path` replaced or added; below a list, in each of its items."""
        if not path:
            return new
        if isinstance(self.value, list):
            return Node([item.put(path, new) for item in self.value], self.where)
        inside = self.value if isinstance(self.value, dict) else {}
        child = inside.get(path[0], Node(None, new.where))
        return Node({**inside, path[0]: child.put(path[1:], new)}, self.where)

    def expand(self, shorthands: Mapping[str, str]) -> "Node":
        """A copy in which text under a key of `shorthands` is a mapping: `gla` becomes `{mixer: gla}` with
        `{"student": "mixer"}`."""
        if not isinstance(self.value, dict):
            return self

        def expanded(node: Node, name: str) -> Node:
            if isinstance(node.value, list):
                return Node([expanded(item, name) for item in node.value], node.where)
            return Node({name: node}, node.where) if isinstance(node.value, str) else node

        changed = {key: expanded(self.value[key], name) for key, name in shorthands.items() if key in self.value}
        return Node({**self.value, **changed}, self.where)

    def lists(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], "Node"]]:
        """The outermost lists with their paths."""
        if isinstance(self.value, list):
            yield path, self
        elif isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.lists((*path, key))

    def product(self, problems: list[str], path: tuple[str, ...] = ()) -> Iterator["Node"]:
        """Every tree with one item of each list; the first list of the file changes slowest. Lists that are empty or
        within a list are added to `problems`."""
        if isinstance(self.value, list):
            dotted = ".".join(path)
            if not self.value:
                problems.append(f"{self.where}: {dotted}: got an empty list, expected at least one value")
                yield Node(INVALID, self.where)
            for item in self.value:
                if isinstance(item.value, list):
                    problems.append(f"{item.where}: {dotted}: got a list within a list, expected values")
                    yield Node(INVALID, item.where)
                else:
                    yield from item.product(problems, path)
        elif isinstance(self.value, dict):
            choices = [list(child.product(problems, (*path, key))) for key, child in self.value.items()]
            for chosen in itertools.product(*choices):
                yield Node(dict(zip(self.value, chosen, strict=True)), self.where)
        else:
            yield self


def read(path: Path, problems: list[str]) -> Node:
    """The tree of a YAML file; keys that are invalid or given twice are added to `problems`.

    Raises:
        UserError: the file cannot be read, is not YAML or holds no mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a recipe in YAML") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a recipe in YAML") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; expected a recipe in YAML") from None
    tree = parse(text, lambda line: f"{path}:{line}", problems)
    if tree.value is None:
        raise UserError(f"{path}: is empty; expected a recipe in YAML")
    if not isinstance(tree.value, dict):
        raise UserError(f"{tree.where}: got a {type(tree.value).__name__}, expected a mapping of keys to values")
    return tree


def parse(text: str, where: Callable[[int], str], problems: list[str], path: tuple[str, ...] = ()) -> Node:
    """The tree of a YAML text.

    Args:
        where: the place in messages of a line, counted from 1.
        problems: receives a message for each key that is invalid or given twice.
        path: the keys above the text, for messages.

    Raises:
        UserError: the text is not YAML.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return Node(None, where(1)) if root is None else _node(loader, root, where, problems, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{where(mark.line + 1 if mark else 1)}: not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{where(line)}: not YAML: {error.reason}") from None
    except RecursionError:
        raise UserError(f"{where(1)}: not a recipe: nested too deep") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_value(text: str, where: str) -> Any:
    """The value of a YAML text, as of a command line option. Raises UserError with all problems."""
    problems: list[str] = []
    value = parse(text, lambda _line: where, problems).plain()
    if problems:
        raise UserError(*problems)
    return value


def _node(
    loader: _Loader, node: yaml.Node, where: Callable[[int], str], problems: list[str], path: tuple[str, ...]
) -> Node:
    here = where(node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        inside: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = where(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(
                    f"{line}: {'.'.join(path) or 'recipe'}: got a list or mapping as a key, expected a name"
                )
                continue
            key = (*path, key_node.value)
            if key_node.value in inside:
                first = inside[key_node.value].where
                problems.append(f"{line}: {'.'.join(key)}: this key is given twice, first at {first}")
                continue
            # The place of a value is that of its key: in block style the value itself begins a line further down.
            inside[key_node.value] = Node(_node(loader, value_node, where, problems, key).value, line)
        return Node(inside, here)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(loader, item, where, problems, path) for item in node.value], here)
    try:
        return Node(loader.construct_object(node), here)
    except ValueError:  # such as an integer of 5,000 digits
        return Node(node.value, here)


def dump(value: Any) -> str:
    """YAML that `parse` reads back as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
