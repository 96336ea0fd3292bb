"""What other packages can add: mixers, stages, export targets and evaluation suites (CONTRIBUTING.md).

Imports no torch: built-in objects are paths such as `package.module:object`, imported when they are used.
"""

import functools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from subquad.utils import UserError, nearest, quiet_imports

C = TypeVar("C")


class Registry(Mapping[str, Any]):
    """Objects by name: the built-in ones, then those of other packages.

    Another package registers an object when its module is imported. An entry point in `group`, with the object's name
    and its module, lets the name import the module. Entry points are read only to find a name that is neither built in
    nor registered, and to list all names.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str]):
        self.kind, self.group, self.objects = kind, group, dict[str, Any](built_in)

    def register(self, name: str, item: C) -> C:
        """Adds an object, or replaces it if its module is imported again. Raises UserError for a name that is taken."""
        if name in self.objects and getattr(self.objects[name], "__module__", None) != item.__module__:
            raise UserError(f"{self.kind} {name!r} exists; expected another name")
        self.objects[name] = item
        return item

    def find(self, name: str, *others: str) -> Any:
        """The object of that name. An unknown one is a UserError with the nearest of all names and `others`."""
        if name not in self:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, [*self, *others])}")
        return self[name]

    @functools.cached_property
    def entry_points(self) -> dict[str, Any]:
        from importlib.metadata import entry_points  # takes a tenth of the start-up

        return {point.name: point for point in entry_points(group=self.group)}

    def __getitem__(self, name: str) -> Any:
        if name not in self.objects:
            point = self.entry_points[name]
            try:
                with quiet_imports():
                    point.load()
            except Exception as error:
                raise UserError(f"{self.kind} {name!r}: {point.value} cannot be imported: {error!r}") from error
            if name not in self.objects:
                raise UserError(f"{self.kind} {name!r}: {point.value} does not register it")
        item = self.objects[name]
        return pkgutil.resolve_name(item) if isinstance(item, str) else item

    def __contains__(self, name: object) -> bool:
        return name in self.objects or name in self.entry_points

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.objects, *self.entry_points]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


MIXERS = Registry(
    "mixer",
    "subquad.mixers",
    {
        "linear_attention": "subquad.mixers.linear_attention:LinearAttention",
        "retnet": "subquad.mixers.retnet:RetNet",
        "mamba2": "subquad.mixers.mamba2:Mamba2",
        "gla": "subquad.mixers.gla:GLA",
        "metala": "subquad.mixers.metala:MetaLA",
        "deltanet": "subquad.mixers.deltanet:DeltaNet",
        "gated_deltanet": "subquad.mixers.gated_deltanet:GatedDeltaNet",
        "xlstm": "subquad.mixers.xlstm:XLSTM",
        "kda": "subquad.mixers.kda:KDA",
        "hgrn2": "subquad.mixers.hgrn2:HGRN2",
    },
)
"""Subclasses of `subquad.mixers.Mixer`, in display order."""
STAGES = Registry(
    "stage",
    "subquad.stages",
    {
        "matrix": "subquad.distill.matrix_mixing:MatrixMixing",
        "hidden": "subquad.distill.hidden_alignment:HiddenAlignment",
        "end_to_end": "subquad.distill.end_to_end:EndToEndDistillation",
    },
)
"""Subclasses of `subquad.distill.objective.Objective`, in the order in which they run."""
EXPORT_TARGETS = Registry(
    "export target",
    "subquad.export_targets",
    {
        "qwen3_5": "subquad.export.qwen3_5:Qwen3_5Converter",
        "granite_hybrid": "subquad.export.granite_hybrid:GraniteHybridConverter",
        "kimi_linear": "subquad.export.kimi_linear:KimiLinearConverter",
        "ministral": "subquad.export.ministral:MinistralConverter",
    },
)
"""Subclasses of `subquad.export.converter.Converter`."""
SUITES = Registry(
    "suite",
    "subquad.suites",
    {
        "language": "subquad.evaluate.suites:language_suite",
        "zero-shot": "subquad.evaluate.suites:zero_shot_suite",
        "generation": "subquad.evaluate.suites:generation_suite",
        "long": "subquad.evaluate.suites:long_suite",
        "efficiency": "subquad.evaluate.suites:efficiency_suite",
        "recall": "subquad.analysis.suites:recall_suite",
        "diagnostics": "subquad.analysis.suites:diagnostics_suite",
    },
)
"""Functions of an evaluation and a model (`subquad.evaluate.suites`), in the order in which they run."""


def register_mixer(mixer: C) -> C:
    """Class decorator: adds a subclass of `subquad.mixers.Mixer` under its `name`."""
    return MIXERS.register(mixer.name, mixer)  # type: ignore[attr-defined]


def register_stage(objective: C) -> C:
    """Class decorator: adds a subclass of `subquad.distill.objective.Objective` under its `name`."""
    return STAGES.register(objective.name, objective)  # type: ignore[attr-defined]


def register_export_target(converter: C) -> C:
    """Class decorator: adds a subclass of `subquad.export.converter.Converter` under the key of its `target`."""
    return EXPORT_TARGETS.register(converter.target.key, converter)  # type: ignore[attr-defined]


def register_suite(name: str, suite: Callable[..., Any]) -> None:
    """Adds a suite, a function of an evaluation and a model (`subquad.evaluate.suites`)."""
    SUITES.register(name, suite)
