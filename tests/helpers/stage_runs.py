"""Stages trained in float64, in this process or in several: `torchrun -m tests.helpers.stage_runs CASES`."""

import json
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from accelerate import PartialState

import subquad
from subquad.config import load_recipe
from subquad.distill import trainer
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.pipeline import DistillationRun
from subquad.distill.processes import on_first_process, start_processes
from tests.helpers.processes import run_python


class Case(NamedTuple):
    """The stages of a recipe, trained in `directory`."""

    recipe: str
    overrides: list[str]
    directory: str
    parallel: str = "ddp"
    stop_at: int | None = None
    """A step after which the run is interrupted."""

    def result(self) -> dict:
        """The student's weights, the logged losses and gradient norms, and the share of the trained parameters whose
        moments the first process holds: less than 1 if they are sharded or of some layers."""
        return torch.load(Path(self.directory, "trained.pt"))


def train(case: Case) -> None:
    """Trains the student in float64 from a float64 teacher, and saves what `Case.result` reads unless interrupted."""
    recipe = load_recipe(case.recipe, case.overrides)
    teacher, tokenizer = subquad.load_teacher(recipe.teacher)
    start_processes(recipe, case.parallel)
    run = DistillationRun(recipe, Path(case.directory), (teacher.double(), tokenizer), case.parallel)
    on_first_process(run.start, None)
    run.build_or_resume_student()
    run.student.double()
    shares = []
    end_of_step = trainer.MetricsCallback.on_step_end

    def after_step(self, args, state, control, **kwargs):
        end_of_step(self, args, state, control, **kwargs)
        shares.append(trained_share(kwargs["optimizer"]))
        if state.global_step == case.stop_at:
            raise KeyboardInterrupt

    with mock.patch.object(trainer.MetricsCallback, "on_step_end", after_step):
        try:
            for name in [name for name, stage in recipe.stages if stage is not None]:
                run.train_stage(name)
        except KeyboardInterrupt:
            assert case.stop_at is not None
            return
    metrics = read_jsonl(run.metrics)
    curves = {key: [record[key] for record in metrics if key in record] for key in ("loss", "grad_norm")}
    result = {"weights": run.student.state_dict(), "share": shares[-1], **curves}
    on_first_process(torch.save, result, Path(case.directory, "trained.pt"))


def trained_share(optimizer: torch.optim.Optimizer) -> float:
    """Of the elements of the trained parameters, the share whose moments are in this process."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [trainer.own_part(state["exp_avg"]) for state in optimizer.state.values()]
    return sum(x.numel() for x in moments) / sum(p.numel() for p in parameters)


def train_in_processes(cases: list[Case], directory: Path, processes: int = 2) -> None:
    """Trains the cases one after another in several processes (gloo)."""
    path = directory / "cases.json"
    path.write_text(json.dumps(cases))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run_python(*torchrun, "-m", "tests.helpers.stage_runs", path, environment={"OMP_NUM_THREADS": "1"}, timeout=900)


def main() -> None:
    torch.set_num_threads(1)
    for values in json.loads(Path(sys.argv[1]).read_text()):
        train(Case(*values))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
