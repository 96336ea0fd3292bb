"""Benchmarks, long contexts and generation of finished students of SmolLM2-135M, for results/smollm2-135m.

    python scripts/smollm2/score.py DIR STUDY [STUDY ...]

DIR is that of text.py, STUDY a study's directory in it. Measures every finished run, the teacher behind the uniform
window of each student's bytes, and the teacher: items and text of DIR/test, on which nothing was chosen. Writes
DIR/evaluation (a repeated command continues) and results/smollm2-135m/evaluation.json.
"""

import argparse
import json
from pathlib import Path

from subquad.config import Data
from subquad.evaluate.lm_eval import find_tasks
from subquad.evaluate.results import Result
from subquad.evaluate.runner import EvalModel, evaluate, load_eval_model
from subquad.evaluate.suites import Settings
from subquad.utils import run_info, write_json_atomic

RESULTS = Path(__file__).resolve().parents[2] / "results" / "smollm2-135m" / "evaluation.json"
TASKS = ("lambada_openai", "blimp")
METRICS = ("state_bytes", "acc", "acc_generated", "chance", "perplexity_by_position", "common_prefix", "repetition")


def settings(directory: Path, tasks: list[str], limit: int) -> Settings:
    text = str(directory / "test" / "books.txt")
    return Settings(
        suites=("long", "zero-shot", "generation", "recall"),
        text=Data(source=text, validation=text, seq_len=256),
        tasks=tuple(find_tasks(tasks, directory / "test")),
        limit=limit,
        prompts=8,
        generated_tokens=64,
        lastword_items=limit,
        lengths=(256, 512, 1024, 2048, 4096),
        documents=1,
        recall_tasks=("copy",),
        recall_lengths=(256,),
        recall_items=4,
    )


def finished(study: Path) -> list[EvalModel]:
    paths = sorted(path.parent for path in study.glob("*/result.json"))
    return [load_eval_model(str(path), f"{study.name}/{path.name}") for path in paths]


def kept(result: Result) -> bool:
    return result.metric in METRICS and result.depth is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), metavar="LIST")
    parser.add_argument("--limit", type=int, default=100, help="items of a task, evenly spaced")
    args = parser.parse_args()
    students = [model for study in args.studies for model in finished(study)]
    teacher = load_eval_model("smollm2-135m")
    given = settings(args.directory, args.tasks, args.limit)
    results, failed = evaluate(students, teacher, given, args.directory / "evaluation")
    found = [{name: x for name, x in result.as_dict().items() if x == x} for result in results if kept(result)]
    write_json_atomic(RESULTS, {**run_info(teacher.model.device), "failed": failed, "results": found})
    print(json.dumps(failed) if failed else f"{len(found)} results of {len(students)} students")


if __name__ == "__main__":
    main()
