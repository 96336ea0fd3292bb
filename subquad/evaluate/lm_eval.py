"""Zero-shot benchmarks through `lm-eval` (extra `subquad[eval]`), the model passed in.

A task is a name of lm-eval's, whose data comes from a hub, or a file `NAME.jsonl` (also .gz) in a directory of data,
in one of four simple formats (`FORMATS`), which becomes a task of lm-eval's by the same prompts and metrics.
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.evaluate.recovery import TaskScores
from subquad.evaluate.results import Result
from subquad.utils import UserError, cache_dir, eval_mode, nearest, write_text_atomic

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
"""Those that are run where nothing else is said and no directory of data is given."""

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
"""What a line of a file of items holds, and how lm-eval is to ask it: questions with choices; one ending for several
beginnings (WinoGrande's form); a last word (LAMBADA's); a good and a bad sentence (BLiMP's)."""


@dataclass(frozen=True)
class Task:
    """A task by name; `file`: where its items are, if not with lm-eval; `keys`: which of `FORMATS` they have."""

    name: str
    file: Path | None = None
    keys: tuple[str, ...] = ()

    @property
    def words(self) -> bool:
        """Whether its items ask for a last word."""
        return self.keys == ("context", "continuation")

    def as_lm_eval(self) -> str | dict[str, Any]:
        if self.file is None:
            return self.name
        return {
            "task": self.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(self.plain_items())}},
            "test_split": "test",
            **FORMATS[self.keys],
        }

    def plain_items(self) -> Path:
        """A copy in the cache with nothing but the keys of its format: a key of several types (BLiMP has one)
        cannot be loaded by lm-eval."""
        lines = [json.dumps({key: item[key] for key in self.keys}) + "\n" for item in self.items()]
        text = "".join(lines)
        copy = cache_dir() / "items" / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(copy, text)
        return copy

    def items(self) -> list[dict[str, Any]]:
        """The items of a file; UserError where one lacks a key of the format."""
        assert self.file is not None, self.name
        items = read_items(self.file)
        for number, item in enumerate(items, 1):
            missing = [key for key in self.keys if not isinstance(item, dict) or key not in item]
            if missing:
                raise UserError(f"{self.file}: item {number} lacks {', '.join(missing)}")
        return items


@dataclass(frozen=True)
class TaskResult:
    """Rows of results, each item's `acc` (`[n]`, in the order of items), and the accuracy of guessing."""

    rows: list[Result]
    scores: Tensor
    chance: float

    def as_dict(self) -> dict[str, Any]:
        rows = [row.as_dict() for row in self.rows]
        return {"rows": rows, "scores": self.scores.tolist(), "chance": self.chance}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TaskResult":
        scores = torch.tensor(values["scores"], dtype=torch.float64)
        return cls([Result.from_dict(row) for row in values["rows"]], scores, values["chance"])

    def beside(self, teacher: "TaskResult") -> TaskScores:
        return TaskScores(self.scores, teacher.scores, self.chance)


def read_items(file: Path) -> list[dict[str, Any]]:
    """UserError with file and line where one is not JSON."""
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
        raise UserError(f"{file}: has no items; expected a JSON object a line")
    return items


def local_tasks(data: Path) -> dict[str, Task]:
    """The tasks that a directory of data holds, by name, told from their first items."""
    if not data.is_dir():
        raise UserError(f"data {str(data)!r} is not a directory; expected one with files NAME.jsonl or NAME.jsonl.gz")
    found = {}
    for file in sorted([*data.glob("*.jsonl"), *data.glob("*.jsonl.gz")]):
        name = file.name.partition(".jsonl")[0]
        found[name] = Task(name, file, item_format(file))
    if not found:
        raise UserError(f"data {str(data)!r} holds no NAME.jsonl or NAME.jsonl.gz")
    return found


def item_format(file: Path) -> tuple[str, ...]:
    """Which of `FORMATS` the first item of a file has; UserError where it is none."""
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: its first line cannot be read as JSON: {error}") from error
    for keys in FORMATS:
        if isinstance(first, dict) and all(key in first for key in keys):
            return keys
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise UserError(f"{file}: items of an unknown format; expected the keys {known}")


def find_tasks(names: Sequence[str] | None, data: Path | None, include: Path | None = None) -> list[Task]:
    """The tasks that are meant, or all of a directory of data (without one, `HUB_TASKS`).

    include: a directory of task definitions of lm-eval's own kind (its `--include_path`).

    Raises:
        UserError: a name that is neither a file of `data` nor a task of lm-eval; `lm-eval` is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-eval; pip install 'subquad[eval]'")
    here = {} if data is None else local_tasks(data)
    if names is None:
        return list(here.values()) if here else [Task(name) for name in HUB_TASKS]
    elsewhere = [name for name in names if name not in here]
    if elsewhere:
        known = set(manager(include, True).all_tasks)
        for name in elsewhere:
            if name not in known:
                raise UserError(f"unknown task {name!r}{nearest(name, [*here, *sorted(known)])[:200]}")
    return [here.get(name, Task(name)) for name in names]


@functools.lru_cache(maxsize=4)
def manager(include: Path | None, defaults: bool) -> Any:
    """lm-eval's tasks; finding its own (`defaults`) takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)


def spread(count: int, limit: int | None) -> list[int]:
    """Which of `count` items to ask: all, or `limit` of them, evenly spread."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def context_limit(model: PreTrainedModel) -> int:
    """Tokens that the teacher was made to read; a student is asked no longer texts than its teacher."""
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
    """One task's scores, as `lm_eval --model hf` gives them: every metric of the task with its standard error, and each
    item's accuracy.

    limit: at most so many items, evenly spread over a file, the first ones of a hub's data.

    Raises:
        UserError: lm-eval cannot run the task (its data is on a hub that cannot be reached, say).
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    some: dict[str, Any] = {"limit": limit}
    if task.file is not None:
        some = {"samples": {task.name: spread(len(task.items()), limit)}}
    with eval_mode(model):
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,  # type: ignore[arg-type]
            batch_size=batch_size,
            max_length=context_limit(model),
            device=str(model.device),
        )
        try:
            found: Any = lm_eval.simple_evaluate(
                lm,
                tasks=[task.as_lm_eval()],
                task_manager=manager(include, task.file is None),
                bootstrap_iters=1000,
                **some,
            )
        except Exception as error:
            why = error.__cause__ or error  # `datasets` wraps what went wrong
            lines = str(why).strip().splitlines() or [type(why).__name__]
            raise UserError(f"task {task.name!r}: lm-eval cannot run it: {lines[0]}") from error
    rows = [row for name, values in found["results"].items() for row in _rows(name, values, found)]
    samples = found["samples"].get(task.name, [])
    scores = torch.tensor([float(sample["acc"]) for sample in samples if "acc" in sample], dtype=torch.float64)
    choices = [len(sample["arguments"]) for sample in samples]
    guessed = [1 / n if n > 1 else 0.0 for n in choices]
    return TaskResult(rows, scores, sum(guessed) / len(guessed) if guessed else 0.0)


def _rows(name: str, values: dict[str, Any], found: dict[str, Any]) -> list[Result]:
    """lm-eval writes `"acc,none": 0.5, "acc_stderr,none": 0.01`."""
    count = found.get("n-samples", {}).get(name, {}).get("effective")
    rows = []
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        rows.append(
            Result(
                name,
                metric if kind == "none" else f"{metric},{kind}",
                float(value),
                stderr=error if isinstance(error, float) else None,
                n=count,
            )
        )
    return rows
