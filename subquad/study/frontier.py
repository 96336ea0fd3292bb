"""`subquad frontier`: quality against bytes of cache, for all that shrinks a teacher's cache, trained or not.

A row is a model: the teacher; for each budget of N + 4 tokens of its cache a uniform window, windows by measured error
(`subquad.modeling.budget`), with memories too if a mixer is given for them, streaming heads (DuoAttention, arXiv
2410.10819) and eviction (TOVA, arXiv 2401.06104); a cache of 4 bits; and, with a recipe, the windows, with and without
memories, and the recipe's own student after its training.
"""

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from subquad.config import Data, Recipe
from subquad.data import check_data
from subquad.evaluate import command
from subquad.evaluate.results import Result, select
from subquad.evaluate.runner import Evaluation, evaluate, load_eval_model
from subquad.evaluate.suites import Settings, settings_for
from subquad.evaluate.table import WIDTH, wide_table
from subquad.mixers.options import find_options
from subquad.modeling.budget import SINKS
from subquad.modeling.placement import Placement
from subquad.modeling.summary import format_bytes
from subquad.modeling.teachers import check_reference
from subquad.study.candidates import TEACHER, Candidates, Row
from subquad.study.results import RESULTS
from subquad.study.runs import read_json
from subquad.utils import UserError, needs_extra, probe_output, run_info, write_json_atomic

SUITES = ("language", "long", "recall")
RECALL_TASKS = ("needle_number", "assoc_text")
ROW_TOKENS = 512


@dataclass(frozen=True)
class Frontier:
    """What was measured. context: tokens of the long rows, after which the caches are compared."""

    rows: list[Row]
    results: list[Result]
    failed: dict[str, str]
    context: int

    def numbers(self, row: Row) -> dict[str, Result]:
        """The results of a row that the table shows, by the title of their column; late perplexity as a loss."""
        found = {}
        for result in select(self.results, model=row.model, depth=None):
            if title := column(result, self.context):
                late = result.metric == "perplexity_by_position"
                found[title] = replace(result, metric="loss", value=math.log(result.value)) if late else result
        return {"cache": found.pop("cache"), **found} if "cache" in found else found

    def cells(self) -> list[list[str]]:
        """The table: titles, then a line for each row."""
        numbers = [self.numbers(row) for row in self.rows]
        titles = list(dict.fromkeys(title for found in numbers for title in found))
        lines = [
            [row.model, *(show(found[title]) if title in found else "" for title in titles)]
            for row, found in zip(self.rows, numbers, strict=True)
        ]
        return [["", *titles], *lines]

    def table(self, width: int = WIDTH) -> str:
        return "\n".join([wide_table(self.cells(), width), *map("{0[0]} failed: {0[1]}".format, self.failed.items())])


def column(result: Result, context: int) -> str | None:
    """The title of a result's column; None if the table does not show it."""
    half = context // 2
    titles = {
        ("cache_bytes", context): "cache",
        ("seconds_per_token", context): "time per token",
        ("loss", None): "loss",
        ("perplexity_by_position", context): f"loss, tokens {half:,} to {context:,}",
        ("kl", None): "KL",
        ("top1_agreement", None): "top-1",
    }
    if result.metric in ("acc", "acc_generated"):
        length = "" if result.length is None else f" {result.length:,}"
        return f"{result.task}{length}{', written' if result.metric == 'acc_generated' else ''}"
    return titles.get((result.metric, result.length))


def show(result: Result) -> str:
    if result.metric == "cache_bytes":
        return format_bytes(result.value)
    if result.metric == "seconds_per_token":
        return f"{1e3 * result.value:.1f} ms"
    return f"{result.value:.1%}" if result.metric.startswith(("acc", "top1")) else f"{result.value:.3f}"


# ---------------------------------------------------------------------- the command


