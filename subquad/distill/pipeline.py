"""`distill`: from a recipe to a saved and evaluated student. Finished stages are skipped, unfinished ones resumed."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from subquad.config import Recipe, different_keys, load_recipe
from subquad.data import check_data
from subquad.distill.recipe_stages import recipe_stages, stage_keys
from subquad.distill.run import DistillationRun, on_first_process
from subquad.distill.stage_cache import StageCache
from subquad.modeling.teachers import ModelAndTokenizer, check_reference
from subquad.utils import UserError, write_text_atomic

logger = logging.getLogger(__name__)


def distill(
    recipe: Recipe,
    output: str | os.PathLike,
    loaded: ModelAndTokenizer | None = None,
    stage_cache: StageCache | None = None,
) -> dict[str, Any]:
    """Runs a recipe in the directory `output` and returns its result, also if the run was finished before.

    At the end the directory is the loadable student, with `recipe.yaml`, `metrics.jsonl`, `loss.svg` and `result.json`.

    Args:
        loaded: the recipe's teacher and tokenizer, if they are loaded already.
        stage_cache: finished stages that this run shares with others; it takes them from there and stores its own.

    Raises:
        UserError: the directory holds other files or the run of another recipe.
    """
    directory = Path(output)
    check_reference(recipe.teacher)
    check_data(recipe.data)
    result = load_finished_result(recipe, directory)
    if result is not None:
        logger.info("%s is finished; nothing to do", directory)
        return result
    run = DistillationRun(recipe, directory, loaded)
    # after the checks of the teacher, so that a refused recipe leaves no directory
    with on_first_process() as first:
        if first:
            directory.mkdir(parents=True, exist_ok=True)
            write_text_atomic(directory / "recipe.yaml", recipe.to_yaml())
            if stage_cache is not None:
                stage_cache.restore(stage_keys(recipe), directory)
    run.build_or_resume_student()
    for name in recipe_stages(recipe):
        if name in run.finished_stages:
            continue
        run.train_stage(name)
        with on_first_process() as first:
            if first and stage_cache is not None:
                stage_cache.save(stage_keys(recipe), name, directory)
    result = run.evaluate_student()
    with on_first_process() as first:
        if first:
            run.save(result)
    return result


def load_finished_result(recipe: Recipe, directory: Path) -> dict[str, Any] | None:
    """The result of the finished run in `directory`, or None.

    Raises:
        UserError: the directory cannot hold this run.
    """
    written = directory / "recipe.yaml"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output: {str(directory)!r} is a file; expected a new directory, or that of this run")
    if written.exists():
        if different := different_keys(load_recipe(written), recipe):
            raise UserError(
                f"output: {str(directory)!r} holds the run of another recipe, which differs in {', '.join(different)}; "
                "expected another directory, or the same recipe to continue its run"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(f"output: {str(directory)!r} is not empty and holds no run; expected a new directory")
    path = directory / "result.json"
    return json.loads(path.read_text())["result"] if path.exists() else None
