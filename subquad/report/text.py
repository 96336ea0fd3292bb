"""The sentences of a report: quality and cost of the best student, and notes on what is missing."""

from collections.abc import Sequence

from subquad.analysis.plot_style import points_by
from subquad.evaluate.results import Result, select
from subquad.modeling.summary import format_bytes
from subquad.study.aggregate import Group, Mean, best_group, group_labels
from subquad.study.runs import Run

SPEED = "decode_tokens_per_second"


def format_mean(mean: Mean, digits: int = 2) -> str:
    """`33.35 [32.90, 33.80] (3 seeds)`, `33.35 (1 seed)`."""
    if mean.low is None or mean.high is None:
        return f"{mean.value:.{digits}f} (1 seed)"
    return f"{mean.value:.{digits}f} [{mean.low:.{digits}f}, {mean.high:.{digits}f}] ({mean.n} seeds)"


def join_names(names: Sequence[str], limit: int = 4) -> str:
    """`a, b and c`; of more than `limit` names the rest is counted."""
    parts = list(names[:limit]) + ([f"{len(names) - limit} more"] if len(names) > limit else [])
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def measured(group: Group, metric: str) -> Mean:
    """The mean of a metric that every run measures, in a group with a finished run."""
    mean = group.mean(metric)
    assert mean is not None
    return mean


# ---------------------------------------------------------------------- summary


def summary(groups: Sequence[Group], results: Sequence[Result]) -> list[tuple[str, str]]:
    """Headings and sentences about the student with the lowest perplexity. `results`: of evaluations."""
    best = best_group(groups, "perplexity", lower_is_better=True)
    if best is None:
        return [("Best student", "No run is finished yet.")]
    recovered, top1, kl, tokens, seconds, state = (
        measured(best, metric).value
        for metric in ("recovered_share", "top1_agreement", "kl", "tokens", "seconds", "state_bytes")
    )
    perplexity, of_teacher = measured(best, "perplexity"), best.results[0]["teacher_perplexity"]
    label = group_labels(groups)[best.name]
    name = f"{label}: validation perplexity {format_mean(perplexity)}; teacher {of_teacher:.2f}."
    closeness = (
        f"Recovers {100 * recovered:.1f}% of the loss gap between the unigram model and the teacher. Its most likely "
        f"next token is the teacher's at {100 * top1:.1f}% of positions. KL divergence to the teacher: {kl:.3f} nats."
    )
    cost = f"Trained on {tokens:,.0f} tokens in {seconds:,.0f} seconds."
    cost += f" Its state takes {format_bytes(state)} per sequence{teacher_costs(best)}."
    for metric, quantity in (("seconds_per_token", "decoding time per token"), ("cache_bytes", "cache")):
        if found := _ratio_to_teacher(best, results, metric):
            length, ratio = found
            text = f"{100 * ratio:.2g}% of" if ratio < 1 else f"{ratio:.1f} times"
            cost += f" At {length:,} tokens of context, its {quantity} is {text} the teacher's."
    sentences = [("Best student", name), ("Quality", closeness), ("Cost", cost)]
    sentences.append(("How sure", significance(groups, best)))
    if found := _ratio_to_teacher(best, results, "perplexity"):
        length, ratio = found
        text = f"Over the first {length:,} tokens of a document, its perplexity is {ratio:.2f} times the teacher's."
        sentences.append(("Long context", text))
    return sentences


def teacher_costs(group: Group) -> str:
    """`, the teacher's 1.77 MB; it decodes 155 tokens per second, the teacher 86`, where that was measured."""
    state, speed, own = map(group.mean, ("teacher_state_bytes", "teacher_decode_tokens_per_second", SPEED))
    if state is None or speed is None or own is None:
        return ""
    return (
        f", the teacher's {format_bytes(state.value)}; it decodes {own.value:,.0f} tokens per second, the teacher "
        f"{speed.value:,.0f}"
    )


