"""Batches cut into pieces, worked on by slots: what the engines share of running.

A *slot* is one set of buffers that works on one piece at a time: an OpenVINO request, a CUDA stream with what it needs.
A :class:`Lane` holds the idle slots of one kind. An engine says how a batch is cut (a list of :data:`Piece`);
:func:`run_pieces` finds a slot for each piece, lets pieces overlap, and brings the results home.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from defense_vae_fast.engines.base import Images, Scores


class Slot(Protocol):
    """Works on one piece at a time."""

    def start(self, batch: Images) -> None:
        """Begin; the images stay as they are until :meth:`finish` or :meth:`abandon` returns."""

    def finish(self, purified: Images, scores: Scores) -> None:
        """Wait, and copy the results out."""

    def abandon(self) -> None:
        """Wait for what was started and forget its results."""


AnySlot = TypeVar("AnySlot", bound=Slot)


class Lane(Generic[AnySlot]):
    """Slots that are alike, those of them that are idle in a queue."""

    def __init__(self, slots: Iterable[AnySlot]) -> None:
        self.free: SimpleQueue[AnySlot] = SimpleQueue()
        for slot in slots:
            self.free.put(slot)

    def try_acquire(self) -> AnySlot | None:
        """An idle slot, or None."""
        try:
            return self.free.get_nowait()
        except Empty:
            return None


def nothing() -> None:
    """What a slot on a GPU does before, between and after its copies and its computing, where nobody measures them."""


Piece = tuple[Lane[Any], int, int]
"""Images ``start`` to ``stop`` of a batch, and the lane that works on them."""


def run_pieces(pieces: Iterable[Piece], batch: Images, purified: Images, scores: Scores) -> None:
    """Work on the pieces of a batch, overlapping, and wait for them; for any number of threads."""
    flying: deque[tuple[Lane[Any], Slot, slice]] = deque()

    def land() -> None:
        lane, slot, where = flying.popleft()
        try:
            slot.finish(purified[where], scores[where])
        finally:
            lane.free.put(slot)

    try:
        for lane, start, stop in pieces:
            slot = lane.try_acquire()
            # Land our own before waiting for another thread's, or two threads could wait for each other.
            while slot is None and flying:
                land()
                slot = lane.try_acquire()
            slot = slot or lane.free.get()
            flying.append((lane, slot, slice(start, stop)))
            slot.start(batch[start:stop])
        while flying:
            land()
    finally:
        for lane, slot, _ in flying:  # only after an error: nothing may write into a slot that went back running
            slot.abandon()
            lane.free.put(slot)
