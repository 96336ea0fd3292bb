"""Registers students with transformers' Auto classes after a bare `import subquad`, without importing transformers.

`AutoConfig.register` needs transformers, whose import takes seconds. Where its table of configuration classes is not
loaded yet, a finder on `sys.meta_path` waits for it and imports `SubquadConfig` right after it; that module registers
itself. The model class needs torch: it is registered when the first `SubquadConfig` is made.
"""

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing `importlib.abc` takes a quarter of the time of `import subquad`
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PACKAGE = "transformers.models.auto"
TABLE = f"{PACKAGE}.configuration_auto"


def install() -> None:
    """Registers students now if the Auto classes are loaded, else as soon as they are."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    # A package is in sys.modules before its modules are searched. So another thread that imports the table now either
    # meets the finder or is seen here.
    if PACKAGE in sys.modules:
        finder.register()


class _Finder:
    """Finds the table as the finders after it do, with a loader that registers students."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        finders = list(sys.meta_path)
        if fullname != TABLE or self not in finders:
            return None
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def register(self) -> None:
        importlib.import_module("subquad.modeling.configuration_subquad")
        with suppress(ValueError):
            sys.meta_path.remove(self)


class _Loader:
    """Another loader, and registration after it."""

    def __init__(self, loader: "Loader", finder: _Finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self.loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.finder.register()