def sample(groups: Sequence[Group]) -> dict[str, str] | None:
    """A prompt and what the best student and its teacher write after it: `prompt`, `student`, `teacher`."""
    best = best_group(groups, "perplexity", lower_is_better=True)
    return None if best is None else next((found for result in best.results if (found := result.get("sample"))), None)


def _ratio_to_teacher(group: Group, results: Sequence[Result], metric: str) -> tuple[float, float] | None:
    """The longest context length at which student and teacher were evaluated, and the ratio of their values there."""
    single = [r for r in select(results, metric=metric) if r.batch in (None, 1)]
    own = [r for run in group.runs for r in select(single, model=run.name)]
    teachers = {r.teacher for r in own}
    values, of_teacher = (dict(points_by("length", r)) for r in (own, [r for r in single if r.model in teachers]))
    length = max(values.keys() & of_teacher.keys(), default=None)
    return None if length is None else (length, values[length] / of_teacher[length])


def significance(groups: Sequence[Group], best: Group) -> str:
    """Whether the best group is significantly better than the others in perplexity."""
    mean = measured(best, "perplexity")
    others = [(group, other) for group in groups if group is not best and (other := group.mean("perplexity"))]
    if not others:
        return "There is no other student to compare it with."
    if mean.n < 2:
        return "With one seed there is no interval, so it is unknown whether it is better than the next student."
    labels = group_labels(groups)
    overlapping = [labels[group.name] for group, other in others if other.n > 1 and not mean.intervals_disjoint(other)]
    single = [labels[group.name] for group, other in others if other.n < 2]
    sentences = []
    if overlapping:
        sentences.append(f"Its interval overlaps that of {join_names(overlapping)}: the difference is not significant.")
    if single:
        sentences.append(f"It cannot be compared with {join_names(single)}: one seed only.")
    return " ".join(sentences) or "Its interval does not overlap any other."


# ---------------------------------------------------------------------- notes


def is_worse(group: Group) -> bool:
    """Whether training moved a student away from its teacher."""
    before, after = group.mean("kl_at_init"), group.mean("kl")
    return before is not None and after is not None and after.value > before.value


def report_notes(runs: Sequence[Run], groups: Sequence[Group], results: Sequence[Result], unrelated: int) -> list[str]:
    """What is missing or uncertain: failed and unfinished runs, single seeds, missing evaluations.

    unrelated: number of runs in the directory that are not part of the study.
    """
    notes = []
    failed = [run for run in runs if run.state == "failed"]
    if failed:
        names = join_names([run.name for run in failed])
        notes.append(f"{len(failed)} of {len(runs)} runs failed: {names}. See “Failed runs” below.")
    unfinished = sum(run.state in ("new", "unfinished") for run in runs)
    if unfinished:
        notes.append(f"{unfinished} of {len(runs)} runs are not finished; their results are missing.")
    seeds = [len(group.results) for group in groups if group.results]
    if seeds and max(seeds) == 1:
        notes.append("Every student has one seed: there are no intervals, and no best value is set in bold.")
    elif seeds and min(seeds) == 1:
        notes.append(f"{seeds.count(1)} of {len(seeds)} students have one seed and no interval.")
    if not results:
        notes.append(
            "The study has no evaluation: quality is validation perplexity alone, without long context, recall or cost "
            "by length. `subquad study RECIPE --output DIR --evaluate quick` adds one."
        )
    else:
        evaluated = {result.model for result in results}
        missing = [run.name for run in runs if run.state == "finished" and run.name not in evaluated]
        if missing:
            notes.append(f"The evaluation does not include {join_names(missing)}.")
    labels = group_labels(groups)
    worse = [labels[group.name] for group in groups if is_worse(group)]
    if worse:
        notes.append(f"Training made {join_names(worse)} worse: the KL from the teacher is higher than before.")
    better = [labels[group.name] for group in groups if (share := group.mean("recovered_share")) and share.value > 1]
    if better:
        notes.append(f"Recovered above 100%: {join_names(better)}, with a lower loss on this text than the teacher's.")
    if unrelated:
        notes.append(f"{unrelated} other runs in this directory are not part of the study's recipe and are left out.")
    return notes
