"""Percentiles of times in memory of a fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_LOWEST = 1e-6  # seconds
_PER_OCTAVE = 16
_OCTAVES = 31  # up to 36 minutes
_PENDING = 512


class Histogram:
    """Times counted in buckets 4.4 % apart, from a microsecond to half an hour.

    Percentiles are upper edges of buckets: never too low, and at most 4.4 % too high. What lies outside counts in the
    first or the last bucket. Not safe to use from several threads at once.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_OCTAVES * _PER_OCTAVE + 1, np.int64)
        self._sum = 0.0
        # To find the bucket of one time right after an engine has emptied the caches takes 5 to 10 us; of many, 0.2.
        self._pending: list[tuple[float, int]] = []

    def add(self, seconds: float, count: int = 1) -> None:
        """Count one time, or the same one ``count`` times."""
        self._pending.append((seconds, count))
        if len(self._pending) == _PENDING:
            self._settled()

    @property
    def count(self) -> int:
        """Times counted."""
        return int(self._settled().sum())

    @property
    def sum(self) -> float:
        """Seconds."""
        self._settled()
        return self._sum

    def percentile(self, percent: float) -> float | None:
        """Seconds that so many percent of all times stay within (nearest rank); None where nothing was counted."""
        so_far = self._settled().cumsum()
        if not so_far[-1]:
            return None
        rank = max(1, math.ceil(int(so_far[-1]) * percent / 100))
        return float(_LOWEST * 2 ** (int(so_far.searchsorted(rank)) / _PER_OCTAVE))

    def within(self, octaves: Sequence[int]) -> list[tuple[float, int]]:
        """(edge in seconds, number of times up to it) for the edges 2 ** octave microseconds, which are exact here."""
        so_far = self._settled().cumsum()
        return [(_LOWEST * 2**octave, int(so_far[octave * _PER_OCTAVE])) for octave in octaves]

    def _settled(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The buckets with everything in them."""
        if self._pending:
            seconds, counts = np.array(self._pending).T
            self._pending.clear()
            # Bucket 0 holds up to the lowest edge, bucket i up to 2 ** (i / 16) times that.
            places = np.ceil(np.log2(np.maximum(seconds / _LOWEST, 1)) * _PER_OCTAVE).astype(np.intp)
            np.add.at(self._counts, places.clip(max=len(self._counts) - 1), counts.astype(np.int64))
            self._sum += float(seconds @ counts)
        return self._counts
