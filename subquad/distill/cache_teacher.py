"""The teacher's pass over the text of stage 3, without training."""

import time

from subquad.config import Recipe
from subquad.data import check_data
from subquad.distill.end_to_end import EndToEndDistillation
from subquad.distill.pipeline import DistillationRun
from subquad.distill.processes import start_processes
from subquad.modeling.teachers import ModelAndTokenizer, check_reference
from subquad.utils import UserError, cache_dir


def cache_teacher(recipe: Recipe, loaded: ModelAndTokenizer | None = None) -> dict[str, float]:
    """Computes the sparse targets of stage 3 of a recipe that the cache lacks, without training. Returns what the cache
    has of the run: `rows`, `tokens` in the loss, `bytes`, `outside` (`TargetCache.summary`); and `seconds`.

    loaded: as in `distill`.

    Raises:
        UserError: as `distill`, and where stage 3 does not use sparse targets.
    """
    stage = recipe.stages.end_to_end
    if stage is None or stage.teacher_targets == "full":
        raise UserError("stages.end_to_end.teacher_targets: got none or full, expected sampled or top_k")
    check_reference(recipe.teacher, "teacher")
    check_data(recipe.data)
    start_processes(recipe, "ddp")
    run = DistillationRun(recipe, cache_dir() / "targets", loaded)
    start = time.perf_counter()
    objective, _ = run.prepare_stage("end_to_end")
    assert isinstance(objective, EndToEndDistillation)
    seconds = time.perf_counter() - start
    return {**objective.target_cache.summary(objective.target_rows), "seconds": seconds}
