"""YAML in which every value knows where it was written, so that an error can name the line.

Knows nothing of recipes. The scalars are those of YAML 1.2: `2e-3` is a number (PyYAML on its own reads text), `010` is
ten, `yes` and `12:30` are text; digits may be grouped as in `20_000`.
"""

import itertools
import re
from collections.abc import Callable, Iterator
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
# Text that reads as a number must be quoted; what PyYAML itself takes for more than text it quotes already.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


@dataclass(frozen=True)
class Node:
    """A value (a scalar, a dict of nodes or a list of nodes) and where it comes from, as an error names it."""

    value: Any
    where: str

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def origin(self, path: tuple[str, ...]) -> str:
        """Where the value at `path` was written, or the innermost mapping around it that was."""
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

    def first_list(self, path: tuple[str, ...] = ()) -> tuple[str, ...] | None:
        """The path of the first list in the tree; None where there is none."""
        if isinstance(self.value, list):
            return path
        children = self.value.items() if isinstance(self.value, dict) else ()
        return next((found for key, child in children if (found := child.first_list((*path, key))) is not None), None)

    def product(self, path: tuple[str, ...] = ()) -> Iterator["Node"]:
        """Every tree that takes one item of each list; the list that comes first in the file changes slowest."""
        if isinstance(self.value, list):
            if not self.value:
                raise UserError(f"{self.where}: {'.'.join(path)}: an empty list; expected at least one value")
            for item in self.value:
                if isinstance(item.value, list):
                    raise UserError(f"{item.where}: {'.'.join(path)}: a list within a list; expected values")
                yield from item.product(path)
        elif isinstance(self.value, dict):
            choices = [list(child.product((*path, key))) for key, child in self.value.items()]
            for chosen in itertools.product(*choices):
                yield Node(dict(zip(self.value, chosen, strict=True)), self.where)
        else:
            yield self


def read(path: Path) -> Node:
    """The tree of a YAML file; UserError where there is none, or no mapping at its root."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a recipe in YAML") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a recipe in YAML") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; expected a recipe in YAML") from None
    tree = parse(text, lambda line: f"{path}:{line}")
    if tree.value is None:
        raise UserError(f"{path}: is empty; expected a recipe in YAML")
    if not isinstance(tree.value, dict):
        raise UserError(f"{tree.where}: holds {type(tree.value).__name__}, expected a mapping of keys to values")
    return tree


def parse(text: str, where: Callable[[int], str], path: tuple[str, ...] = ()) -> Node:
    """The tree of a YAML text; for error messages, `where` words a line number and `path` is the keys above it."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return Node(None, where(1)) if root is None else _node(loader, root, where, path)
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


def _node(loader: _Loader, node: yaml.Node, where: Callable[[int], str], path: tuple[str, ...]) -> Node:
    here = where(node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        inside: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = where(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{line}: a key is a list or mapping; expected a name")
            key = (*path, key_node.value)
            if key_node.value in inside:
                first = inside[key_node.value].where
                raise UserError(f"{line}: {'.'.join(key)}: this key is there twice, first at {first}")
            # The line of a value is that of its key: in block style the value itself begins a line further down.
            inside[key_node.value] = Node(_node(loader, value_node, where, key).value, line)
        return Node(inside, here)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(loader, item, where, path) for item in node.value], here)
    try:
        return Node(loader.construct_object(node), here)
    except ValueError as error:
        raise UserError(f"{here}: {'.'.join(path)}: cannot be read ({error})") from None


def dump(value: Any) -> str:
    """YAML that `parse` reads back as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
