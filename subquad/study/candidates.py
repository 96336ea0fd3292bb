"""The models of `subquad.study.frontier`: all that shrinks a teacher's cache, trained or not."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from subquad.config import Data, Recipe
from subquad.data import spread_rows
from subquad.evaluate.baselines import kept_attention, uniform_window, windowed_teacher
from subquad.evaluate.cache_methods import QuantizedCacheLayer, TovaCacheLayer, with_cache
from subquad.evaluate.runner import EvalModel, Evaluation, load_eval_model
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.budget import SINKS, calibration_shape
from subquad.modeling.layer_types import FULL
from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.placement import Placement
from subquad.selection.ranking import rank_groups
from subquad.study.grid import run_study
from subquad.study.runs import find_runs
from subquad.utils import UserError

logger = logging.getLogger(__name__)
TEACHER, WINDOW, BUDGET, MEMORY, STREAMING, EVICTION, BITS, RECIPE = (
    "teacher",
    "uniform window",
    "windows by error",
    "windows and memories by error",
    "streaming heads",
    "TOVA",
    "4-bit cache",
    "recipe",
)


@dataclass(frozen=True)
class Row:
    """A model of the frontier. budget: N, for the bytes of N + 4 tokens of the teacher's cache; None: its own bytes."""

    model: str
    method: str
    budget: int | None = None
    trained: bool = False


