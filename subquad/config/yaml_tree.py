"""YAML trees in which every value keeps the place where it was written, for error messages.

Scalars follow YAML 1.2: `2e-3` is a number (PyYAML reads text), `010` is ten, `yes` and `12:30` are text. Digits may be
grouped, as in `20_000`.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from subquad.utils import UserError

KeyPath = tuple[str, ...]

MAX_BYTES, MAX_VALUES, MAX_COMBINATIONS = 2**20, 10_000, 100_000
"""Of a file; of its tree, in which what an alias stands for counts each time; of its lists. More is a mistake, or an
attack."""


@dataclass(frozen=True)
class Node:
    """A value (a scalar, a dict of nodes or a list of nodes) and its place: `recipe.yaml:7` or `--set seed=1`."""

    value: Any
    where: str

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def find(self, path: KeyPath) -> "Node":
        """The value at `path`, or the innermost mapping around it that was written."""
        inside = isinstance(self.value, dict) and path and path[0] in self.value
        return self.value[path[0]].find(path[1:]) if inside else self

    def put(self, path: KeyPath, new: "Node", shorthands: Mapping[str, str], name: str | None = None) -> "Node":
        """A copy with the value at `path` replaced or added; below a list, in each of its items. `shorthands` has the
        key that a bare value in place of a mapping stands for, as in `{"student": "mixer"}`; `name` is that of here."""
        if not path:
            return new
        if isinstance(self.value, list):
            return Node([item.put(path, new, shorthands, name) for item in self.value], self.where)
        bare = {name: self} if name is not None and self.value is not None else {}
        inside = self.value if isinstance(self.value, dict) else bare
        child = inside.get(path[0], Node(None, new.where))
        return Node({**inside, path[0]: child.put(path[1:], new, shorthands, shorthands.get(path[0]))}, self.where)

    def combinations(self) -> int:
        """The number of trees that `product` returns."""
        if isinstance(self.value, dict):
            return math.prod(child.combinations() for child in self.value.values())
        items = self.value if isinstance(self.value, list) else []
        return sum(1 if isinstance(item.value, list) else item.combinations() for item in items) or 1

    def product(self) -> list["Node"]:
        """Every tree with one item of each list; the first list of the file changes slowest. A list that is empty or
        within a list stays."""
        if isinstance(self.value, dict):
            choices = [child.product() for child in self.value.values()]
            return [Node(dict(zip(self.value, each, strict=True)), self.where) for each in itertools.product(*choices)]
        if not isinstance(self.value, list) or not self.value:
            return [self]
        return [each for item in self.value for each in ([item] if isinstance(item.value, list) else item.product())]


_RESOLVERS = {
    "null": (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"(?:[tT]rue|TRUE|[fF]alse|FALSE)$", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
}
"""The pattern and the first characters of each type of scalar."""


class _Loader(yaml.SafeLoader):
    """Builds trees. `place` and `problems` are arguments of `parse`."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (as PyYAML declares it)
    place: Path | str
    problems: list[str]
    count = 0

    def tree(self, node: yaml.Node, path: KeyPath) -> Node:
        here = _where(self.place, node.start_mark.line)
        self.count += 1
        if self.count > MAX_VALUES:
            raise UserError(f"{here}: not a recipe: more than {MAX_VALUES:,} values, aliases included")
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, path), here)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.tree(item, path) for item in node.value], here)
        self.check_characters(node, here)
        try:
            return Node(self.construct_object(node), here)
        except ValueError:  # such as an integer of 5,000 digits
            return Node(node.value, here)

    def check_characters(self, node: yaml.Node, here: str) -> None:
        """Joins characters that are escaped in two halves, as JSON does (`\\ud83d\\ude00`), in a scalar."""
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= c <= "\udfff" for c in node.value):
            try:
                node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            except UnicodeDecodeError:
                raise UserError(f"{here}: got {node.value!a}, half of a character, expected text") from None

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Node]:
        inside: dict[str, Node] = {}
        for key_node, value_node in node.value:
            # The place of a value is that of its key: in block style the value itself begins a line further down.
            here = _where(self.place, key_node.start_mark.line)
            self.check_characters(key_node, here)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                dotted = ".".join(path) or "recipe"
                self.problems.append(f"{here}: {dotted}: got a list or mapping as a key, expected a name")
            elif key in inside:
                dotted = ".".join((*path, key))
                self.problems.append(f"{here}: {dotted}: this key is given twice, first at {inside[key].where}")
            else:
                inside[key] = Node(self.tree(value_node, (*path, key)).value, here)
        return inside


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for _name, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def _where(place: Path | str, line: int) -> str:
    """A place in messages. line: counted from 0."""
    return f"{place}:{line + 1}" if isinstance(place, Path) else place


def read(path: Path, problems: list[str]) -> Node:
    """The tree of a YAML file. UserError if it cannot be read, is not YAML or holds no mapping."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: got {path.stat().st_size:,} bytes, expected a recipe of at most {MAX_BYTES:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); expected a recipe in YAML") from None
    tree = parse(text, path, problems)
    if not isinstance(tree.value, dict):
        raise UserError(f"{tree.where}: got {format_value(tree.plain())}, expected a mapping of keys to values")
    return tree


def parse(text: str, place: Path | str, problems: list[str], path: KeyPath = ()) -> Node:
    """The tree of a YAML text. UserError if it is not YAML.

    Args:
        place: the file, whose lines messages name, or the option.
        problems: receives a message for each key that is invalid or given twice.
        path: the keys above the text, for messages.
    """
    try:
        loader = _Loader(text)
        loader.place, loader.problems = place, problems
        root = loader.get_single_node()
        return Node(None, _where(place, 0)) if root is None else loader.tree(root, path)
    except yaml.MarkedYAMLError as error:
        where = _where(place, getattr(error.problem_mark, "line", 0))
        raise UserError(f"{where}: not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        where = _where(place, text.count("\n", 0, error.position))
        raise UserError(f"{where}: not YAML: {error.reason}") from None
    except RecursionError:
        raise UserError(f"{place}: not a recipe: nested too deep") from None


def parse_value(text: str, option: str) -> Any:
    """The value of a YAML text given as an option. Raises UserError with all problems."""
    problems: list[str] = []
    value = parse(text, option, problems).plain()
    if problems:
        raise UserError(*problems)
    return value


def format_value(value: Any) -> str:
    """A value as JSON or YAML writes it, cut to 60 characters."""
    text = repr(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dump(value: Any) -> str:
    """YAML that `parse` reads back as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
