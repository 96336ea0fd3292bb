"""Print a table of one metric over the seeds of studies: mean and 95% interval (Student's t).

    python scripts/compare_seeds.py DIR [DIR ...]                     # perplexity of each mixer by stages and copying
    python scripts/compare_seeds.py PLAIN FULL --labels plain full    # of each mixer by study

A cell with one seed has no interval.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from subquad.study.aggregate import Mean

STAGES = {"matrix": "1", "hidden": "2", "end_to_end": "3"}


def finished_runs(study: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The recipe and the result of every finished run in a study's directory."""
    return [
        (yaml.safe_load((path.parent / "recipe.yaml").read_text()), json.loads(path.read_text())["result"])
        for path in sorted(study.glob("*/result.json"))
    ]


def column_of(recipe: dict[str, Any]) -> str:
    """`{2,3} copied`: the stages, and whether projections were copied."""
    stages = ",".join(number for name, number in STAGES.items() if recipe["stages"].get(name))
    return f"{{{stages}}} {'copied' if recipe['student']['copy_qkv'] else 'random'}"


def cell(values: list[float]) -> str:
    mean = Mean.of(values)
    return f"{mean.value:.1f}" if mean.high is None else f"{mean.value:.1f} ± {mean.high - mean.value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--labels", nargs="+", help="a column for each study, with these names")
    parser.add_argument("--metric", default="perplexity")
    args = parser.parse_args()
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, study in enumerate(args.studies):
        for recipe, result in finished_runs(study):
            column = args.labels[index] if args.labels else column_of(recipe)
            cells[result["mixer"]][column].append(result[args.metric])
    columns = list(dict.fromkeys(column for values in cells.values() for column in values))
    print("| mixer | " + " | ".join(columns) + " |\n|" + "---|" * (1 + len(columns)))
    for mixer, values in cells.items():
        print(f"| `{mixer}` | " + " | ".join(cell(values[c]) if c in values else "" for c in columns) + " |")
    print(f"\nseeds: {sorted({len(seeds) for values in cells.values() for seeds in values.values()})}")


if __name__ == "__main__":
    main()
