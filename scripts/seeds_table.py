"""Tables over seeds from the students of studies: mean and 95% interval (Student's t) of one number.

    python scripts/seeds_table.py DIR [DIR ...]                        # perplexity, mixer by stages and copy
    python scripts/seeds_table.py PLAIN FULL --labels plain full       # mixer by study

A cell with one seed has no interval.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import yaml

from subquad.study.aggregate import Mean

STAGES = {"matrix": "1", "hidden": "2", "end_to_end": "3"}


def runs(directory: Path) -> list[dict]:
    """Recipe and results of every finished run below a study's directory."""
    found = []
    for result in sorted(directory.glob("*/result.json")):
        recipe = yaml.safe_load((result.parent / "recipe.yaml").read_text())
        found.append({"recipe": recipe, **json.loads(result.read_text())["result"]})
    return found


def cell(values: list[float]) -> str:
    mean = Mean.of(values)
    return f"{mean.value:.1f}" if mean.high is None else f"{mean.value:.1f} ± {mean.high - mean.value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--labels", nargs="+", help="names of the studies, which become columns")
    parser.add_argument("--metric", default="perplexity")
    args = parser.parse_args()
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, study in enumerate(args.studies):
        for run in runs(study):
            if args.labels:
                column = args.labels[number]
            else:
                stages = ",".join(k for name, k in STAGES.items() if run["recipe"]["stages"].get(name))
                column = f"{{{stages}}} {'copied' if run['copy_qkv'] else 'random'}"
            cells[run["mixer"]][column].append(run[args.metric])
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    print("| mixer | " + " | ".join(columns) + " |\n|" + "---|" * (1 + len(columns)))
    for mixer, row in cells.items():
        print(f"| `{mixer}` | " + " | ".join(cell(row[c]) if c in row else "" for c in columns) + " |")
    print(f"\nseeds: {sorted({len(values) for row in cells.values() for values in row.values()})}")


if __name__ == "__main__":
    main()
