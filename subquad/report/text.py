"""What a study shows, in sentences: the best student, what it keeps and costs; and what cannot be said, and why."""

from collections.abc import Sequence

from subquad.evaluate.results import Result
from subquad.modeling.summary import format_bytes
from subquad.study.aggregate import Group, Mean, best_group, group_labels
from subquad.study.runs import Run


def shown(mean: Mean, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """`33.35 [32.90, 33.80] over 3 seeds`, `33.35 (one seed)`"""
    text = f"{mean.value * scale:.{digits}f}{unit}"
    if mean.low is None or mean.high is None:
        return f"{text} (one seed)"
    return f"{text} [{mean.low * scale:.{digits}f}, {mean.high * scale:.{digits}f}] over {mean.n} seeds"


def summary(groups: Sequence[Group], rows: Sequence[Result]) -> list[tuple[str, str]]:
    """Of the student with the lowest perplexity: a heading and a sentence each."""
    first = best_group(groups, "perplexity", lower_is_better=True)
    if first is None:
        return [("Best student", "No run is finished yet.")]
    perplexity = first.mean("perplexity")
    assert perplexity is not None
    teacher = first.results[0]["teacher_perplexity"]
    found = [
        (
            "Best student",
            f"{group_labels(groups)[first.name]}: held-out perplexity {shown(perplexity)}; its teacher: {teacher:.2f}. "
            f"{distinguished(groups, first)}",
        ),
        ("What it keeps", _keeps(first)),
        ("What it costs", _costs(first, rows)),
    ]
    long = _long(first, rows)
    return [*found, ("In long contexts", long)] if long else found


def distinguished(groups: Sequence[Group], first: Group) -> str:
    """Whether the best is better than the others, as far as seeds tell."""
    mine = first.mean("perplexity")
    assert mine is not None
    others = [(group, mean) for group in groups if group is not first and (mean := group.mean("perplexity"))]
    if not others:
        return "There is nothing to compare it with."
    named = group_labels(groups)
    if mine.n < 2:
        return "With one seed there is no interval: whether it is better than the next cannot be said."
    close = [named[group.name] for group, mean in others if mean.n > 1 and not mine.intervals_disjoint(mean)]
    single = [named[group.name] for group, mean in others if mean.n < 2]
    told = []
    if close:
        told.append(f"Its interval overlaps that of {listed(close)}: no difference is shown.")
    if single:
        told.append(f"Of {listed(single)} there is one seed, so that nothing can be said.")
    return " ".join(told) or "Its interval lies apart from all others."


def listed(names: Sequence[str], most: int = 4) -> str:
    few = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return few[0] if len(few) == 1 else f"{', '.join(few[:-1])} and {few[-1]}"


def _keeps(group: Group) -> str:
    recovered, top1, kl = (group.mean(name) for name in ("recovered_share", "top1_agreement", "kl"))
    assert recovered is not None
    assert top1 is not None
    assert kl is not None
    return (
        f"{100 * recovered.value:.1f}% of the way from token frequencies to the teacher's loss; the same likeliest "
        f"next token as the teacher at {100 * top1.value:.1f}% of places; {kl.value:.3f} nats from its distribution."
    )


def _costs(group: Group, rows: Sequence[Result]) -> str:
    tokens, seconds = (group.mean(name) for name in ("tokens", "seconds"))
    state = group.mean("state_bytes")
    assert tokens is not None
    assert seconds is not None
    assert state is not None
    told = [
        f"{tokens.value:,.0f} tokens and {seconds.value:,.0f} seconds of training. While it decodes it holds "
        f"{format_bytes(state.value)} a sequence."
    ]
    for metric, what in (("seconds_per_token", "the time of a decoded token is"), ("cache_bytes", "its cache is")):
        pair = _beside_teacher(group, rows, metric)
        if pair is not None:
            length, ratio = pair
            more = f"{100 * ratio:.2g}% of" if ratio < 1 else f"{ratio:.1f} times"
            told.append(f"At {length:,} tokens of context {what} {more} the teacher's.")
    return " ".join(told)


def _beside_teacher(group: Group, rows: Sequence[Result], metric: str) -> tuple[int, float] | None:
    """The longest length at which both were measured, and student over teacher there."""
    names = {run.name for run in group.runs}
    own = [r for r in rows if r.metric == metric and r.model in names and r.length and r.batch in (None, 1)]
    for row in sorted(own, key=lambda r: -(r.length or 0)):
        theirs = [r for r in rows if (r.model, r.metric, r.length) == (row.teacher, metric, row.length)]
        theirs = [r for r in theirs if r.batch in (None, 1)]
        if theirs and row.length:
            same = [r.value for r in own if r.length == row.length]
            return row.length, sum(same) / len(same) / theirs[0].value
    return None


def _long(group: Group, rows: Sequence[Result]) -> str | None:
    pair = _beside_teacher(group, rows, "perplexity")
    if pair is None:
        return None
    length, ratio = pair
    return f"Over the first {length:,} tokens of a document its perplexity is {ratio:.2f} times the teacher's."


def report_notes(runs: Sequence[Run], groups: Sequence[Group], rows: Sequence[Result], others: int) -> list[str]:
    """What a reader must know before believing anything."""
    found = []
    failed = [run for run in runs if run.state == "failed"]
    if failed:
        found.append(
            f"{len(failed)} of {len(runs)} runs failed: {listed([run.name for run in failed])}. See the errors."
        )
    waiting = [run for run in runs if run.state in ("new", "unfinished")]
    if waiting:
        found.append(f"{len(waiting)} of {len(runs)} runs are not finished; their lines are empty.")
    done = [len(group.results) for group in groups if group.results]
    if done and max(done) == 1:
        found.append("One seed of everything: no interval is known, and nothing is set in bold as the best.")
    elif done and min(done) == 1:
        found.append(f"{done.count(1)} of {len(done)} students have one seed, and no interval.")
    if not rows:
        found.append(
            "No evaluation is here: quality is held-out perplexity alone, and there is nothing on long contexts, "
            "recall or cost against length. `subquad study RECIPE --output DIR --evaluate quick` adds one."
        )
    else:
        missing = [r.name for r in runs if r.state == "finished" and not any(row.model == r.name for row in rows)]
        if missing:
            found.append(f"The evaluation lacks {listed(missing)}.")
    if others:
        found.append(f"{others} more runs lie in this directory that are not part of the study's recipe; left out.")
    return found
