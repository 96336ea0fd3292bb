"""Zero-shot benchmarks by `lm-eval` (extra `subquad[eval]`) on a loaded model.

A task is a name: one that lm-eval ships, whose data comes from a hub, or one of a directory of definitions. A local
file `NAME.jsonl` (also .gz) in one of four formats (`FORMATS`) becomes such a directory.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.corpora import text_lines
from subquad.evaluate.results import Result
from subquad.hub import any_dataset_cached, hub_access, hub_problem, is_dataset_cached
from subquad.utils import UserError, as_user_error, cache_dir, eval_mode, nearest, needs_extra, write_text_atomic

HUB_TASKS = ("lambada_openai", "arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa", "boolq")
"""The default tasks."""

FORMATS = {
    "multiple_choice": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
    "last_words": ("context", "continuation"),
    "minimal_pairs": ("sentence_good", "sentence_bad"),
}
"""The keys of an item by format, whose task definition is `tasks/FORMAT.yaml`."""


@dataclass(frozen=True)
class Task:
    """A task by name. directory: of its definition, if it is made from a file, and then named by a hash of the items.

    generated: the same task by generation, for last words.
    """

    name: str
    directory: Path | None = None
    generated: "Task | None" = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What stored scores depend on."""
        return self.name, None if self.directory is None else self.directory.name


@dataclass(frozen=True)
class TaskResult:
    """Results of a task, the accuracy of each item (in the order of the items), and that of guessing."""

    results: list[Result]
    scores: list[float]
    chance: float


# ---------------------------------------------------------------------- tasks


def find_tasks(names: Sequence[str] | None, data: Path | None, include: Path | None = None) -> list[Task]:
    """The named tasks; without names all tasks in the directory `data`, or `HUB_TASKS` without one.

    data: a directory of files NAME.jsonl or NAME.jsonl.gz. include: one of task definitions for lm-eval (its
    `--include_path`).

    Raises:
        UserError: a name that is neither a file in `data` nor a task of lm-eval; a file that cannot be read; lm-eval is
            not installed; a task whose items are on the hub, without a network.
    """
    files = {}
    if data is not None:
        if not data.is_dir():
            raise UserError(f"data: {str(data)!r} is not a directory, expected one with files NAME.jsonl(.gz)")
        found = sorted([*data.glob("*.jsonl"), *data.glob("*.jsonl.gz")])
        if not found:
            raise UserError(f"data: {str(data)!r} holds no NAME.jsonl or NAME.jsonl.gz")
        files = {file.name.partition(".jsonl")[0]: file for file in found}
    chosen = names or list(files) or HUB_TASKS
    others = [name for name in chosen if name not in files]
    task_manager(include, False)  # is lm-eval installed? To read the tasks that it ships takes many seconds.
    problem = hub_problem() if others else None
    if problem and chosen is HUB_TASKS and not any_dataset_cached():
        raise no_items(others, problem)
    known = task_manager(include, True).task_index if others else {}
    for name in others:
        if name not in known:
            raise UserError(f"tasks: got {name!r}{nearest(name, [*files, *known])[:200]}")
    if problem and (missing := [name for name in others if needs_hub(known[name].cfg or {})]):
        raise no_items(missing, problem)
    return [local_task(name, files[name]) if name in files else Task(name) for name in chosen]


