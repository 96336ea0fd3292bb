"""An evaluation as a list of jobs, whose outcomes can be stored, and the results computed from those outcomes."""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data import RowSlice, token_rows
from subquad.evaluate.baselines import SINKS, int8_teacher, windowed_teacher
from subquad.evaluate.results import Result, label_results
from subquad.evaluate.suites import Settings
from subquad.registry import SUITES
from subquad.utils import UserError

FORMAT = 2
"""Version of what stored outcomes mean; a higher one makes older outcomes invalid."""
LIBRARIES = ("subquad", "torch", "transformers", "lm-eval")
"""Libraries whose other versions may measure other numbers."""


@functools.cache
def versions() -> tuple[Any, ...]:
    """`FORMAT` and the installed versions of `LIBRARIES`; None for one that is not installed."""
    return FORMAT, *(
        importlib.metadata.version(name) if any(importlib.metadata.distributions(name=name)) else None
        for name in LIBRARIES
    )


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate.

    identity: two models with equal identity have equal results; for files their sizes and modification times. Without
    one, a hash of the model's configuration, weights and vocabulary is taken when outcomes are stored.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: tuple[Any, ...] = ()

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[return-value, union-attr]

    @functools.cached_property
    def key(self) -> str:
        """What stored outcomes know the model by."""
        if self.identity:
            return json.dumps(self.identity, default=str)
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        digest.update(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            for part in plain_tensors(tensor):
                digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or those that a subclass consists of, as a quantized weight does."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


@dataclass(frozen=True)
class EvalJob:
    """A computation whose outcome is JSON.

    dependencies: everything besides the name and the versions of libraries that the outcome depends on, models too.
    """

    name: str
    dependencies: tuple[Any, ...]
    compute: Callable[[], Any]

    @property
    def key(self) -> str:
        """The name of the outcome's file: a hash of name, versions and dependencies."""

        def describe(value: Any) -> str:
            return value.key if isinstance(value, EvalModel) else str(value)

        text = json.dumps([self.name, versions(), *self.dependencies], sort_keys=True, default=describe)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Evaluation:
    """The jobs of an evaluation, and its results from their outcomes.

    models: the students, the teacher and, with `settings.baselines`, the baseline models.

    Raises:
        UserError: models that cannot be compared (`check_models`).
    """

    def __init__(self, students: Sequence[EvalModel], teacher: EvalModel | None, settings: Settings):
        check_models(students, teacher)
        self.students, self.teacher, self.settings = list(students), teacher, settings
        self.models = [*students, *([teacher] if teacher is not None else [])]
        if settings.baselines and teacher is not None:
            self.models += baseline_models(teacher, settings.baseline_window)
        self.suites = [SUITES[name] for name in settings.suites]
        self._cache: dict[tuple[int, Any], Any] = {}

    def jobs(self) -> list[EvalJob]:
        return [job for suite in self.suites for job in suite.jobs(self)]

    def results(self, outcomes: Mapping[str, Any]) -> list[Result]:
        """Results from outcomes by job name. Jobs without an outcome give no results."""
        teacher = None if self.teacher is None else self.teacher.name
        found: list[Result] = []
        for model in self.models:
            results = [result for suite in self.suites for result in suite.results(self, model, outcomes)]
            found += label_results(model.name, teacher, results)
        return found

    # ------------------------------------------------------------------ for suites

    def job(
        self,
        name: str,
        model: EvalModel,
        dependencies: tuple[Any, ...],
        compute: Callable[[], Any],
        teacher: EvalModel | None = None,
    ) -> EvalJob:
        """A job for one model, named `name: model`. teacher: given if the outcome depends on it."""
        reference = () if teacher is None else (teacher.name, teacher)
        return EvalJob(f"{name}: {model.name}", (model, *reference, *dependencies), compute)

    @property
    def text_key(self) -> dict[str, Any]:
        """The validation text as a job's dependency."""
        return self.settings.text.model_dump(mode="json", exclude_defaults=True)

    @property
    def text_name(self) -> str:
        """The file name of the validation text: the `task` of results measured on it."""
        source = self.settings.text.validation or self.settings.text.source
        return Path(source).name if isinstance(source, str) else " + ".join(Path(name).name for name in source)

    def cached(self, model: EvalModel, name: Any, read: Callable[[], Any]) -> Any:
        """`read()`, called once per name and tokenizer."""
        key = (id(model.tokenizer), name)
        if key not in self._cache:
            self._cache[key] = read()
        return self._cache[key]

    def validation_rows(self, model: EvalModel, tokens: int | None = None) -> RowSlice:
        """Rows of the validation text with about `tokens` tokens in all (default: `settings.tokens`)."""
        s, limit = self.settings, tokens or self.settings.tokens
        rows = self.cached(model, limit, lambda: token_rows(s.text, model.tokenizer, "validation", limit=limit))
        return rows.take(len(rows))

    def validation_ids(self, model: EvalModel, tokens: int) -> Tensor:
        """The token ids of these rows, `[rows, text.seq_len]`."""
        rows = self.validation_rows(model, tokens)
        return torch.stack([rows[i]["input_ids"] for i in range(len(rows))])

    def diagnostic_ids(self, model: EvalModel) -> Tensor:
        """The texts for diagnostics, `[diag_rows, at most diag_tokens]`."""
        s = self.settings
        return self.validation_ids(model, s.diag_rows * s.text.seq_len)[: s.diag_rows, : s.diag_tokens]


def check_models(models: Sequence[EvalModel], teacher: EvalModel | None) -> None:
    """Raises UserError for two models of one name, or a model whose vocabulary differs from the teacher's."""
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1 or (teacher is not None and name == teacher.name):
            raise UserError(f"models: got {name!r} twice, expected different names")
    if teacher is None:
        return
    for model in models:
        if model.vocab_size != teacher.vocab_size or model.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise UserError(
                f"teacher: {teacher.name!r} and {model.name!r} have different vocabularies ({teacher.vocab_size} and "
                f"{model.vocab_size} tokens); expected the teacher that {model.name!r} was made from"
            )


def baseline_models(teacher: EvalModel, window: int) -> list[EvalModel]:
    """The teacher in int8, and with sliding-window attention of `window` tokens."""
    return [
        replace(teacher, name=f"{teacher.name}, int8", model=int8_teacher(teacher.model)),
        replace(
            teacher, name=f"{teacher.name}, window {window}+{SINKS}", model=windowed_teacher(teacher.model, window)
        ),
    ]