def run(
    teacher: str,
    budgets: Sequence[int],
    calibrate: str,
    output: str,
    *,
    suites: Sequence[str] | None = None,
    corpus: str | None = None,
    data: str | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    context: int = 2048,
    budget_memory: str | None = None,
    recipe: Recipe | None = None,
    recipe_budgets: Sequence[int] | None = None,
    placement: Placement | None = None,
) -> Frontier:
    """Measures the frontier; the arguments are the options of `subquad frontier`. Writes `results.json`, `table.csv`,
    `frontier.svg` and `frontier.png` into `output`.

    Raises:
        UserError: an invalid argument or a missing file, before anything is measured.
    """
    if not budgets or max(budgets) + SINKS >= context:
        raise UserError(f"budgets: got {list(budgets)}, expected numbers of tokens below the context, {context}")
    if budget_memory is not None:
        find_options(budget_memory)
    check_recipe(teacher, budgets, recipe, recipe_budgets)
    command.check_output(output)
    check_reference(teacher, "teacher")
    with needs_extra("frontier", "report"):
        import matplotlib  # noqa: F401
    calibration = Data(source=calibrate)
    check_data(calibration)
    settings = frontier_settings(suites, corpus, data, tasks, limit, context)
    probe_output("output", Path(output))
    reference = load_eval_model(teacher, None, placement)
    evaluation = Evaluation([], reference, settings, output)
    candidates = Candidates(evaluation, sorted(set(budgets)), calibration, context, budget_memory, placement)
    makers = candidates.untrained()
    if recipe is not None:
        trained = sorted(set(budgets if recipe_budgets is None else recipe_budgets))
        makers = itertools.chain(makers, candidates.trained(recipe, trained, Path(output) / "trained"))
    rows = [Row(reference.name, TEACHER)]
    results, failed = evaluate([], reference, settings, output)
    found = {result.key: result for result in results}
    for row, make in makers:
        try:
            model = make()
        except UserError as error:
            failed[row.model] = str(error)
            continue
        results, more = evaluate([model], reference, settings, output)
        failed |= more
        found |= {result.key: result for result in results if result.key not in found}
        rows.append(row)
    frontier = Frontier(rows, [*found.values()], failed | evaluation.failed, context)
    write(frontier, Path(output))
    return frontier


def check_recipe(
    teacher: str, budgets: Sequence[int], recipe: Recipe | None, recipe_budgets: Sequence[int] | None
) -> None:
    """Raises UserError for a recipe of another teacher, or budgets of a recipe that are not measured."""
    if recipe is None and recipe_budgets is not None:
        raise UserError(f"recipe_budgets: got {list(recipe_budgets)} without a recipe, expected both")
    if not set(recipe_budgets or ()) <= set(budgets):
        raise UserError(f"recipe_budgets: got {list(recipe_budgets or ())}, expected some of {list(budgets)}")
    if recipe is not None and recipe.teacher != teacher:
        raise UserError(f"recipe: got the teacher {recipe.teacher!r}, expected {teacher!r}")


def frontier_settings(
    suites: Sequence[str] | None,
    corpus: str | None,
    data: str | None,
    tasks: Sequence[str] | None,
    limit: int | None,
    context: int,
) -> Settings:
    """What every model is measured on. Costs are always measured: they have the bytes."""
    wanted = suites or [*SUITES, *(["zero-shot"] if data or tasks else [])]
    lengths = (context // 2, context)
    text = command.validation_text(corpus, None).model_copy(
        update={"seq_len": min(ROW_TOKENS, context), "document_masking": False}
    )
    check_data(text)
    settings = replace(
        settings_for([*wanted, "efficiency"]),
        text=text,
        tokens=8192,
        limit=limit,
        lengths=lengths,
        documents=4,
        cost_lengths=(context,),
        batches=(1,),
        repeats=2,
        recall_lengths=lengths,
        recall_tasks=RECALL_TASKS,
        recall_items=5,
        baselines=(),
    )
    return command.resolve_tasks(settings, data, tasks, None)


def write(frontier: Frontier, directory: Path) -> None:
    """Writes `results.json`, the table as `table.csv`, and the picture."""
    from subquad.analysis.plots import draw_frontier

    rows, results = ([asdict(row) for row in frontier.rows], [result.as_dict() for result in frontier.results])
    content = {**run_info(), "context": frontier.context, "rows": rows, "failed": frontier.failed, "results": results}
    write_json_atomic(directory / RESULTS, content)
    with (directory / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(frontier.cells())
    draw_frontier(panels(frontier), directory / "frontier")


def read_frontier(directory: Path) -> Frontier | None:
    """What `write` wrote into a directory; None if there is nothing."""
    content = read_json(directory / RESULTS)
    if content is None:
        return None
    rows, results = ([Row(**row) for row in content["rows"]], [Result(**result) for result in content["results"]])
    return Frontier(rows, results, content["failed"], content["context"])


def panels(frontier: Frontier) -> dict[str, list[tuple[str, bool, float, float]]]:
    """What the picture shows: for each title the method, whether it is trained, bytes and value of each row."""
    numbers = [(row, frontier.numbers(row)) for row in frontier.rows]
    shown: dict[str, list[tuple[str, bool, float, float]]] = {}
    for row, found in numbers:
        for title, result in found.items():
            share, at_end = result.metric == "acc", result.length in (None, frontier.context)
            if "cache" in found and at_end and (share or result.metric == "loss"):
                name, value = (f"{title}, %", 100 * result.value) if share else (f"{title}, nats", result.value)
                shown.setdefault(name, []).append((row.method, row.trained, found["cache"].value, value))
    return shown
