"""Zero-shot benchmarks by `lm-eval` (extra `subquad[eval]`) on a loaded model.

A task is either a task name of lm-eval, whose data comes from a hub, or a local file `NAME.jsonl` (also .gz) in one of
four formats (`FORMATS`), from which an lm-eval task with the usual prompt and metrics is made.
"""

import functools
import gzip
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.evaluate.results import Result
from subquad.evaluate.task_scores import TaskScores
from subquad.utils import UserError, cache_dir, eval_mode, nearest, needs_extra, write_text_atomic

HUB_TASKS = (
    "lambada_openai",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "hellaswag",
    "winogrande",
    "openbookqa",
    "boolq",
)
"""The default tasks."""

CHOICE = {"output_type": "multiple_choice"}
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
NORMALIZED = [*ACCURACY, {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
FORMATS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        **CHOICE,
        "doc_to_text": "{{query.strip()}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": NORMALIZED,
    },
    ("context_options", "continuation", "gold"): {
        **CHOICE,
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": ACCURACY,
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation.strip()}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            *ACCURACY,
        ],
    },
    ("sentence_good", "sentence_bad"): {
        **CHOICE,
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "metric_list": ACCURACY,
    },
}
"""The keys of an item, and the task definition for lm-eval: multiple choice; several contexts with one continuation
(WinoGrande); last words (LAMBADA); minimal pairs (BLiMP)."""


@dataclass(frozen=True)
class Task:
    """A task by name. file: its items; None for a task of lm-eval. keys: the items' format, a key of `FORMATS`."""

    name: str
    file: Path | None = None
    keys: tuple[str, ...] = ()

    @property
    def is_last_word(self) -> bool:
        """Whether it is a last-word task."""
        return self.keys == ("context", "continuation")

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name, and path, size and modification time of the file: what stored scores depend on."""
        if self.file is None:
            return (self.name,)
        status = self.file.stat()
        return self.name, str(self.file.resolve()), status.st_size, status.st_mtime_ns

    def to_lm_eval(self) -> str | dict[str, Any]:
        """The task's name, or its definition."""
        if self.file is None:
            return self.name
        return {
            "task": self.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(self.cached_items())}},
            "test_split": "test",
            **FORMATS[self.keys],
        }

    def cached_items(self) -> Path:
        """A copy of the items in the cache with the keys of the format only: lm-eval cannot load files with a key of
        several types, as BLiMP has one."""
        lines = [json.dumps({key: item[key] for key in self.keys}) + "\n" for item in self.items()]
        text = "".join(lines)
        copy = cache_dir() / "items" / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(copy, text)
        return copy

    def items(self) -> list[dict[str, Any]]:
        """The items of the file. Raises UserError if one lacks a key of the format."""
        assert self.file is not None, self.name
        items = read_items(self.file)
        for number, item in enumerate(items, 1):
            missing = [key for key in self.keys if not isinstance(item, dict) or key not in item]
            if missing:
                raise UserError(f"{self.file}: item {number} has no {', '.join(missing)}")
        return items


@dataclass(frozen=True)
class TaskResult:
    """Results of a task, `acc` of each item (`[n]`, in the order of the items), and the expected accuracy of guessing.

    Stored as a dict: its keys must not change.
    """

    results: list[Result]
    scores: Tensor
    chance: float

    def as_dict(self) -> dict[str, Any]:
        results = [result.as_dict() for result in self.results]
        return {"rows": results, "scores": self.scores.tolist(), "chance": self.chance}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TaskResult":
        scores = torch.tensor(values["scores"], dtype=torch.float64)
        return cls([Result.from_dict(result) for result in values["rows"]], scores, values["chance"])

    def paired_with(self, teacher: "TaskResult") -> TaskScores:
        return TaskScores(self.scores, teacher.scores, self.chance)


