"""Times each stage against a plain training loop, to measure the overhead of the trainer.

    python -m benchmarks.distill [--mixer gla] [--steps 30] [--context 512] [--batch 2] [--json FILE]

The plain loop does the necessary work on prepared batches: the teacher's forward pass, the student's forward and
backward pass, clipping and an optimizer step. Prints tokens per second of both, their ratio, and the share of a stage's
time between steps (data, logging, bookkeeping). Stage and loop alternate; results are medians over rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

import subquad
from benchmarks.common import Parser, output_file, run_as_script, write_json
from subquad.config import Recipe
from subquad.distill.trainer import StageTrainer
from subquad.registry import STAGES
from subquad.utils import run_info


class RandomTokens(Dataset):
    """Random token ids, since time does not depend on them."""

    def __init__(self, count: int, context: int, vocabulary: int):
        self.ids = torch.randint(vocabulary, (count, context), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


class StepTimer(TrainerCallback):
    """Records when steps begin and end; the first two are a warm-up."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> tuple[float, float]:
        """Seconds per step including the time between steps, and the share of the latter."""
        total = self.starts[-1] - self.starts[2]
        inside = sum(end - begin for begin, end in zip(self.starts[2:-1], self.ends[2:-1], strict=True))
        return total / (len(self.starts) - 3), 1 - inside / total


def plain_step(trainer: StageTrainer, optimizer, ids: torch.Tensor) -> None:
    objective = trainer.objective
    loss = trainer.student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).loss
    loss.backward()
    parameters = [p for group in trainer.groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, trainer.stage.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def seconds_of_plain_loop(trainer: StageTrainer, steps: int) -> float:
    optimizer = torch.optim.AdamW(trainer.groups, lr=trainer.stage.lr, betas=(0.9, 0.95), fused=True)
    batches = trainer.train_dataset.ids.split(trainer.stage.batch_size)  # type: ignore[union-attr]
    times = []
    for ids in batches[:steps]:
        start = time.perf_counter()
        plain_step(trainer, optimizer, ids)
        times.append(time.perf_counter() - start)
    return statistics.fmean(times[2:-1])


def seconds_of_stage(trainer: StageTrainer) -> tuple[float, float]:
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train_stage()
    return timer.seconds()


def make_trainer(
    name: str, teacher, student, args: argparse.Namespace, directory: Path, parallel: str = "ddp"
) -> StageTrainer:
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
    dataset = RandomTokens(args.steps * args.batch, args.context, teacher.config.vocab_size)
    objective = STAGES[name](teacher, getattr(recipe.stages, name), scale_ids=dataset.ids[:2])
    return StageTrainer(recipe, objective, student, dataset, dataset, directory, parallel)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("distill", __doc__)
    parser.add_argument("--teacher", default="nano")
    parser.add_argument("--mixer", default="gla")
    parser.add_argument("--stages", nargs="+", default=["matrix", "hidden", "end_to_end"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2, help="sequences per batch")
    parser.add_argument("--context", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results there")
    args = parser.parse_args(argv)
    teacher, _ = subquad.load_teacher(args.teacher)
    teacher.requires_grad_(False)
    student = subquad.linearize(teacher, args.mixer)
    tokens = args.batch * args.context
    results = []
    for name in args.stages:
        rounds = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as directory:
                trainer = make_trainer(name, teacher, student, args, Path(directory))
                rounds.append((seconds_of_plain_loop(trainer, args.steps), *seconds_of_stage(trainer)))
        plain, stage, between = (statistics.median(x) for x in zip(*rounds, strict=True))
        result = {
            "stage": name,
            "plain_tokens_per_second": round(tokens / plain),
            "tokens_per_second": round(tokens / stage),
            "ratio": round(statistics.median(p / s for p, s, _ in rounds), 3),
            "between_steps": round(between, 4),
        }
        print(
            f"{name:12s} plain {tokens / plain:8.0f} tok/s   stage {tokens / stage:8.0f} tok/s   ratio "
            f"{result['ratio']:.2f}   between steps {between:.1%}",
            flush=True,
        )
        results.append(result)
    settings = {name: getattr(args, name) for name in ("teacher", "mixer", "batch", "context")}
    write_json(args.json, {**run_info(), **settings, "results": results})
    return 0


if __name__ == "__main__":
    run_as_script(main)
