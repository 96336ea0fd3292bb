"""Writes the tables of measurements in README.md and docs/ from the files in results/.

    python scripts/docs_tables.py            # rewrites every table in place
    python scripts/docs_tables.py --check    # exit code 1 and the names of tables that differ from their files

A table is the text between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a CSV file in results/, without its
suffix, whose first line is the header and whose cells are copied unchanged; or it is one of `VIEWS`, which compute a
table from raw results.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scipy import stats

from subquad.study.aggregate import Mean
from subquad.study.progress import format_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
TABLE = re.compile(r"(<!-- table: (?P<name>[\w./-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
SMOLLM2_BYTES = 30 * 2 * 3 * 64 * 4
"""Of a token in SmolLM2-135M's cache: layers, keys and values, heads, dimensions, float32."""
STAGES = ("1+2+3", "2+3", "3")


def read_csv(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def demo() -> str:
    """The table that `make demo` prints."""
    results = json.loads((RESULTS / "demo" / "results.json").read_text())["results"]
    return f"\n```text\n{format_table(results)}\n```\n\n"


def grid_cells(metric: str) -> dict[str, dict[tuple[str, str], str]]:
    """ "mean ± half width of the 95% interval" of `metric` in results/nano/grid.csv, by mixer and (copied, stages)."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in read_csv("nano/grid"):
        half = (float(row[f"{metric} high"]) - float(row[f"{metric} low"])) / 2
        name = row["mixer"].replace(" ", "_")
        cells.setdefault(name, {})[row["copied"], row["stages"]] = f"{float(row[metric]):.1f} ± {half:.1f}"
    return cells


def nano_grid(metric: str, best_first: int, mixers: Sequence[str] = ()) -> str:
    """A row per mixer, a column for each set of stages, copied and not. `best_first`: -1 if more is better, else 1."""
    cells = grid_cells(metric)
    columns = [(copied, stages) for copied in ("yes", "no") for stages in STAGES]
    header = ["mixer", *(f"{'copied' if copied == 'yes' else 'not copied'}, {stages}" for copied, stages in columns)]
    order = sorted(mixers or cells, key=lambda name: best_first * float(cells[name]["yes", "1+2+3"].split()[0]))
    return markdown(header, [[f"`{name}`", *(cells[name][column] for column in columns)] for name in order])


def nano_plain_and_full() -> str:
    """Perplexity of the plain and of the full recipe (the grid's students with all stages and copied projections)."""
    full = grid_cells("perplexity")
    cells = [(row["mixer"], row["plain"]) for row in read_csv("nano/plain")]
    lines = [[mixer, plain, full[mixer.strip("`")]["yes", "1+2+3"]] for mixer, plain in cells]
    return markdown(["mixer", "plain", "full"], lines)


def near_far_training() -> str:
    """Losses of trained students with both parts, one and none (`scripts/near_far_training.py`)."""
    results = json.loads((RESULTS / "near_far" / "nano.json").read_text())["results"]
    metrics = ["both", "near_only", "far_only", "neither"]

    def cell(training: str, loss: Callable[[dict[str, float]], float]) -> str:
        values = [loss(result) for result in results if result["training"] == training]
        mean = Mean.of(values)
        return f"{mean.value:.3f}" + ("" if mean.high is None else f" ± {mean.high - mean.value:.3f}")

    losses: list[Callable[[dict[str, float]], float]] = [lambda result, m=m: result[m] for m in metrics]
    losses.append(lambda result: result["near_only"] - result["both"])
    trainings = list(dict.fromkeys(result["training"] for result in results))
    lines = [[f"`{name}`" if ":" in name else name, *(cell(name, loss) for loss in losses)] for name in trainings]
    return markdown(["stage 2", *(metric.replace("_", " ") for metric in metrics), "near only - both"], lines)


def frontier() -> str:
    """What `subquad frontier` wrote, without its times, which were taken beside other jobs."""
    rows = read_csv("frontier/smollm2-135m/table")
    header = [title for title in rows[0] if title != "time per token"]
    lines = [[row[title].removeprefix("smollm2-135m, ") for title in header] for row in rows]
    return markdown(header, lines)


def load(server: str) -> str:
    """A student and its teacher under load (`benchmarks/load.py`): a row per number of requests, a column per context,
    and the server's memory."""
    rows = read_csv(f"export/load-{server}")
    contexts = sorted({int(row["context"]) for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))

    def cell(column: str, requests: int, context: int) -> str:
        place = str(requests), str(context)
        own = {r["model"]: r[column] for r in rows if (r["requests"], r["context"]) == place and r[column]}
        if len(own) < len(models):
            return "not run"
        values = [float(own[model]) for model in models]
        shown = [f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in values]
        return f"{' / '.join(shown)} = {values[0] / values[1]:.1f}"

    counts = sorted({int(row["requests"]) for row in rows if row["generation"]})
    kinds = [("prompt", "reading a prompt", 1), *(("generation", f"writing, {n} at once", n) for n in counts)]
    lines = [[label, *(cell(column, n, context) for context in contexts)] for column, label, n in kinds]
    memory = [[cell("memory", n, context) for n in reversed(counts)] for context in contexts]
    lines.append(["memory, MB", *(next(c for c in cells if c != "not run") for cells in memory)])
    return markdown([f"{' / '.join(models)}, tokens/s", *(f"{context:,} tokens" for context in contexts)], lines)


def gap(row: dict) -> str:
    return f"{math.log(row['perplexity'] / row['teacher_perplexity']):.3f}"


def smollm2_recipes() -> str:
    """The students of results/smollm2-135m/recipes.json: for each recipe and number of tokens the best first."""
    rows = json.loads((RESULTS / "smollm2-135m" / "recipes.json").read_text())["rows"]
    rows.sort(key=lambda row: (row["recipe"], -round(row["tokens"], -4), row["perplexity"] / row["teacher_perplexity"]))
    header = ["recipe", "tokens", "rows of", "mixer", "state, MB", "loss above the teacher's, nats", "KL, nats",
              "same most likely token"]  # fmt: skip
    body = [
        [re.sub(r".*/smollm2-135m-(\w+)\.yaml", r"\1", row["recipe"]), f"{row['tokens']:,}", str(row["seq_len"]),
         f"`{row['mixer']}`", f"{row['state_bytes'] / 1e6:.1f}", gap(row), f"{row['kl']:.3f}",
         f"{row['top1_agreement']:.1%}"]
        for row in rows
    ]  # fmt: skip
    return markdown(header, body)


def smollm2_budget() -> str:
    """Long contexts in constant memory (`scripts/budget.py`), untrained, then trained."""
    untrained, trained = (
        json.loads((RESULTS / "budget" / f"{name}.json").read_text())["results"] for name in ("smollm2-135m", "trained")
    )
    window, memory = "window 96 + 4", "budget 96, memory mamba2"
    rows = {
        "teacher": untrained["teacher"],
        "window of 96 tokens + 4 sinks in every head": untrained[window],
        "budget 96: the same bytes, a window for each head": untrained["budget 96"],
        "the same bytes, also memories: `--budget-memory mamba2`": untrained[memory],
        "the window, trained on 50,000 tokens": trained[window],
        "windows and memories, trained on 50,000 tokens": trained[memory],
    }
    body = [
        [name, f"{row['loss_2048']:.3f}", f"{row['loss_8192']:.3f}",
         f"{row['lambada']:.1%}" if "lambada" in row else "",
         f"{SMOLLM2_BYTES * 8192 / 1e6:.0f} MB" if name == "teacher" else f"{SMOLLM2_BYTES * 100 / 1e6:.1f} MB"]
        for name, row in rows.items()
    ]  # fmt: skip
    header = ["SmolLM2-135M-Instruct on novels", "loss at 2,048 tokens", "at 8,192", "LAMBADA (500 items)"]
    return markdown([*header, "cache at 8,192"], body)


def smollm2_untrained() -> str:
    """What scripts/smollm2/untrained.py measured: rows of each length, in the order of measurement."""
    header = [
        "rows of",
        "untrained",
        "cache, MB",
        "loss above the teacher's, nats",
        "KL, nats",
        "same most likely token",
    ]
    rows = json.loads((RESULTS / "smollm2-135m" / "untrained.json").read_text())
    body = [
        [str(row["seq_len"]), row["model"], f"{row['cache_bytes'] / 1e6:.2f}", f"{row['loss_above_teacher']:.3f}",
         f"{row['kl']:.3f}", f"{row['top1_agreement']:.1%}"]
        for row in sorted(rows, key=lambda row: row["seq_len"])
    ]  # fmt: skip
    return markdown(header, body)


def quarter_gaps(recipe: str) -> dict[str, float]:
    """By mixer the loss above the teacher's of a recipe's students of a quarter of the tokens, without the control."""
    rows = json.loads((RESULTS / "smollm2-135m" / "recipes.json").read_text())["rows"]
    found = [row for row in rows if row["recipe"].endswith(f"-{recipe}.yaml") and row["tokens"] < 30_000]
    return {r["mixer"]: float(gap(r)) for r in found if r["seed"] == 0 and r["mixer"] != "softmax"}


def smollm2_ranks() -> str:
    """Every mixer's place by each recipe at a quarter of the tokens, and on nano; their rank correlation with nano."""
    nano = {
        row["mixer"].replace(" ", "_"): float(row["perplexity"])
        for row in read_csv("nano/grid")
        if (row["copied"], row["stages"]) == ("yes", "1+2+3")
    }
    columns = {"nano, 49,152 tokens": nano}
    columns |= {f"{recipe}, 25,000 tokens": quarter_gaps(recipe) for recipe in ("pure", "paper")}
    places = {
        title: {mixer: str(place) for place, mixer in enumerate(sorted(values, key=values.__getitem__), 1)}
        for title, values in columns.items()
    }
    body = [
        [f"`{mixer}`", *(places[title].get(mixer, "") for title in columns)] for mixer in places["nano, 49,152 tokens"]
    ]

    def correlation(values: dict[str, float]) -> str:
        common = [mixer for mixer in nano if mixer in values]
        return f"{stats.spearmanr([nano[m] for m in common], [values[m] for m in common]).statistic:.2f}"

    body.append(["rank correlation with nano", *(correlation(values) for values in columns.values())])
    return markdown(["mixer", *columns], body)


def smollm2_evaluation() -> str:
    """What scripts/smollm2/score.py measured: students by recipe, then windows of equal bytes and the teacher."""
    results = json.loads((RESULTS / "smollm2-135m" / "evaluation.json").read_text())["results"]
    models: dict[str, dict[tuple[str, str, int | None], dict]] = {}
    for result in results:
        measured = models.setdefault(result["model"].removeprefix("smollm2-135m, "), {})
        measured[result["task"], result["metric"], result.get("length")] = result
    tasks = list(dict.fromkeys(r["task"] for r in results if r["metric"] == "acc" and "length" not in r))
    text = next(result["task"] for result in results if result["metric"] == "repetition")

    def share(found: dict | None) -> str:
        if found is None:
            return ""
        return f"{found['value']:.1%}" + (f" ± {1.96 * found['stderr']:.1%}" if "stderr" in found else "")

    lengths = sorted({result["length"] for result in results if result["metric"] == "perplexity_by_position"})
    columns: dict[str, Callable[[dict], str]] = {
        "cache, MB": lambda own: f"{own['cache', 'state_bytes', 4096]['value'] / 1e6:.1f}",
        **{
            f"perplexity to {n:,}": lambda own, n=n: f"{own[text, 'perplexity_by_position', n]['value']:.1f}"
            for n in lengths
        },
        **{task.removesuffix("_openai"): lambda own, task=task: share(own.get((task, "acc", None))) for task in tasks},
        "words written": lambda own: share(own.get(("lambada_openai", "acc_generated", None))),
        "copies written": lambda own: share(own.get(("copy", "acc_generated", 256))),
        "repeated 4-grams": lambda own: share(own[text, "repetition", 64]),
        "first tokens as the teacher's": lambda own: f"{own[text, 'common_prefix', 64]['value']:.1f}",
    }  # fmt: skip
    body = [
        [f"`{name}`" if "/" in name else name, *(show(own) for show in columns.values())]
        for name, own in models.items()
    ]
    return markdown(["model", *columns], body)


VIEWS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "nano/recovered": lambda: nano_grid("recovered, %", -1),
    "nano/perplexity": lambda: nano_grid("perplexity", 1),
    "nano/stages": lambda: nano_grid("perplexity", 1, ("gated_deltanet", "gla", "xlstm")),
    "nano/plain-full": nano_plain_and_full,
    "near_far/nano": near_far_training,
    "frontier/smollm2-135m": frontier,
    "smollm2-135m/recipes": smollm2_recipes,
    "smollm2-135m/budget": smollm2_budget,
    "smollm2-135m/untrained": smollm2_untrained,
    "smollm2-135m/ranks": smollm2_ranks,
    "smollm2-135m/evaluation": smollm2_evaluation,
    "export/load-llama-cpp": lambda: load("llama-cpp"),
    "export/load-vllm": lambda: load("vllm"),
}


def table(name: str) -> str:
    if name in VIEWS:
        return VIEWS[name]()
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return markdown(header, rows)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*/README.md"))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the documentation from results/.")
    parser.add_argument("--check", action="store_true", help="write nothing; name the tables that differ")
    args = parser.parse_args(argv)
    differing = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        written = TABLE.sub(lambda found: found[1] + table(found["name"]) + found[4], text)
        if written != text:
            differing.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(written, encoding="utf-8")
    for name in differing:
        print(f"{name}: {'tables differ from results/' if args.check else 'rewritten'}")
    return int(args.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