def read_items(file: Path) -> list[dict[str, Any]]:
    """The items of a JSON Lines file. Raises UserError with file and line if a line is not JSON."""
    opened: Any = gzip.open if file.suffix == ".gz" else open
    items = []
    number = 0
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    items.append(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {number} is not JSON: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not items:
        raise UserError(f"{file}: got no items, expected one JSON object per line")
    return items


def local_tasks(data: Path) -> dict[str, Task]:
    """The tasks in a directory of `NAME.jsonl` files, by name. A file's first item tells its format."""
    if not data.is_dir():
        raise UserError(f"data: {str(data)!r} is not a directory, expected one with files NAME.jsonl or NAME.jsonl.gz")
    found = {}
    for file in sorted([*data.glob("*.jsonl"), *data.glob("*.jsonl.gz")]):
        name = file.name.partition(".jsonl")[0]
        found[name] = Task(name, file, item_format(file))
    if not found:
        raise UserError(f"data: {str(data)!r} holds no NAME.jsonl or NAME.jsonl.gz")
    return found


def item_format(file: Path) -> tuple[str, ...]:
    """The format of a file's first item, a key of `FORMATS`. Raises UserError if it has none of them."""
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: the first line is not JSON: {error}") from error
    for keys in FORMATS:
        if isinstance(first, dict) and all(key in first for key in keys):
            return keys
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise UserError(f"{file}: got items of an unknown format, expected the keys {known}")


def find_tasks(names: Sequence[str] | None, data: Path | None, include: Path | None = None) -> list[Task]:
    """The named tasks; without names all tasks in the directory `data`, or `HUB_TASKS` without one.

    include: a directory of task definitions for lm-eval (its `--include_path`).

    Raises:
        UserError: a name that is neither a file in `data` nor a task of lm-eval; lm-eval is not installed.
    """
    with needs_extra("suite zero-shot", "eval"):
        import lm_eval  # noqa: F401
    local = {} if data is None else local_tasks(data)
    if names is None:
        return list(local.values()) if local else [Task(name) for name in HUB_TASKS]
    others = [name for name in names if name not in local]
    if others:
        known = set(task_manager(include, True).all_tasks)
        for name in others:
            if name not in known:
                raise UserError(f"tasks: got {name!r}{nearest(name, [*local, *sorted(known)])[:200]}")
    return [local.get(name, Task(name)) for name in names]


@functools.lru_cache(maxsize=4)
def task_manager(include: Path | None, defaults: bool) -> Any:
    """lm-eval's task manager. defaults: with the tasks that lm-eval ships, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Indices of all of `count` items, or of `limit` evenly spaced ones."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def context_limit(model: PreTrainedModel) -> int:
    """The context length of the model; for a student that of its teacher, so that both read the same prompts."""
    config = getattr(model.config, "base_config", model.config).get_text_config()
    return getattr(config, "max_position_embeddings", None) or 2048


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    include: Path | None = None,
) -> TaskResult:
    """A task's results, as `lm_eval --model hf` reports them: all metrics with standard errors, and `acc` of each item.

    limit: maximum number of items of each task (of a group: of each task in it), evenly spaced over all of them.

    Raises:
        UserError: lm-eval cannot run the task (for example because a hub cannot be reached).
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import get_task_dict

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, definition = task_manager(include, task.file is None), task.to_lm_eval()
    with eval_mode(model):
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,  # type: ignore[arg-type]
            batch_size=batch_size,
            max_length=context_limit(model),
            device=str(model.device),
        )
        try:
            loaded = {} if limit is None else dict(_single_tasks(get_task_dict([definition], manager)))
            found: Any = lm_eval.simple_evaluate(
                lm,
                tasks=[definition],
                task_manager=manager,
                bootstrap_iters=1000,
                samples={name: evenly_spaced(len(one.eval_docs), limit) for name, one in loaded.items()} or None,
            )
        except Exception as error:
            cause = error.__cause__ or error  # `datasets` wraps the cause
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            raise UserError(f"task {task.name!r}: lm-eval cannot run it: {lines[0]}") from error
    results = [result for name, values in found["results"].items() for result in _task_results(name, values, found)]
    samples = found["samples"].get(task.name, [])
    scores = torch.tensor([float(sample["acc"]) for sample in samples if "acc" in sample], dtype=torch.float64)
    choices = [len(sample["arguments"]) for sample in samples]
    chances = [1 / n if n > 1 else 0.0 for n in choices]
    return TaskResult(results, scores, sum(chances) / len(chances) if chances else 0.0)


def _single_tasks(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks of lm-eval's tree of groups, by name."""
    for name, value in tasks.items():
        if isinstance(value, dict):
            yield from _single_tasks(value)
        else:
            yield name, value


def _task_results(name: str, values: dict[str, Any], found: dict[str, Any]) -> list[Result]:
    """From lm-eval's form, `"acc,none": 0.5, "acc_stderr,none": 0.01`."""
    count = found.get("n-samples", {}).get(name, {}).get("effective")
    results = []
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        stderr = error if isinstance(error, float) else None
        results.append(Result(name, metric if kind == "none" else f"{metric},{kind}", float(value), stderr, n=count))
    return results
