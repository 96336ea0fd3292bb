"""Writes the tables of measurements in README.md and docs/ from the files in results/.

    python scripts/docs_tables.py            # rewrites every table in place
    python scripts/docs_tables.py --check    # exit code 1 and the names of tables that differ from their files

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a CSV file below results/ without its suffix, whose
first line is the header and whose cells are shown as they are, or one of `VIEWS`, computed from raw results.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from subquad.study.table import format_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
TABLE = re.compile(r"(<!-- table: (?P<name>[\w./-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
STAGES = ("1+2+3", "2+3", "3")


def read_csv(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def demo() -> str:
    """The table that `make demo` prints."""
    numbers = [{key: number(value) for key, value in row.items()} for row in read_csv("demo/results")]
    return f"\n```text\n{format_table(numbers)}\n```\n\n"


def number(text: str) -> float | int | str | bool:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


def nano_grid(metric: str) -> str:
    """Mean and half width of the 95% interval of `metric`, a row a mixer, a column for each set of stages and copying."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in read_csv("nano/grid"):
        half = (float(row[f"{metric} high"]) - float(row[f"{metric} low"])) / 2
        name = row["mixer"].replace(" ", "_")
        cells.setdefault(name, {})[row["copied"], row["stages"]] = f"{float(row[metric]):.1f} ± {half:.1f}"
    columns = [(copied, stages) for copied in ("yes", "no") for stages in STAGES]
    header = ["mixer", *(f"{'copied' if copied == 'yes' else 'not copied'}, {stages}" for copied, stages in columns)]
    order = sorted(cells, key=lambda name: -float(cells[name]["yes", "1+2+3"].split()[0]))
    if metric == "perplexity":
        order.reverse()
    return markdown(header, [[f"`{name}`", *(cells[name][column] for column in columns)] for name in order])


VIEWS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "nano/recovered": lambda: nano_grid("recovered, %"),
    "nano/perplexity": lambda: nano_grid("perplexity"),
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
