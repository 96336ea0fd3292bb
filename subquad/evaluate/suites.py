"""A suite of an evaluation, and how much each suite measures (`Settings`). The suites are in `subquad.registry`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.config import Data
from subquad.evaluate.results import Result
from subquad.registry import SUITES
from subquad.utils import UserError, nearest

if TYPE_CHECKING:
    from subquad.evaluate.jobs import EvalJob, EvalModel, Evaluation
    from subquad.evaluate.lm_eval import Task

STANDARD_SUITES = ("language", "zero-shot", "generation", "long", "efficiency")
"""The suites of the presets `quick` and `full`."""

CONTEXT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Suite:
    """A group of measurements."""

    jobs: Callable[["Evaluation"], list["EvalJob"]]
    results: Callable[["Evaluation", "EvalModel", Mapping[str, Any]], list[Result]]
    """The results of one model from the outcomes of finished jobs, by job name; none for jobs that are not finished."""
    save: Callable[["Evaluation", Mapping[str, Any], Path], None] | None = None
    """Writes more files into the output directory, from the outcomes."""
    draw: Callable[["Evaluation", Sequence[Result], Path], None] | None = None
    """Draws figures into a directory."""


@dataclass(frozen=True)
class Settings:
    """What to measure and how much of it. The defaults are those of a full evaluation."""

    suites: tuple[str, ...] = STANDARD_SUITES
    text: Data = field(default_factory=lambda: Data(source="python-stdlib"))
    """The validation text, read in rows of `text.seq_len` tokens."""
    tokens: int = 131_072
    """Validation tokens for perplexity and KL."""
    tasks: tuple["Task", ...] = ()
    include: Path | None = None
    """Directory of task definitions for lm-eval (its `--include_path`)."""
    limit: int | None = None
    """Maximum number of items per task."""
    batch_size: int = 16
    prompts: int = 64
    """Number of validation rows whose beginning is continued."""
    prompt_tokens: int = 64
    generated_tokens: int = 256
    """Tokens generated per prompt."""
    lastword_items: int = 500
    """Items of a last-word task that are answered by generation."""
    lengths: tuple[int, ...] = CONTEXT_LENGTHS
    """Context lengths for perplexity."""
    documents: int = 4
    """Number of documents, each of the longest length."""
    cost_lengths: tuple[int, ...] = CONTEXT_LENGTHS
    """Prompt lengths for prefill and decoding time."""
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3
    max_prefill_seconds: float = 60.0
    """Lengths with a longer expected prefill are skipped."""
    baselines: bool = False
    """Also measure the teacher in int8 and with a sliding window."""
    baseline_window: int = 512
    """Tokens of that window."""
    recall_lengths: tuple[int, ...] = (128, 256, 512)
    """Context lengths of the recall tasks."""
    recall_items: int = 8
    """Questions per length and depth."""
    diag_rows: int = 4
    """Number of validation rows for diagnostics."""
    diag_tokens: int = 256
    """Tokens of each of these rows."""


QUICK = Settings(
    tokens=8192,
    limit=100,
    prompts=8,
    generated_tokens=64,
    lastword_items=50,
    lengths=CONTEXT_LENGTHS[:4],
    documents=2,
    cost_lengths=(512, 2048),
    batches=(1,),
    repeats=2,
    max_prefill_seconds=5.0,
)


def settings_for(names: Sequence[str]) -> Settings:
    """The settings for names of suites and presets.

    `quick` is a small version of `STANDARD_SUITES`; `full` is all of them, with baselines. `recall` and `diagnostics`
    are in neither preset.

    Raises:
        UserError: an unknown name; `quick` together with others; no name.
    """
    for name in names:
        if name not in ("quick", "full") and name not in SUITES:
            raise UserError(f"suite: got {name!r}{nearest(name, ['quick', 'full', *SUITES])}")
    if not names or ("quick" in names and len(names) > 1):
        raise UserError(f"suite: got {', '.join(names) or 'none'}, expected quick alone, or any of full and the suites")
    if names[0] == "quick":
        return QUICK
    wanted = {*names, *(STANDARD_SUITES if "full" in names else ())}
    return replace(Settings(), suites=tuple(name for name in SUITES if name in wanted), baselines="full" in names)
