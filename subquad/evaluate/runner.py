"""Runs the suites of an evaluation. Finished jobs are stored, so that an interrupted evaluation continues.

    results, failed = evaluate([EvalModel("gla", student, tokenizer)], EvalModel("nano", teacher, tokenizer), QUICK)

An output directory holds `jobs/` (one file per finished job, named by a hash of everything that its outcome depends
on) and `results.json` (a header and all results), written at the end and on interruption.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data import token_rows
from subquad.data.packing import PackedDataset
from subquad.evaluate.baselines import CONTEXT, equal_bytes, int8_teacher, windowed_teacher
from subquad.evaluate.results import Result, label_results
from subquad.evaluate.suites import Settings
from subquad.modeling.budget import SINKS
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.placement import Placement
from subquad.modeling.teachers import load_placed, resolve_reference
from subquad.registry import SUITES
from subquad.utils import UserError, run_info, write_json_atomic

logger = logging.getLogger(__name__)
FORMAT = 2
"""Version of what stored outcomes mean; a higher one makes older outcomes invalid."""
CACHE = "cache"
"""The task of results about caches."""
LIBRARIES = ("subquad", "torch", "transformers", "lm-eval")
"""Libraries whose other versions may measure other numbers."""


@functools.cache
def versions() -> list[Any]:
    """`FORMAT` and the installed versions of `LIBRARIES`; none for one that is not installed."""
    return [FORMAT, *([found.version for found in importlib.metadata.distributions(name=name)] for name in LIBRARIES)]


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

    def variant(self, name: str, model: PreTrainedModel) -> "EvalModel":
        """A model made from this one in the way that `name` says."""
        return replace(self, name=f"{self.name}, {name}", model=model)

    @functools.cached_property
    def key(self) -> str:
        """What stored outcomes know the model by."""
        if self.identity:
            return json.dumps(self.identity, default=str)
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        digest.update(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        torch.save(self.model.state_dict(), SimpleNamespace(write=digest.update, flush=digest.digest))
        return digest.hexdigest()


def load_eval_model(reference: str, name: str | None = None, placement: Placement | None = None) -> EvalModel:
    """Loads a model to evaluate: anything that `load_teacher` loads. Raises UserError if there is no such model.

    name: default: the name of the directory or file, else `reference`. placement: default: float32, on a GPU if there
    is one.
    """
    placement = placement or Placement()
    path, given = resolve_reference(reference), Path(reference).expanduser()
    model, tokenizer = load_placed(reference, placement)
    files = [] if path is None else [path] if path.is_file() else sorted(path.iterdir())
    identity = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.suffix in (".safetensors", ".gguf") or file.name in ("config.json", "tokenizer.json")
    ]
    name = name or (given.resolve().name if given.exists() else reference)
    other = tuple(value for value in placement[1:] if value not in ("float32", None))
    return EvalModel(name, model, tokenizer, (reference, *other, *identity))


class Evaluation:
    """What a suite measures, and where it stores what it has measured.

    output: a directory; jobs whose outcome it holds are not computed again. None: nothing is written. figures: whether
    suites that have figures draw them into `output`/figures.

    `models` are the students, the teacher and the baselines of `settings`. `caches` are results by the model's name:
    the bytes of its cache, and the uniform window of equal bytes (`equal_bytes`). `failed` has the error messages of
    failed jobs by job name.

    Raises:
        UserError: models that cannot be compared (`check_models`).
    """

    def __init__(
        self,
        students: Sequence[EvalModel],
        teacher: EvalModel | None,
        settings: Settings,
        output: str | Path | None = None,
        figures: bool = False,
    ):
        check_models(students, teacher)
        self.students, self.teacher, self.settings = list(students), teacher, settings
        self.output = None if output is None else Path(output)
        self.figures = self.output / "figures" if self.output is not None and figures else None
        self.outcomes: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.caches: dict[str, list[Result]] = {}
        self._cache: dict[tuple[int, Any], Any] = {}
        self.models = list(students)
        if teacher is not None:
            self.models += self._equal_windows(teacher) if "window" in settings.baselines else []
            self.models.append(teacher)
            self.models += (
                [teacher.variant("int8", int8_teacher(teacher.model))] if "int8" in settings.baselines else []
            )

    def _equal_windows(self, teacher: EvalModel) -> list[EvalModel]:
        """The teacher behind each window that has as many bytes as a student. Fills `caches`."""

        def state_bytes(size: int) -> Result:
            return Result(CACHE, "state_bytes", float(size), length=CONTEXT)

        windows: dict[int, EvalModel] = {}
        for student in self.students:
            if not isinstance(student.model, SubquadForCausalLM):
                continue
            found = equal_bytes(student.model)
            self.caches[student.name] = [state_bytes(found.student)]
            self.caches.setdefault(teacher.name, [state_bytes(found.teacher)])
            if found.window is None:
                continue
            self.caches[student.name].append(Result(CACHE, "equal_window", float(found.window)))
            if found.window in windows:
                continue
            name = f"window {found.window} + {SINKS} sinks"
            try:
                model = windowed_teacher(teacher.model, found.window)
            except UserError as error:  # the student is of another teacher
                self.failed[f"{teacher.name}, {name}"] = str(error)
                continue
            windows[found.window] = made = teacher.variant(name, model)
            self.caches[made.name] = [state_bytes(equal_bytes(model).student)]
        return [*windows.values()]

    def outcome(self, name: str, model: EvalModel, dependencies: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The outcome of the job `name: model`: `compute()`, which is JSON, once; None if it raises UserError.

        dependencies: everything besides model, name and versions of libraries that the outcome depends on.
        """
        job = f"{name}: {model.name}"
        if job in self.outcomes or job in self.failed:
            return self.outcomes.get(job)
        file = None
        if self.output is not None:
            key = [job, versions(), model, *dependencies]
            everything = json.dumps(key, sort_keys=True, default=lambda value: getattr(value, "key", str(value)))
            file = self.output / "jobs" / f"{hashlib.sha256(everything.encode()).hexdigest()[:16]}.json"
        stored = file is not None and file.exists()
        logger.info("%s%s", job, ": finished already" if stored else "")
        try:
            self.outcomes[job] = json.loads(file.read_text())["outcome"] if file is not None and stored else compute()
        except UserError as error:
            self.failed[job] = str(error)
            logger.warning("%s failed: %s", job, error)
            return None
        if file is not None and not stored:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(file, {"job": job, "outcome": self.outcomes[job]})
        return self.outcomes[job]

    def results(
        self, name: str, model: EvalModel, dependencies: Sequence[Any], compute: Callable[[], Iterable[Result]]
    ) -> list[Result]:
        """As `outcome`, of results; none if the job fails."""
        outcome = self.outcome(name, model, dependencies, lambda: [result.as_dict() for result in compute()])
        return [Result(**result) for result in outcome or ()]

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

    def validation_rows(self, model: EvalModel, tokens: int | None = None) -> PackedDataset:
        """Rows of the validation text with about `tokens` tokens in all (default: `settings.tokens`)."""
        s, limit = self.settings, tokens or self.settings.tokens
        return self.cached(model, limit, lambda: token_rows(s.text, model.tokenizer, "validation", limit=limit))

    def validation_ids(self, model: EvalModel, tokens: int) -> Tensor:
        """The token ids of these rows, `[rows, text.seq_len]`."""
        return torch.stack([row["input_ids"] for row in self.validation_rows(model, tokens)])


