"""Adds the finished runs of a study to results/smollm2-135m/recipes.json, from which the tables of that page are made.

    python scripts/smollm2/collect.py STUDY recipes/smollm2-135m-pure.yaml --note "2 threads, nothing beside"

A run replaces the row of the same recipe, mixer, seed and tokens; a row with the same numbers stays, with its note.
"""

import argparse
import json
from pathlib import Path

from subquad.config import load_recipe
from subquad.utils import write_json_atomic

RESULTS = Path(__file__).resolve().parents[2] / "results" / "smollm2-135m" / "recipes.json"
KEY = ("recipe", "mixer", "seed", "tokens")
NUMBERS = (
    "perplexity",
    "teacher_perplexity",
    "perplexity_at_init",
    "kl",
    "kl_at_init",
    "top1_agreement",
    "recovered_share",
    "state_bytes",
)


def rows(study: Path, recipe: str, note: str | None) -> list[dict]:
    found = []
    for path in sorted(study.glob("*/result.json")):
        run = json.loads(path.read_text())
        given, result = load_recipe(path.parent / "recipe.yaml"), run["result"]
        row = {"recipe": recipe, "seq_len": given.data.seq_len, "mixer": result["mixer"], "seed": run["seed"]}
        row |= {"tokens": result["tokens"], **{name: result[name] for name in NUMBERS}}
        details = [f"precision {given.precision}", run["device"], *([note] if note else [])]
        found.append({**row, "note": "; ".join(details)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path, metavar="STUDY")
    parser.add_argument("recipe", metavar="RECIPE", help="what the page calls its recipe")
    parser.add_argument("--note", metavar="TEXT", help="what ran beside it")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text())
    known = [{name: row[name] for name in (*KEY, *NUMBERS)} for row in kept["rows"]]
    found = rows(args.study, args.recipe, args.note)
    new = [row for row in found if {name: row[name] for name in (*KEY, *NUMBERS)} not in known]
    replaced = {tuple(row[name] for name in KEY) for row in new}
    kept["rows"] = [row for row in kept["rows"] if tuple(row[name] for name in KEY) not in replaced] + new
    write_json_atomic(RESULTS, kept)


if __name__ == "__main__":
    main()