def needs_hub(definition: Mapping[str, Any]) -> bool:
    """Whether the items of a task have to be downloaded; of a group it is unknown."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    name = definition.get("dataset_path")
    if name is None or name in _PACKAGED_DATASETS_MODULES or Path(name).exists():
        return False
    return not is_dataset_cached(name)


def no_items(names: Sequence[str], problem: str) -> UserError:
    return UserError(
        f"tasks: the items of {', '.join(names)} are on the hub, and there is no network: {problem}; expected items "
        "in a directory (--data DIR), or suites without zero-shot"
    )


def local_task(name: str, file: Path) -> Task:
    """Writes the items of a file and their task definition, NAME.yaml, into a directory of the cache.

    Only the keys of the format are written: lm-eval cannot load files with a key of several types, as BLiMP has one.

    Raises:
        UserError: a line is not an item of the format of the first line, with file and line.
    """
    items = list(read_items(file))
    if not items:
        raise UserError(f"{file}: got no items, expected one JSON object per line")
    form = next((form for form, keys in FORMATS.items() if set(keys) <= items[0].keys()), None)
    if form is None:
        known = "; ".join(", ".join(keys) for keys in FORMATS.values())
        raise UserError(f"{file}: got items of an unknown format, expected the keys {known}")
    for number, item in enumerate(items, 1):
        if missing := [key for key in FORMATS[form] if key not in item]:
            raise UserError(f"{file}: item {number} has no {', '.join(missing)}")
    content = "".join(json.dumps({key: item[key] for key in FORMATS[form]}) + "\n" for item in items)
    definitions = {name: form, **({f"{name}_generated": "generated_words"} if form == "last_words" else {})}
    texts = {task: (Path(__file__).parent / "tasks" / f"{form}.yaml").read_text() for task, form in definitions.items()}
    digest = hashlib.sha256(f"{texts}{content}".encode()).hexdigest()[:16]
    directory = cache_dir() / "items" / f"{name}-{digest}"
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomic(directory / f"{name}.jsonl", content)
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(directory / f"{name}.jsonl")}}}
    for task, text in texts.items():
        write_text_atomic(
            directory / f"{task}.yaml", yaml.safe_dump({"task": task, **source, "test_split": "test"}) + text
        )
    return Task(name, directory, *(Task(task, directory) for task in texts if task != name))


def read_items(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, compressed or not. Raises UserError with file and line if a line is none."""
    for number, line in enumerate(text_lines(file), 1):
        try:
            if line.strip():
                yield dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is not a JSON object: {error}") from error


@functools.lru_cache(maxsize=32)
def task_manager(include: Path | None, defaults: bool) -> Any:
    """lm-eval's task manager. defaults: with the tasks that lm-eval ships, which takes seconds."""
    with needs_extra("suite zero-shot", "eval"):
        from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)


# ---------------------------------------------------------------------- scores


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Indices of `limit` evenly spaced ones of `count` items, or of all."""
    limit = count if limit is None else min(count, limit)
    return [i * count // limit for i in range(limit)]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    include: Path | None = None,
) -> TaskResult:
    """A task's results, as `lm_eval --model hf` reports them: metrics with standard errors, and each item's accuracy.

    limit: maximum number of items of each task (of a group: of each task in it), evenly spaced over all of them.

    Raises:
        UserError: lm-eval cannot run the task (for example because a hub cannot be reached).
    """
    manager = task_manager(task.directory or include, task.directory is None)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import get_task_dict

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # for a student the context length of its teacher, so that both read the same prompts
    config = getattr(model.config, "base_config", model.config).get_text_config()
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, "device": str(model.device)}
    with eval_mode(model):
        lm = HFLM(model, max_length=getattr(config, "max_position_embeddings", None) or 2048, **options)
        access = nullcontext() if task.directory else hub_access(True, "")
        with access, as_user_error(f"task {task.name!r}: lm-eval cannot run it", of_cause=True):  # `datasets` wraps it
            loaded = _single_tasks(get_task_dict([task.name], manager))
            samples = {name: evenly_spaced(len(one.eval_docs), limit) for name, one in loaded}
            found: Any = lm_eval.simple_evaluate(
                lm, tasks=[task.name], task_manager=manager, bootstrap_iters=1000, samples=samples
            )
    results = [result for name, values in found["results"].items() for result in _task_results(name, values, found)]
    items = found["samples"].get(task.name, [])
    scores = [float(item[metric]) for item in items for metric in ("acc", "exact_match") if metric in item]
    chances = [1 / n if n > 1 else 0.0 for n in (len(item["arguments"]) for item in items)]
    return TaskResult(results, scores, sum(chances) / max(1, len(chances)))


def _single_tasks(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks of lm-eval's tree of groups, by name."""
    for name, value in tasks.items():
        yield from _single_tasks(value) if isinstance(value, dict) else [(name, value)]


def _task_results(name: str, values: dict[str, Any], found: dict[str, Any]) -> Iterator[Result]:
    """From lm-eval's form, `"acc,none": 0.5, "acc_stderr,none": 0.01`."""
    count = found.get("n-samples", {}).get(name, {}).get("effective")
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and not isinstance(value, str):
            error = values.get(f"{metric}_stderr,{kind}")
            stderr = error if isinstance(error, float) else None
            yield Result(name, metric if kind == "none" else f"{metric},{kind}", float(value), stderr, n=count)
