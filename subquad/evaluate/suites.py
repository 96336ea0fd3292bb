"""What an evaluation consists of, and how much of it a suite asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from subquad.config import Data
from subquad.evaluate.lm_eval import Task
from subquad.evaluate.long_context import LENGTHS
from subquad.utils import UserError, nearest

PARTS = ("language", "zero-shot", "generation", "long", "efficiency")
EXPLAINING = ("recall", "diagnostics")
SUITES = ("quick", "full", *PARTS, *EXPLAINING)


@dataclass(frozen=True)
class Settings:
    """Amounts of a full evaluation; what a caller leaves out stays as it is here."""

    parts: tuple[str, ...] = PARTS
    text: Data = field(default_factory=lambda: Data(source="python-stdlib"))
    """Its held-out text is read, in rows of `data.seq_len` tokens."""
    tokens: int = 131_072
    """Held-out tokens for perplexity and divergence."""
    tasks: tuple[Task, ...] = ()
    include: Path | None = None
    """Task definitions of lm-eval's own kind."""
    limit: int | None = None
    """Items of a task."""
    batch_size: int = 16
    prompts: int = 64
    """Rows of held-out text that are continued."""
    prompt_tokens: int = 64
    """Tokens of each."""
    generated: int = 256
    """Tokens written behind each."""
    lastword_items: int = 500
    """Items of a last-word task that are answered by generation."""
    lengths: tuple[int, ...] = LENGTHS
    """Tokens of context for perplexity."""
    documents: int = 4
    """Documents of the longest length."""
    cost_lengths: tuple[int, ...] = LENGTHS
    """Tokens of a prefill that is timed."""
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3
    seconds: float = 60.0
    """About the longest prefill that is timed."""
    baselines: bool = False
    """Measure the teacher in int8 and with a sliding window as well."""
    window: int = 512
    """Tokens of that window."""
    recall_lengths: tuple[int, ...] = (128, 256, 512)
    """Tokens of context in which something is to be found."""
    recall_items: int = 8
    """Questions for each of these lengths and each depth."""
    diag_rows: int = 4
    """Rows of held-out text through which a model's inside is looked at."""
    diag_tokens: int = 256
    """Tokens of each."""


QUICK = Settings(
    tokens=8192,
    limit=100,
    prompts=8,
    generated=64,
    lastword_items=50,
    lengths=LENGTHS[:4],
    documents=2,
    cost_lengths=(512, 2048),
    batches=(1,),
    repeats=2,
    seconds=5.0,
)


def settings_of(suites: Sequence[str]) -> Settings:
    """What suites ask for: `quick` is a little of `PARTS`, `full` all of them and cheaper teachers, a part's name all
    of that part. `recall` and `diagnostics` explain rather than measure, and have to be asked for.

    Raises:
        UserError: an unknown name, or `quick` beside others.
    """
    for name in suites:
        if name not in SUITES:
            raise UserError(f"unknown suite {name!r}{nearest(name, SUITES)}")
    if not suites or ("quick" in suites and len(suites) > 1):
        raise UserError(f"suites: got {', '.join(suites) or 'none'}; expected quick alone, or some of full and parts")
    if suites[0] == "quick":
        return QUICK
    wanted = {*suites, *(PARTS if "full" in suites else ())}
    parts = tuple(part for part in (*PARTS, *EXPLAINING) if part in wanted)
    return replace(Settings(), parts=parts, baselines="full" in suites)
