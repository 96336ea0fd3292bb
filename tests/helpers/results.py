"""Results of an evaluation."""

from subquad.evaluate.results import Result, select


def select_one(results: list[Result], **fields) -> Result:
    """The only result with these field values."""
    (found,) = select(results, **fields)
    return found
