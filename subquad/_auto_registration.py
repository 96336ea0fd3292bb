"""Registers students with transformers' Auto classes after a bare `import subquad`, without importing transformers.

`AutoConfig.register` needs transformers, whose import takes seconds. Where its table of configuration classes is not
loaded yet, a finder on `sys.meta_path` waits for it and imports `SubquadConfig` right after it; that module registers
itself. The model class needs torch: it is registered when the first `SubquadConfig` is made.
"""

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGE = "transformers.models.auto"


def install() -> None:
    """Registers students now if the Auto classes are loaded, else as soon as they are."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    # A package is in sys.modules before its modules are searched. So another thread that imports the table now either
    # meets the finder or is seen here.
    if PACKAGE in sys.modules:
        finder.register()


class _Finder:
    """Finds the table of configuration classes, with a loader that registers students after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != f"{PACKAGE}.configuration_auto":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self.register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        importlib.import_module("subquad.modeling.configuration_subquad")
        with suppress(ValueError):
            sys.meta_path.remove(self)
