"""The one error that a user's mistake raises, and the nearest name to what was meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: an unknown name, a missing file, an impossible value.

    Its message is one line that says what was wrong and what was expected, with the nearest valid name where there is
    one. The command line prints it on stderr without a traceback and exits with 2.
    """

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


def nearest(name: object, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'gla'?`, or all valid names where none is near."""
    names = list(valid)
    # Case must not decide what is near, and of two near names the first given wins.
    folded = {n.casefold(): n for n in reversed(names)}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; expected one of {', '.join(names)}" if names else ""
