"""The order in which the sources of a mixture contribute rows."""

import math
from array import array
from collections.abc import Sequence
from fractions import Fraction


class MixtureSchedule:
    """Assigns each row of a mixture to a source: `schedule[i]` is `(source, row of that source)`.

    Among the first n rows, each source has its share of n to within one row, for any weights (deadlines of R. Tijdeman,
    The chairman assignment problem, Discrete Mathematics 32, 1980). The schedule has the sum of the weights as its
    period, with the weights as whole numbers (7 and 3 for 0.7 and 0.3), and is computed once, as far as it is needed.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(w * math.lcm(*(f.denominator for f in exact))) for w in exact]
        self.weights = [w // math.gcd(*whole) for w in whole]
        self.period = sum(self.weights)
        self._counts = [0] * len(weights)
        self._sources, self._rows = array("H"), array("q")

    def __getitem__(self, index: int) -> tuple[int, int]:
        if len(self.weights) == 1:
            return 0, index
        cycle, offset = divmod(index, self.period)
        while len(self._sources) <= offset:
            self._extend()
        source = self._sources[offset]
        return source, cycle * self.weights[source] + self._rows[offset]

    def max_count(self, source: int, rows: int) -> int:
        """The largest number of rows that a source can have among the first `rows`."""
        return -(-rows * self.weights[source] // self.period)

    def _extend(self) -> None:
        """Assigns one more row, in whole numbers: all quantities are multiplied by `period` and 2(n - 1)."""
        n, period = len(self.weights), self.period
        row, scale = len(self._sources) + 1, 2 * (n - 1)
        deficits = [scale * (w * row - period * count) for w, count in zip(self.weights, self._counts, strict=True)]
        # Of the sources that this row would not put ahead of their share, the one with the earliest deadline.
        eligible = [k for k in range(n) if deficits[k] >= period]
        source = min(eligible, key=lambda k: Fraction((scale - 1) * period - deficits[k], self.weights[k]))
        self._sources.append(source)
        self._rows.append(self._counts[source])
        self._counts[source] += 1