class Candidates:
    """Makes the models. What costs time, windows by error and the ranking of heads, is stored as jobs of `evaluation`.

    calibration: the text on which they are chosen. memory: the mixer of memories; None: there are none. placement: of
    students that are loaded from a directory.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        budgets: Sequence[int],
        calibration: Data,
        context: int,
        memory: str | None = None,
        placement: Placement | None = None,
    ):
        assert evaluation.teacher is not None
        self.evaluation, self.teacher, self.budgets, self.context = evaluation, evaluation.teacher, budgets, context
        self.calibration, self.memory, self.placement = calibration, memory, placement
        self.layers = discover_attention(self.teacher.model)
        self.heads = [(i, head) for i, info in enumerate(self.layers) for head in range(info.spec.num_kv_heads)]

    def untrained(self) -> Iterator[tuple[Row, Callable[[], EvalModel]]]:
        teacher = self.teacher.model

        def candidate(
            name: str, method: str, budget: int | None, make: Callable[[], SubquadForCausalLM]
        ) -> tuple[Row, Callable[[], EvalModel]]:
            return Row(f"{self.teacher.name}, {name}", method, budget), lambda: self.variant(name, make())

        for n in self.budgets:
            yield candidate(window_name(n), WINDOW, n, partial(windowed_teacher, teacher, n))
            for method, types in ((BUDGET, self.by_error), (STREAMING, self.streaming)):
                if method == BUDGET or self.whole_heads(n):
                    yield candidate(f"{method} {n}", method, n, partial(self.kept, types, n))
            if self.memory is not None:
                row = Row(f"{self.teacher.name}, {MEMORY} {n}", MEMORY, n)
                yield row, partial(self.with_memories, row.model, n)
            tova = partial(with_cache, teacher, partial(TovaCacheLayer, n + SINKS))
            yield candidate(f"{EVICTION} {n}", EVICTION, n, tova)
        yield candidate(BITS, BITS, None, partial(with_cache, teacher, QuantizedCacheLayer))

    def kept(self, types: Callable[[int], dict[str, Any]], budget: int) -> SubquadForCausalLM:
        return kept_attention(self.teacher.model, types(budget))

    def variant(self, name: str, model: SubquadForCausalLM) -> EvalModel:
        made = self.teacher.variant(name, model)
        return replace(made, identity=(*made.identity, model.config.layer_specs) if made.identity else ())

    def stored(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, which reads the calibration text; a job."""
        found = self.evaluation.outcome(name, self.teacher, (self.calibration.source,), compute)
        if found is None:
            raise UserError(self.evaluation.failed.pop(f"{name}: {self.teacher.name}"))
        return found

    def calibration_ids(self) -> Tensor:
        return spread_rows(self.calibration, self.teacher.tokenizer, *calibration_shape(self.teacher.model))

    def by_error(self, budget: int) -> dict[str, Any]:
        """Layer types of the windows that the calibration text asks for."""

        def allocate() -> dict[str, Any]:
            return {str(i): spec for i, spec in enumerate(self.student(budget).config.layer_specs)}

        return self.stored(f"{BUDGET}, budget {budget}", allocate)

    def student(self, budget: int, **options: Any) -> SubquadForCausalLM:
        given: dict[str, Any] = {"calibration_ids": self.calibration_ids(), "attention_layers": self.layers, **options}
        return linearize(self.teacher.model, budget=str(budget), **given)

    def with_memories(self, name: str, budget: int) -> EvalModel:
        """The student with the memories that the calibration text asks for, stored with what was fitted."""
        assert self.evaluation.output is not None
        dtype = str(self.teacher.model.dtype).removeprefix("torch.")
        suffix = "" if dtype == "float32" else f"-{dtype}"
        directory = self.evaluation.output / "students" / f"{self.memory}-{budget}{suffix}"

        def save() -> int:
            student = self.student(budget, budget_memory=self.memory)
            student.save_pretrained(directory)
            self.teacher.tokenizer.save_pretrained(directory)
            return sum(len(spec.get("memory_heads", ())) for spec in student.config.layer_specs)

        self.stored(f"{MEMORY}, {self.memory}, budget {budget}", save)
        return load_eval_model(str(directory), name, self.placement)

    def whole_heads(self, budget: int) -> int:
        """How many heads are whole where half of the budget's tokens go to them, and half to the windows."""
        streaming = budget // 2 + SINKS
        return len(self.heads) * (budget + SINKS - streaming) // (self.context - streaming)

    def streaming(self, budget: int) -> dict[str, Any]:
        """Layer types where heads that retrieve are whole, at the price of `context` tokens; others share the rest."""

        def rank() -> list[tuple[int, int | None]]:
            ids = self.calibration_ids().flatten()
            teacher = self.teacher
            ranked = rank_groups(teacher.model, teacher.tokenizer, ids, keep=most, attention_layers=self.layers)
            return [(unit.layer, unit.kv_head) for unit in ranked]

        most, whole, count = max(map(self.whole_heads, self.budgets)), self.whole_heads(budget), len(self.heads)
        ranked = [tuple(unit) for unit in self.stored(f"ranking by retrieval, {most} whole", rank)]
        tokens = (count * (budget + SINKS) - whole * self.context) // (count - whole)
        windows: list[list[int | str]] = [[] for _ in self.layers]
        for head in self.heads:
            # the bytes of one token are left for the rotation of sinks
            windows[head[0]].append(FULL if head in ranked[:whole] else tokens - SINKS)
        return {str(i): {**uniform_window(1), "window": own} for i, own in enumerate(windows)}

    def trained(
        self, recipe: Recipe, budgets: Sequence[int], output: Path
    ) -> Iterator[tuple[Row, Callable[[], EvalModel]]]:
        """Trains the students by the recipe, with the same tokens; finished ones are not trained again. Memories start
        from what is fitted on the recipe's text."""
        students = {Row(f"{recipe.student.name}, trained", RECIPE, trained=True): recipe}
        for n in budgets:
            made: list[tuple[str, str, dict[str, Any]]]
            made = [(WINDOW, window_name(n), {"layer_types": {"default": uniform_window(n)}})]
            with suppress(UserError):  # its row without training has failed
                made.append((BUDGET, f"{BUDGET} {n}", {"layer_types": self.by_error(n)}))
            if self.memory is not None:
                made.append((MEMORY, f"{MEMORY} {n}", {"budget": n, "budget_memory": self.memory}))
            for method, name, student in made:
                changed = Recipe.model_validate({**recipe.model_dump(mode="json"), "student": student})
                students[Row(f"{name}, trained", method, n, True)] = changed
        run_study([*students.values()], output, log=print)
        for row, run in zip(students, find_runs([*students.values()], output), strict=True):
            if run.state == "finished":
                yield row, partial(load_eval_model, str(run.directory), row.model, self.placement)
            else:
                logger.warning("%s failed: %s", row.model, run.error_line())
                self.evaluation.failed[row.model] = run.error_line()


def window_name(window: int) -> str:
    return f"window {window} + {SINKS} sinks"
