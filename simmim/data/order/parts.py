"""How the data workers of all processes share tars of which only the lengths are known.

The tars of a pass, one after another, are cut into parts of equal length. Where a part ends within
a tar, each of the two readers takes its fraction of the tar's samples.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, are spread evenly over 0 to 1, however many there are."""


class Part(NamedTuple):
    """A part of the tars of a pass, in their order: from and to which fraction of their length."""

    start: Fraction
    stop: Fraction

    def cut(self, count: int) -> list["Part"]:
        """Return equal parts of this part."""
        edges = [self.start + (self.stop - self.start) * n / count for n in range(count + 1)]
        return [Part(*edge) for edge in pairwise(edges)]


WHOLE = Part(Fraction(0), Fraction(1))


class Piece(NamedTuple):
    """A tar, or the samples of one whose places are from `low` to `high`."""

    tar: int
    low: float = 0.0
    high: float = 1.0

    def has(self, row: int) -> bool:
        """Return whether a sample of the tar, counted from 0, belongs to the piece."""
        return self.low <= (row + 1) * GOLDEN_RATIO % 1 < self.high


def pieces_of(part: Part, order: Sequence[int], lengths: Sequence[int]) -> Iterator[Piece]:
    """Yield the pieces of a part.

    Args:
        part: the part.
        order: numbers of all tars in the order of the pass.
        lengths: length of each tar, above 0, by its number.
    """
    edges = [0, *accumulate(lengths[tar] for tar in order)]
    start, stop = part.start * edges[-1], part.stop * edges[-1]
    for place in range(bisect_right(edges, start) - 1, bisect_left(edges, stop)):
        tar, edge = order[place], edges[place]
        low, high = (start - edge) / lengths[tar], (stop - edge) / lengths[tar]
        yield Piece(tar, float(max(low, Fraction(0))), float(min(high, Fraction(1))))
