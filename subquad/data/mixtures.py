"""The order in which the parts of a mixture take turns."""

import math
from array import array
from collections.abc import Sequence
from fractions import Fraction


class MixtureSchedule:
    """Which part has turn i, and which of its own turns that is: `turns[i]` is `(part, turn of that part)`.

    After any number n of turns, part k has had its share of n to within one turn; for any weights, by the deadlines of
    R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980). The turns repeat with the sum of the
    weights as whole numbers (7 and 3 of 0.7 and 0.3), so that they are worked out once, as far as they are needed.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(w * math.lcm(*(f.denominator for f in exact))) for w in exact]
        self.weights = [w // math.gcd(*whole) for w in whole]
        self.period = sum(self.weights)
        self._had = [0] * len(weights)
        self._parts, self._turns = array("H"), array("q")

    def __getitem__(self, index: int) -> tuple[int, int]:
        if len(self.weights) == 1:
            return 0, index
        cycle, place = divmod(index, self.period)
        while len(self._parts) <= place:
            self._extend()
        part = self._parts[place]
        return part, cycle * self.weights[part] + self._turns[place]

    def __reduce__(self) -> tuple[type, tuple[list[int]]]:
        return MixtureSchedule, (self.weights,)

    def share(self, part: int, turns: int) -> int:
        """The most turns that a part has among the first `turns`."""
        return -(-turns * self.weights[part] // self.period)

    def _extend(self) -> None:
        """One more turn, in whole numbers: everything is times `period` and 2(n - 1)."""
        n, period = len(self.weights), self.period
        turn, scale = len(self._parts) + 1, 2 * (n - 1)
        behind = [scale * (w * turn - period * had) for w, had in zip(self.weights, self._had, strict=True)]
        # Of those that may have it without being early, the one that would first be late.
        able = [k for k in range(n) if behind[k] >= period]
        part = min(able, key=lambda k: Fraction((scale - 1) * period - behind[k], self.weights[k]))
        self._parts.append(part)
        self._turns.append(self._had[part])
        self._had[part] += 1
