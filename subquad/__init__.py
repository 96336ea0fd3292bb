"""Subquad turns pretrained Transformers into subquadratic language models.

    student = subquad.linearize(teacher, mixer="gla")

After `import subquad`, `AutoModelForCausalLM.from_pretrained` loads students. The import itself is light: torch and
transformers are imported when a name that needs them is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from subquad import _auto_registration
from subquad.utils import quiet_imports

if TYPE_CHECKING:
    from subquad import ops
    from subquad.modeling.configuration_subquad import SubquadConfig
    from subquad.modeling.linearize import linearize
    from subquad.modeling.modeling_subquad import SubquadForCausalLM
    from subquad.modeling.teachers import load_teacher
    from subquad.registry import register_export_target, register_mixer, register_stage, register_suite

__version__ = "0.1.0"
__all__ = [
    "SubquadConfig",
    "SubquadForCausalLM",
    "linearize",
    "load_teacher",
    "ops",
    "register_export_target",
    "register_mixer",
    "register_stage",
    "register_suite",
]

LAZY = {
    "SubquadConfig": "subquad.modeling.configuration_subquad",
    "SubquadForCausalLM": "subquad.modeling.modeling_subquad",
    "linearize": "subquad.modeling.linearize",
    "load_teacher": "subquad.modeling.teachers",
    "register_export_target": "subquad.registry",
    "register_mixer": "subquad.registry",
    "register_stage": "subquad.registry",
    "register_suite": "subquad.registry",
}
"""Names with their modules, which are imported at first use; so is the package `ops`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet_imports():
        if name == "ops":
            return importlib.import_module("subquad.ops")
        return getattr(importlib.import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_auto_registration.install()
