"""Batches cut into pieces, worked on by slots: what the engines share of running and submitting.

A *slot* is one set of buffers that works on one piece at a time: an OpenVINO request, a CUDA stream with what it needs.
A :class:`Lane` holds the idle slots of one kind. An engine says how a batch is cut (a list of :data:`Piece`); the
:class:`Runner` finds a slot for each piece, lets pieces overlap, and brings the results home.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from defense_vae_fast.engines.base import Images, Result, Scores


class Slot(Protocol):
    """Works on one piece at a time."""

    def start(self, batch: Images) -> None:
        """Copy the images and begin; whoever called may reuse their memory at once."""

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


Piece = tuple[Lane[Any], int, int]
"""Images ``start`` to ``stop`` of a batch, and the lane that works on them."""


class Runner:
    """Runs the pieces of batches, for any number of threads.

    Submitted batches are waited for in order by one thread, started with the first of them. A future's callbacks run on
    that thread and may call the engine again: where they need a slot and all are busy, the thread brings the next
    flying piece home itself, for nobody else would.
    """

    def __init__(self, name: str) -> None:
        self._completer = _Completer(f"defense_vae_fast-{name}")

    def run(self, pieces: Iterable[Piece], batch: Images, purified: Images, scores: Scores) -> None:
        """Work on a batch and wait for it."""
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
                slot = slot or self.acquire(lane)
                flying.append((lane, slot, slice(start, stop)))
                slot.start(batch[start:stop])
            while flying:
                land()
        finally:
            for lane, slot, _ in flying:  # only after an error: nothing may write into a slot that went back running
                slot.abandon()
                lane.free.put(slot)

    def submit(self, pieces: Sequence[Piece], batch: Images) -> Future[Result]:
        """Start a batch and return; waits for slots while all are busy, so that memory stays bounded."""
        job = _Job(np.empty_like(batch), np.empty(len(batch), np.float32), len(pieces))
        for lane, start, stop in pieces:
            slot = self.acquire(lane)
            try:
                slot.start(batch[start:stop])
            except BaseException as error:
                lane.free.put(slot)
                # The pieces already under way must land before the future may be resolved.
                job.error = job.error or error
                self._completer.put(_Flying(job, None, slice(0)))
                continue
            self._completer.put(_Flying(job, (lane, slot), slice(start, stop)))
        return job.future

    def refuse_close_from_callback(self) -> None:
        """Raise RuntimeError on the thread that resolves futures, which closing would wait for."""
        if self._completer.is_current():
            raise RuntimeError("close() was called from a future's callback, which it would wait for; call it outside")

    def stop(self) -> None:
        """End the thread after what is already in flight; does not wait."""
        self._completer.stop()

    def join(self) -> None:
        """Wait for the end that :meth:`stop` asked for; on the thread itself there is nothing to wait for."""
        self._completer.join()

    def acquire(self, lane: Lane[AnySlot]) -> AnySlot:
        """An idle slot of a lane, waited for; who takes it puts it back into ``lane.free``."""
        while True:
            slot = lane.try_acquire()
            if slot is not None:
                return slot
            if not self._completer.is_current():
                return lane.free.get()
            if not self._completer.land_one():
                # Every slot is with another thread; one that submits hands its piece over a moment after starting it.
                with suppress(Empty):
                    return lane.free.get(timeout=1e-3)


class _Job:
    """A submitted batch on its way."""

    def __init__(self, purified: Images, scores: Scores, pieces: int) -> None:
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()  # it starts at once, so there is nothing left to cancel
        self.purified = purified
        self.scores = scores
        self.pieces = pieces
        self.error: BaseException | None = None

    def resolve(self) -> None:
        if self.error is None:
            self.future.set_result((self.purified, self.scores))
        else:
            self.future.set_exception(self.error)


class _Flying(NamedTuple):
    """A piece under way; ``where_from`` is None when it could not be started."""

    job: _Job
    where_from: tuple[Lane[Any], Slot] | None
    where_to: slice


class _Flow:
    """What the thread needs; it holds no reference to the engine, so that a forgotten engine is collected."""

    def __init__(self) -> None:
        self.flying: SimpleQueue[_Flying | None] = SimpleQueue()
        self.done: deque[_Job] = deque()
        self.stopping = False


class _Completer:
    """A thread that waits for submitted pieces in order, hands their results out and their slots back.

    OpenVINO's own callbacks run on one thread that the next completion needs as well, and CUDA's may not call CUDA: a
    future's callback that called the engine again would stop everything. This thread needs nobody but itself.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._flow = _Flow()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, piece: _Flying) -> None:
        self._flow.flying.put(piece)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=_complete, args=(self._flow,), name=self._name, daemon=True)
                    self._thread.start()

    def land_one(self) -> bool:
        """Bring the next piece home, on the thread itself; its future is resolved later. False: nothing is flying."""
        try:
            piece = self._flow.flying.get_nowait()
        except Empty:
            return False
        if piece is None:
            self._flow.stopping = True
        else:
            _land(piece, self._flow.done)
        return True

    def stop(self) -> None:
        self._flow.flying.put(None)

    def join(self) -> None:
        if self._thread is not None and not self.is_current():
            self._thread.join()

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread


def _complete(flow: _Flow) -> None:
    while True:
        while flow.done:
            flow.done.popleft().resolve()
        if flow.stopping:
            return
        piece = flow.flying.get()
        if piece is None:
            flow.stopping = True
        else:
            _land(piece, flow.done)
        del piece  # a finished batch is not kept until the next one comes


def _land(piece: _Flying, done: deque[_Job]) -> None:
    job = piece.job
    if piece.where_from is not None:
        lane, slot = piece.where_from
        try:
            slot.finish(job.purified[piece.where_to], job.scores[piece.where_to])
        except BaseException as error:  # it belongs to the future, whatever it is
            job.error = job.error or error
        lane.free.put(slot)
    job.pieces -= 1
    if job.pieces == 0:
        done.append(job)
