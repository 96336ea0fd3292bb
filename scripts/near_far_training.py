"""Trains students with a window and a memory, and measures what each of the two does: both, one alone, none.

    python scripts/near_far_training.py --output results/near_far/nano.json
    python scripts/near_far_training.py --seeds 0 --tokens 8192        # two minutes of one core

Stage 2 alone on the nano teacher, without calibration, so that the memories learn in this stage: plain, with
`far_weight`, with `window_dropout`, and with both. Losses are in nats per token of validation text.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import subquad
from subquad.analysis.near_far import near_far_results
from subquad.config import Recipe
from subquad.data import token_rows
from subquad.distill.pipeline import distill
from subquad.modeling.teachers import ModelAndTokenizer, load_teacher
from subquad.utils import run_info, write_json_atomic

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "far_weight: 1": {"far_weight": 1.0},
    "far_weight: 4": {"far_weight": 4.0},
    "window_dropout: [0.9, 0.5]": {"window_dropout": [0.9, 0.5]},
    "far_weight: 1, window_dropout: [0.9, 0.5]": {"far_weight": 1.0, "window_dropout": [0.9, 0.5]},
}
EVAL_ROWS = 32


def recipe_of(options: dict[str, Any], seed: int, tokens: int) -> Recipe:
    stage = {"tokens": tokens, "lr": 3e-3, "batch_size": 1, "param_groups": {"attention_projections": {"lr": 1e-3}}}
    student = {"mixer": "gla", "calibration_tokens": None, "mixer_kwargs": {"window": 16, "sinks": 2}}
    tree = {
        "teacher": "nano",
        "data": {"source": "python-stdlib", "seq_len": 256},
        "student": student,
        "stages": {"hidden": {**stage, **options}},
        "checkpoint": {"save_steps": tokens},
        "evaluation": {"eval_tokens": 1024},
        "seed": seed,
    }
    return Recipe.model_validate(tree)


def four_rows(recipe: Recipe, loaded: ModelAndTokenizer) -> dict[str, float]:
    """The student's loss with both parts, with one alone and with none."""
    validation = token_rows(recipe.data, loaded[1], "validation", limit=EVAL_ROWS * recipe.data.seq_len)
    rows = torch.stack([validation[i]["input_ids"] for i in range(min(EVAL_ROWS, len(validation)))])
    with tempfile.TemporaryDirectory() as directory:
        distill(recipe, Path(directory) / "run", loaded)
        student, _ = subquad.load_teacher(Path(directory) / "run")
        return {result.metric: round(result.value, 4) for result in near_far_results(student, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=32_768, help="training tokens of a student")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    loaded, results = load_teacher("nano"), []
    for seed in args.seeds:
        for name, options in OPTIONS.items():
            losses = four_rows(recipe_of(options, seed, args.tokens), loaded)
            results.append({"training": name, "seed": seed, **losses})
            print(results[-1], flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                write_json_atomic(args.output, {**run_info(), "tokens": args.tokens, "results": results})


if __name__ == "__main__":
    main()
