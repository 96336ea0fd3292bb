"""What the trainer costs beside the arithmetic: each stage as it is run, and as a plain loop, in one process.

    python -m benchmarks.distill [--mixer gla] [--steps 30] [--context 512] [--batch 2] [--json FILE]

The plain loop does what a stage cannot do without: the teacher's forward, the student's forward and backward, clipping
and an optimizer's step, on batches that are there already. Prints tokens per second of both, their ratio, and the share
of a run that passes between steps (data, logging, bookkeeping). Rounds alternate; figures are medians over rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

import subquad
from subquad.config import Recipe
from subquad.distill import trainer
from subquad.distill.objective import Objective
from subquad.distill.param_groups import parameter_groups
from subquad.distill.stage1_matrix_mixing import MatrixMixing
from subquad.distill.stage2_hidden_alignment import HiddenAlignment
from subquad.distill.stage3_end_to_end import EndToEndDistillation
from subquad.distill.trainer import StageRun, run_stage
from subquad.utils import run_info


class Rows(Dataset):
    """Random tokens: time does not depend on them."""

    def __init__(self, count: int, context: int, vocabulary: int):
        self.ids = torch.randint(vocabulary, (count, context), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


class Clock(TrainerCallback):
    """When steps begin and end; the first two warm up."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())

    def seconds(self) -> tuple[float, float]:
        """Of a step with all that belongs to it, and the share of it between steps."""
        whole = self.begun[-1] - self.begun[2]
        inside = sum(end - begin for begin, end in zip(self.begun[2:-1], self.ended[2:-1], strict=True))
        return whole / (len(self.begun) - 3), 1 - inside / whole


def plain_step(run: StageRun, student, groups: list[dict[str, Any]], optimizer, ids: torch.Tensor) -> None:
    loss = student(objective=run.objective, **run.objective.targets({"input_ids": ids})).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], run.stage.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def seconds_of_plain_loop(run: StageRun, student, steps: int) -> float:
    groups = parameter_groups(student, run.objective.trained(student), run.stage)
    optimizer = torch.optim.AdamW(groups, lr=run.stage.lr, betas=(0.9, 0.95), fused=True)
    batches = run.train.ids.split(run.stage.batch_size)  # type: ignore[attr-defined]
    times = []
    for ids in batches[:steps]:
        start = time.perf_counter()
        plain_step(run, student, groups, optimizer, ids)
        times.append(time.perf_counter() - start)
    student.requires_grad_(True)
    return statistics.fmean(times[2:-1])


def seconds_of_stage(run: StageRun, student) -> tuple[float, float]:
    clock, original = Clock(), trainer.StageTrainer.__init__

    def with_clock(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(clock)

    trainer.StageTrainer.__init__ = with_clock  # type: ignore[method-assign]
    try:
        run_stage(run, student)
    finally:
        trainer.StageTrainer.__init__ = original  # type: ignore[method-assign]
    return clock.seconds()


def make_run(name: str, teacher, args: argparse.Namespace, directory: Path) -> StageRun:
    tokens = args.steps * args.batch * args.context
    recipe = Recipe.model_validate(
        {
            "teacher": "nano",
            "data": {"source": "python-stdlib", "seq_len": args.context},
            "stages": {name: {"tokens": tokens, "lr": 1e-4, "batch_size": args.batch}},
            "checkpoint": {"save_steps": 10_000},
            "precision": args.precision,
            "student": {"mixer": args.mixer},
        }
    )
    stage = getattr(recipe.stages, name)
    rows = Rows(args.steps * args.batch, args.context, teacher.config.vocab_size)
    objectives: dict[str, Any] = {
        "matrix": lambda: MatrixMixing(teacher, stage),
        "hidden": lambda: HiddenAlignment(teacher, stage, rows.ids[:2]),
        "end_to_end": lambda: EndToEndDistillation(teacher, stage),
    }
    objective: Objective = objectives[name]()
    return StageRun(recipe, objective, rows, rows, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="nano")
    parser.add_argument("--mixer", default="gla")
    parser.add_argument("--stages", nargs="+", default=["matrix", "hidden", "end_to_end"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    teacher, _ = subquad.load_teacher(args.teacher)
    teacher.requires_grad_(False)
    student = subquad.linearize(teacher, args.mixer)
    rows = []
    for name in args.stages:
        found = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as directory:
                run = make_run(name, teacher, args, Path(directory))
                found.append((seconds_of_plain_loop(run, student, args.steps), *seconds_of_stage(run, student)))
        plain, whole, between = (statistics.median(x) for x in zip(*found, strict=True))
        tokens = args.batch * args.context
        rows.append(
            {
                "stage": name,
                "plain_tokens_per_second": round(tokens / plain),
                "tokens_per_second": round(tokens / whole),
                "ratio": round(statistics.median(p / w for p, w, _ in found), 3),
                "between_steps": round(between, 4),
            }
        )
        print(
            f"{name:12s} plain {tokens / plain:8.0f} tok/s   stage {tokens / whole:8.0f} tok/s   ratio "
            f"{rows[-1]['ratio']:.2f}   between steps {between:.1%}",
            flush=True,
        )
    if args.json:
        head = {
            **run_info(),
            "teacher": args.teacher,
            "mixer": args.mixer,
            "batch": args.batch,
            "context": args.context,
        }
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