def evaluate(
    models: Sequence[EvalModel],
    teacher: EvalModel | None,
    settings: Settings,
    output: str | Path | None = None,
    recipe: Any = None,
    figures: bool = False,
) -> tuple[list[Result], dict[str, str]]:
    """Evaluates models, compared with their teacher if there is one.

    Args:
        output, figures: as of `Evaluation`; figures are SVG and PNG.
        recipe: written into the header of `results.json`.

    Returns:
        All results, and the error messages of failed jobs by job name.

    Raises:
        UserError: models that cannot be compared; raised before anything is measured.
    """
    evaluation = Evaluation(models, teacher, settings, output, figures)
    if evaluation.figures is not None:
        evaluation.figures.mkdir(parents=True, exist_ok=True)
    by_model = {model.name: evaluation.caches.get(model.name, []) for model in evaluation.models}
    complete = False
    try:
        for suite in settings.suites:
            for model in evaluation.models:
                by_model[model.name] += SUITES[suite](evaluation, model)
        complete = True
    finally:
        reference = None if teacher is None else teacher.name
        results = [result for name, own in by_model.items() for result in label_results(name, reference, own)]
        if evaluation.output is not None:
            jobs = {"complete": complete, "finished": len(evaluation.outcomes), "failed": evaluation.failed}
            found = [result.as_dict() for result in results]
            evaluation.output.mkdir(parents=True, exist_ok=True)
            path = evaluation.output / "results.json"
            header = run_info(evaluation.models[0].model.device)
            write_json_atomic(path, {**header, "recipe": recipe, "jobs": jobs, "results": found})
    return results, evaluation.failed


def check_models(models: Sequence[EvalModel], teacher: EvalModel | None) -> None:
    """Raises UserError for two models of one name, or a model whose vocabulary differs from the teacher's."""
    names = [model.name for model in [*models, *([] if teacher is None else [teacher])]]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"models: got {repeated[0]!r} twice, expected different names")
    if teacher is None:
        return
    for model in models:
        if model.vocab_size != teacher.vocab_size or model.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise UserError(
                f"teacher: {teacher.name!r} and {model.name!r} have different vocabularies ({teacher.vocab_size} and "
                f"{model.vocab_size} tokens); expected the teacher that {model.name!r} was made from"
            )
