"""Subquad turns pretrained Transformers into subquadratic language models.

    student = subquad.linearize(teacher, mixer="gla")

After `import subquad`, `AutoModelForCausalLM.from_pretrained` loads students. The import itself is light: torch and
transformers are imported when a name that needs them is first used.
"""

import pkgutil
from typing import TYPE_CHECKING, Any

from subquad import _auto_registration
from subquad.registry import register_export_target, register_mixer, register_stage, register_suite
from subquad.utils import quiet_imports

if TYPE_CHECKING:
    from subquad import ops as ops
    from subquad.modeling.configuration_subquad import SubquadConfig as SubquadConfig
    from subquad.modeling.linearize import linearize as linearize
    from subquad.modeling.modeling_subquad import SubquadForCausalLM as SubquadForCausalLM
    from subquad.modeling.teachers import load_teacher as load_teacher

__version__ = "0.1.0"
LAZY = {
    "SubquadConfig": "subquad.modeling.configuration_subquad:SubquadConfig",
    "SubquadForCausalLM": "subquad.modeling.modeling_subquad:SubquadForCausalLM",
    "linearize": "subquad.modeling.linearize:linearize",
    "load_teacher": "subquad.modeling.teachers:load_teacher",
    "ops": "subquad.ops:",
}
"""What is imported at first use."""
__all__ = [*LAZY, "register_export_target", "register_mixer", "register_stage", "register_suite"]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet_imports():
        return pkgutil.resolve_name(LAZY[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_auto_registration.install()
