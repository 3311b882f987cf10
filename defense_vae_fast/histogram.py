"""Percentiles of times in memory of a fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

_LOWEST = 1e-6  # seconds
_PER_OCTAVE = 16
_OCTAVES = 31  # up to 36 minutes


class Histogram:
    """Times counted in buckets 4.4 % apart, from a microsecond to half an hour.

    Percentiles are upper edges of buckets: never too low, and at most 4.4 % too high. What lies outside counts in the
    first or the last bucket. Not safe to add to from several threads at once.
    """

    def __init__(self) -> None:
        self._counts = [0] * (_OCTAVES * _PER_OCTAVE + 1)
        self.count = 0
        self.sum = 0.0
        """Seconds."""

    def add(self, seconds: float, count: int = 1) -> None:
        """Count one time, or the same one ``count`` times."""
        # Bucket 0 holds up to the lowest edge, bucket i up to 2 ** (i / 16) times that.
        place = math.ceil(math.log2(seconds / _LOWEST) * _PER_OCTAVE) if seconds > _LOWEST else 0
        self._counts[min(place, len(self._counts) - 1)] += count
        self.count += count
        self.sum += seconds * count

    def percentile(self, percent: float) -> float | None:
        """Seconds that so many percent of all times stay within (nearest rank); None where nothing was counted."""
        if not self.count:
            return None
        rank = max(1, math.ceil(self.count * percent / 100))
        place = next(place for place, so_far in enumerate(accumulate(self._counts)) if so_far >= rank)
        return float(_LOWEST * 2 ** (place / _PER_OCTAVE))

    def within(self, octaves: Sequence[int]) -> list[tuple[float, int]]:
        """(edge in seconds, number of times up to it) for the edges 2 ** octave microseconds, which are exact here."""
        return [(_LOWEST * 2**octave, sum(self._counts[: octave * _PER_OCTAVE + 1])) for octave in octaves]
