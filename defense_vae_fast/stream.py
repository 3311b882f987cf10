"""Live frames of many sources: micro-batches, deadlines, a bounded queue, and an exact account of every frame.

One thread takes what waits to the engine, a batch at a time, and hands the results out. ``Purifier.submit`` is this
with its defaults. The rules of the queue are in :mod:`~defense_vae_fast.backlog`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from defense_vae_fast.backlog import WHEN_FULL, Backlog, Cause, Item, WhenFull
from defense_vae_fast.engines.base import Engine, ImageKind, Images, Scores, check_count, forked_error
from defense_vae_fast.histogram import Histogram
from defense_vae_fast.images import Batch, ImageReader

if TYPE_CHECKING:
    import asyncio

    _Copy = tuple[Images, int | None]  # and the place that it is in, if that is one of the stream's
    _Entry = tuple[Batch, _Copy, float, float, Hashable, Future[Any], Any]  # what a _Job is made of
    _Left = tuple[Callable[..., Any], _Entry]
    _Part = tuple[Images, Scores] | BaseException

_log = logging.getLogger(__name__)
_DELAY = 0.002  # seconds, unless another is given
_LONE_TIMES = 512  # of so many frames computed by their putters the account is made at once
_making = threading.Lock()  # held while the Future in a Ticket is made
_CALLBACK_RAISED = "a callback of the stream raised"
_PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}


class Result(NamedTuple):
    """What became of one frame."""

    image: Any
    """The purified frame in the kind, dtype, shape and device of the frame, owned by the receiver; None if dropped."""
    score: float | None
    """Mean |x - x_hat| in [0, 1]; None if dropped."""
    source: Hashable
    """As given to :meth:`Stream.put`."""
    tag: Any
    """As given to :meth:`Stream.put`."""
    waited_ms: float
    """From the call of ``put`` to the start of its computation, or to its dropping."""
    dropped: Cause | None = None
    """None, or why there is no image: "replaced" by newer frames (``when_full="latest"``), "oldest"
    (``when_full="drop_oldest"``), "rejected", "deadline", "cancelled", "stopped" (the engine was closed), "failed"."""
    error: BaseException | None = None
    """With "failed" and "stopped", the reason."""


class Ticket(Future[Result]):
    """The future :class:`Result` of one frame; ``await`` works on it too.

    A frame that was dropped has a result that says so; one that failed or was stopped raises the reason. It cannot be
    cancelled: give the frame a deadline.
    """

    # To make a Future right after an engine has emptied the caches, and to set its result, took 20 us of the 55 that a
    # lone frame cost. So the Future in a Ticket is made when somebody looks for anything of it.
    _made = False
    _outcome: Result | None = None

    def __init__(self, core: _Core) -> None:
        self._core: _Core | None = core
        if not core.idle:  # many are on their way, and making it later costs a little more
            super().__init__()
            self._made = True

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            with _making:
                if not self._made:
                    future: Future[Result] = Future()
                    if self._outcome is not None:
                        future.set_result(self._outcome)
                    self.__dict__.update(future.__dict__)
                    self._made = True
            return object.__getattribute__(self, name)

    def result(self, timeout: float | None = None) -> Result:
        """The result, waited for at most ``timeout`` seconds (None: as long as it takes).

        Raises:
            TimeoutError: it is not there yet.
        """
        if timeout is None and (core := self._core) is not None and (result := core.compute_here(self)) is not None:
            return result
        self._wanted()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error, waited for like the result; None if there is none."""
        self._wanted()
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[Result]], object]) -> None:
        """Have ``fn`` called with this ticket when the result is there, at once if it is."""
        super().add_done_callback(fn)
        self._wanted()

    def cancel(self) -> bool:
        """False: it cannot be cancelled."""
        return False

    def _wanted(self) -> None:
        if (core := self._core) is not None:
            core.wake()

    def _resolve(self, result: Result) -> None:
        self._core = None  # the stream need not live as long as its results
        with _making:
            if not self._made and result.error is None:
                self._outcome = result
                return
        if result.error is not None:
            self.set_exception(result.error)
        else:
            self.set_result(result)

    def _has_callbacks(self) -> bool:
        return self._made and bool(self._done_callbacks)  # type: ignore[attr-defined]

    def __await__(self) -> Generator[Any, None, Result]:
        import asyncio

        return asyncio.wrap_future(self).__await__()


Callback = Callable[[Result], object]


class Stream:
    """Frames in from any number of threads, results out by future, ``await``, callback and iteration.

    Made by :meth:`Purifier.stream`. A context manager: leaving it finishes what waits. An item goes to the engine when
    a batch is full, when the oldest item has waited ``max_delay_ms`` (or half its deadline), or at once when the engine
    has nothing to do. Of what waits, a multiple of the engine's ``batch_step`` goes, where there are so many; the rest
    is first in the next batch. Sources take turns, so none starves another, and the results of one source come in the
    order in which its frames were put, dropped ones included.

    Callbacks, of the stream and of its tickets, run on the stream's own thread, one after the other: a slow one holds
    the stream up, and one that raises is logged. Whoever waits in :meth:`Ticket.result` for the only frame that there
    is, without callbacks, computes it on their own thread, which saves two changes of threads. While that goes on, a
    lone frame that nobody asks for may be left for five times ``max_delay_ms``, or half its deadline.

    Args:
        engine: what computes.
        reader: what reads the frames.
        max_batch: most frames of a batch.
        max_delay_ms: how long a frame may wait for others to share its batch, in milliseconds. None: half as long as
            the engine is seen to take for one frame, and 2 at most; longer makes larger batches, but later results.
        queue: most frames that may wait.
        when_full: what happens to a frame when ``queue`` frames wait. "block": ``put`` waits for room; "reject": it is
            dropped; "drop_oldest": the oldest frame is dropped for it; "latest": all frames but the newest are.
            Both drop from the source that has the most frames waiting.
        callback: called with every :class:`Result`.
        iterate: keep results for ``for result in stream`` and ``async for``. A reader that is ``queue`` results behind
            holds the stream up, so that frames wait and ``when_full`` decides; notices of dropped frames are then left
            out. Read in another thread than the one that puts.

    Raises:
        ValueError, TypeError: an option is not one of the above.
    """

    def __init__(
        self,
        engine: Engine,
        reader: ImageReader,
        *,
        max_batch: int,
        max_delay_ms: float | None = None,
        queue: int = 256,
        when_full: WhenFull = "block",
        callback: Callback | None = None,
        iterate: bool = False,
    ) -> None:
        check_count("max_batch", max_batch)
        check_count("queue", queue, 1 << 20)
        delay = _DELAY if max_delay_ms is None else _milliseconds("max_delay_ms", max_delay_ms)
        if when_full not in WHEN_FULL:
            raise ValueError(f"when_full: expected one of {', '.join(map(repr, WHEN_FULL))}, got {when_full!r}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a function of one Result, got {callback!r}")
        self._read = reader.read
        backlog: Backlog[_Job] = Backlog(queue, max_batch, delay, when_full, engine.batch_step)
        self._core = _Core(engine, backlog, queue, when_full, callback, iterate, 5 * delay, max_delay_ms is None)
        # The thread holds no reference to this object, so that a forgotten stream ends, after what waits.
        weakref.finalize(self, self._core.end).atexit = False

    def put(self, frame: Any, source: Hashable = None, *, deadline_ms: float | None = None, tag: Any = None) -> Ticket:
        """Hand in one frame and return at once, or after waiting for room with ``when_full="block"``.

        The frame is checked and copied before this returns, so its memory may be reused.

        Args:
            frame: one image of any kind that :class:`Purifier` takes.
            source: where it comes from, anything hashable: order and fairness are by source.
            deadline_ms: milliseconds from now after which its result is of no use; a frame that has waited so long is
                dropped instead of computed. A little must be left for the computing itself.
            tag: anything; it comes back with the result.

        Raises:
            TypeError, ValueError: the frame is not what the network takes, or an argument is wrong. The frame counts as
                dropped, "invalid", and nothing else is touched.
            RuntimeError: the stream is closed, its engine has stopped, or this process is a fork of its own.
        """
        since = time.monotonic()
        core = self._core
        core.check_open()
        try:
            deadline = math.inf if deadline_ms is None else _milliseconds("deadline_ms", deadline_ms)
            hash(source)
            read = self._read(frame)
            if not read.single:
                raise ValueError(
                    f"frame: expected one image, got a batch of {len(read.array)}; put its images one by one"
                )
        except (TypeError, ValueError):
            core.count_invalid()
            raise
        ticket = Ticket(core)
        core.enter(_Frame, (read, core.copy(read.array), since, deadline, source, ticket, tag))
        return ticket

    def _submit(self, images: Any, return_score: bool) -> Future[Any]:
        """What :meth:`Purifier.submit` does."""
        since = time.monotonic()
        self._core.check_open()
        try:
            read = self._read(images)
        except (TypeError, ValueError):
            self._core.count_invalid()
            raise
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # so that it cannot be cancelled
        self._core.enter(_Submission, (read, self._core.copy(read.array), since, math.inf, None, future, return_score))
        return future

    def stats(self) -> dict[str, Any]:
        """What has happened so far, as a dictionary that JSON can hold.

        Its keys: ``frames_in``; ``frames_out``; ``dropped`` (cause: frames); ``in_progress``, those that wait or are
        computed. At any moment ``frames_in == frames_out + sum(dropped.values()) + in_progress``. ``waiting_ms`` and
        ``computing_ms`` hold ``p50``, ``p99`` and ``p99.9`` over the frames that came out, in milliseconds (None before
        the first one; up to 4.4 % too high): from ``put`` to the start of a frame's batch, and from there to its end.
        ``batch_sizes``: size: batches, a submitted batch beyond ``max_batch`` counting as that; ``sources``: those with
        frames in progress.
        """
        return self._core.stats()

    def histograms(self, octaves: Sequence[int]) -> dict[str, tuple[list[tuple[float, int]], int, float]]:
        """Cumulative counts of the waiting and computing times, for monitoring.

        Args:
            octaves: edges as exponents, each 2 ** octave microseconds, 0 to 31.

        Returns:
            For "waiting" and "computing" a list of (edge in seconds, frames within it), the number of all frames, and
            the sum of their seconds.
        """
        return self._core.histograms(octaves)

    def close(self) -> None:
        """Finish what waits, then end. Calling it again does nothing.

        Raises:
            RuntimeError: called from a callback, which it would wait for.
        """
        self._core.close(cancel=False)

    def cancel(self) -> None:
        """End without computing what waits: it is dropped, "cancelled". A batch under way is still finished.

        From a callback it returns at once, elsewhere when everything has been handed out.
        """
        self._core.close(cancel=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Stream:
        self._core.check_iterable()
        return self

    def __next__(self) -> Result:
        result = self._core.next_result()
        if result is None:
            raise StopIteration
        return result

    def __aiter__(self) -> Stream:
        self._core.check_iterable()
        return self

    async def __anext__(self) -> Result:
        import asyncio

        while True:
            woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            result, ended = self._core.poll_result(woken)
            if result is not None:
                return result
            if ended:
                raise StopAsyncIteration
            await woken

    def __reduce__(self) -> NoReturn:
        raise TypeError("expected a Stream to stay in the process that made it, got a request to pickle or copy it")


class _Job(Item):
    """An item with somebody waiting for it."""

    __slots__ = ("future", "name", "to_images")

    def __init__(
        self, read: Batch, copied: _Copy, since: float, deadline: float, name: Hashable, future: Future[Any]
    ) -> None:
        array, slot = copied
        super().__init__(array, _kind(array), since, deadline)
        self.slot = slot
        self.name = name  # of its source
        self.to_images = read.images
        self.future = future

    def take(self, part: _Part) -> None:
        """Keep the results, which belong to it, in the caller's kind, or the error."""
        try:
            if isinstance(part, BaseException):
                raise part
            self.fill(*part)
        except BaseException as error:  # it belongs to the future, whatever it is
            self.dropped, self.error = "failed", error

    def fill(self, purified: Images, scores: Scores) -> None:
        """Keep the results in the caller's kind."""
        raise NotImplementedError

    def resolve(self) -> Result | None:
        """Tell the future; the result for callback and iteration, if there is one."""
        raise NotImplementedError


class _Frame(_Job):
    """What :meth:`Stream.put` was given."""

    __slots__ = ("image", "score", "tag")
    future: Ticket

    def __init__(
        self, read: Batch, copied: _Copy, since: float, deadline: float, name: Hashable, ticket: Ticket, tag: Any
    ) -> None:
        super().__init__(read, copied, since, deadline, name, ticket)
        self.tag = tag
        self.image: Any = None
        self.score: float | None = None

    def fill(self, purified: Images, scores: Scores) -> None:
        self.image, self.score = self.to_images(purified), scores.item(0)

    def resolve(self) -> Result:
        if self.dropped is not None:  # an image that was made before the failure is not handed out
            self.image = self.score = None
        result = Result(self.image, self.score, self.name, self.tag, 1e3 * self.waited, self.dropped, self.error)
        self.future._resolve(result)
        return result


class _Submission(_Job):
    """What :meth:`Purifier.submit` was given; its answer is what calling the Purifier returns."""

    __slots__ = ("answer", "return_score", "single", "to_scores")

    def __init__(
        self,
        read: Batch,
        copied: _Copy,
        since: float,
        deadline: float,
        name: Hashable,
        future: Future[Any],
        return_score: bool,
    ) -> None:
        super().__init__(read, copied, since, deadline, name, future)
        self.return_score, self.single, self.to_scores = return_score, read.single, read.scores
        self.answer: Any = None

    def fill(self, purified: Images, scores: Scores) -> None:
        self.answer = self.to_images(purified)
        if self.return_score:
            self.answer = self.answer, float(scores[0]) if self.single else self.to_scores(scores.copy())

    def resolve(self) -> None:
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.answer)


class _Buffers:
    """Memory for one kind of image, made once: a place for each frame that waits, and a batch on its way in and out."""

    def __init__(self, engine: Engine, kind: ImageKind, places: int, max_batch: int) -> None:
        shape, dtype = engine.image_shape(kind), np.uint8 if kind == "uint8" else np.float32
        self.waiting = np.empty((places, *shape), dtype)
        # The last one freed is the first one taken: of a long queue that never fills, few pages are ever touched.
        self.free = list(range(places))
        self.images = np.empty((max_batch, *shape), dtype)
        self.purified = np.empty((max_batch, *shape), dtype)


class _Core:
    """The queue, its thread and what both share; it holds no reference to the :class:`Stream`."""

    def __init__(
        self,
        engine: Engine,
        backlog: Backlog[_Job],
        queue: int,
        when_full: WhenFull,
        callback: Callback | None,
        iterate: bool,
        patience: float,
        adapts: bool,
    ) -> None:
        self._engine = engine
        self._backlog = backlog
        self._queue = queue
        self._waits = when_full == "block"
        self._callback = callback
        self._process = os.getpid()
        self._lock = threading.RLock()  # a forgotten Stream may be collected, and ``end`` called, while it is held
        self._work = threading.Condition(self._lock)  # for the thread: there is something to do
        self._room = threading.Condition(self._lock)  # for those who put: there may be room
        self._readable = threading.Condition(self._lock)  # for readers: there is a result, or the end
        self._thread: threading.Thread | None = None
        self._closing = False
        self._ended = False
        self._stopped: BaseException | None = None  # why the engine computes no more
        self.idle = True  # the engine has nothing to do, and nothing waits
        self._lone: _Left | None = None  # what another thread is computing, in :meth:`compute_here`
        self._lone_item: _Job | None = None  # it, once another frame has come
        self._lone_times: list[tuple[float, float, Cause | None]] = []  # not in the account yet: waiting, computing
        # To wake the thread for a frame that its putter then computes costs as much as the rest of a lone frame's way
        # (40 of 80 us). So while putters do that, it wakes by itself, this often, to see whether a frame was left. With
        # ``max_delay`` alone, 2 ms, the waking itself cost 10 to 20 us a frame.
        self._patience = patience
        self._adapts = adapts  # the delay, to what the engine takes
        self._watching = self._computed_here = False
        self._blocked: deque[object] = deque()  # those who wait for room, in their order
        self._buffers: dict[ImageKind, _Buffers] = {}
        self._settled: list[_Job] = []  # dropped by others than the thread, which hands them out
        # Whoever puts while the thread is away, computing, leaves the frame at the door. The engine has emptied the
        # caches, and to queue a frame then costs several times what it costs the thread, which queues many in a row.
        # While nothing waits, one frame may be left there too: if it stays the only one, it needs no queue.
        self._away = False
        self._door: deque[_Left] = deque()
        self._door_room = 0  # images that may still be left there
        self._results: deque[Result] | None = deque() if iterate else None
        self._wakers: list[asyncio.Future[None]] = []
        self._in = self._out = self._computing = 0
        self._dropped: dict[Cause, int] = {}
        self._sizes: dict[int, int] = {}
        self._waiting_times, self._computing_times = Histogram(), Histogram()

    # For those who put

    def check_open(self) -> None:
        if os.getpid() != self._process:
            raise forked_error(self._process)  # before any lock: a thread of the parent may hold it for ever
        if self._closing or self._stopped is not None:
            self._check_running()

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise RuntimeError(f"the stream has stopped: {self._stopped}") from self._stopped
        if self._closing:
            raise RuntimeError("expected an open stream, got a closed one; make another with Purifier.stream")

    def count_invalid(self) -> None:
        with self._lock:
            self._in += 1
            self._count_dropped("invalid", 1)

    def copy(self, array: Images) -> _Copy:
        """A copy that lasts until it is computed: in a place that is kept for it, or else in memory of its own."""
        if len(array) == 1:
            kind = _kind(array)
            buffers = self._buffers.get(kind) or self._make_buffers(kind)
            try:
                slot = buffers.free.pop()
            except IndexError:
                pass
            else:
                place = buffers.waiting[slot : slot + 1]
                place[...] = array
                return place, slot
        return array.copy(), None

    def _make_buffers(self, kind: ImageKind) -> _Buffers:
        with self._lock:
            if kind not in self._buffers:
                max_batch = self._backlog.max_batch
                self._buffers[kind] = _Buffers(self._engine, kind, self._queue + max_batch, max_batch)
            return self._buffers[kind]

    def enter(self, make: Callable[..., _Job], entry: _Entry) -> None:
        """Queue an item; what that drops is handed out by the thread."""
        count = len(entry[1][0])
        with self._lock:
            if count <= self._door_room:
                self._door_room -= count
                self._in += count
                self._door.append((make, entry))
                if not self._away and not (self._watching and entry[3] / 2 >= self._patience):
                    self._work.notify()
            else:
                self._queue_now(make(*entry))

    def _queue_now(self, item: _Job) -> None:
        """Queue an item after those at the door, waiting for room if that is the rule; with the lock held."""
        self._admit()
        try:
            if self._waits and (self._blocked or not self._backlog.has_room(item.count)):
                self._wait_for_room(item.count)
            self._check_running()
        except BaseException:
            self._free(item)
            raise
        self._in += item.count
        due = self._backlog.due
        now = time.monotonic()
        if dropped := self._backlog.add(item, item.name):
            self._settled += self._drop(dropped, now)
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self,), name="defense_vae_fast-stream", daemon=True)
            self._thread.start()
        elif self._settled or self._backlog.due < due or self._backlog.ready(now, self.idle):
            self._work.notify()
        self._open_door()

    def wake(self) -> None:
        """Have a frame that may have been left for its putter computed by the thread."""
        if self._watching:
            with self._lock:
                self._work.notify()

    def _wait_for_room(self, count: int) -> None:
        """First come, first served: otherwise whoever puts in a tight loop would take every place."""
        if self._is_current():  # the thread alone makes room: a callback, which runs on it, would wait for itself
            return
        turn = object()
        self._blocked.append(turn)
        try:
            while not self._closing and self._stopped is None:
                if self._blocked[0] is turn and self._backlog.has_room(count):
                    return
                self._room.wait()
        finally:
            self._blocked.remove(turn)
            self._room.notify_all()

    # The thread

    def step(self) -> bool:
        """Wait for something to do and do it; False at the end."""
        batch: list[_Job] = []
        with self._lock:
            self._away = False
            self._admit()
            if not self._wait_for_work():
                self._ended = True
                self._wake_readers()
                return False
            settled, self._settled = self._settled, []
            now = time.monotonic()
            if self._may_compute() and self._backlog.ready(now, self.idle or self._closing):
                batch, expired = self._take(now)
                settled += expired
                self._away = bool(batch)
                self._open_door()
        self._hand_out(settled)
        if batch:
            self._hand_out(self._compute(batch))
        return True

    def compute_here(self, ticket: Ticket) -> Result | None:
        """Compute a ticket's frame on the calling thread, if it is the only one and no callback would run here.

        Its result, or None where it has to be waited for or is an error. With cold caches every object on its way
        counts, so it becomes an item of the backlog only if another frame comes meanwhile.
        """
        if self._callback is not None or self._results is not None:
            return None
        started = time.monotonic()
        with self._lock:
            if not self.idle or not self._door:
                return None
            read, (array, slot), since, deadline, name, owner, tag = self._door[0][1]
            waited = started - since
            if owner is not ticket or waited >= deadline or ticket._has_callbacks():
                return None
            self._lone = self._door.popleft()
            self.idle = False
            self._computing = 1
        later: list[_Job] = []
        try:
            try:
                purified, scores = self._engine.run(array)
                result = Result(read.images(purified), scores.item(0), name, tag, 1e3 * waited)
            except BaseException as error:  # it belongs to the future, whatever it is: Ctrl-C comes to this thread too
                result = Result(None, None, name, tag, 1e3 * waited, "failed", error)
            taken = time.monotonic() - started
            with self._lock:
                self._computing = 0
                if slot is not None:
                    self._buffers[_kind(array)].free.append(slot)
                self._lone_times.append((waited, taken, result.dropped))
                if len(self._lone_times) == _LONE_TIMES:
                    self._account_lone()
                if self._lone_item is not None:
                    later = self._backlog.settle([self._lone_item])[1:]
                    self._lone_item = None
                if self._engine.closed:
                    self._stop(self._closed_error())
            try:
                ticket._resolve(result)
            except BaseException:  # of a callback that was added meanwhile
                _log.exception(_CALLBACK_RAISED)
        finally:
            with self._lock:
                self._lone, self._computed_here = None, True
                self._settled += later  # later frames of the source, dropped meanwhile
                if self._settled or self._backlog.images or self._closing or self._stopped is not None:
                    self._work.notify()
                else:
                    self.idle = True
                    self._open_door()
        return result if result.error is None else None

    def _wait_for_work(self) -> bool:
        while not self._settled:
            if not self._backlog.images and self._lone is None:
                if self._closing or self._stopped is not None:
                    return False
                self.idle = True
                self._open_door()
                self._sleep()
            elif not self._may_compute():
                self._sleep()
            else:
                now = time.monotonic()
                if self._backlog.ready(now, self.idle or self._closing):
                    break
                self._work.wait(self._backlog.due - now)
        return True

    def _sleep(self) -> None:
        self._watching = self._patience > 0 and (self._lone is not None or self._computed_here)
        self._computed_here = False
        self._work.wait(self._patience if self._watching else None)
        self._watching = False
        self._admit()

    def _may_compute(self) -> bool:
        """Unless another thread does, or a reader is so far behind that more results would only pile up."""
        held_up = self._results is not None and len(self._results) >= self._queue and not self._closing
        return self._lone is None and not held_up

    def _compute(self, batch: list[_Job]) -> list[_Job]:
        """Compute a batch; those that may be handed out now."""
        started = time.monotonic()
        for item in batch:
            item.waited = started - item.since
        try:
            parts: list[_Part] = [*self._run(batch)]
        except BaseException as error:  # it belongs to the futures, whatever it is
            parts = self._run_apart(batch, error)
        taken = time.monotonic() - started
        for item, part in zip(batch, parts, strict=True):
            item.take(part)
        return self._account(batch, taken)

    def _account(self, batch: list[_Job], taken: float) -> list[_Job]:
        """Note what became of a batch, computed in ``taken`` seconds; those that may be handed out now."""
        with self._lock:
            size = min(self._computing, self._backlog.max_batch)
            self._sizes[size] = self._sizes.get(size, 0) + 1
            self._computing = 0
            out = 0
            for item in batch:
                self._free(item)
                if item.dropped is None:
                    out += item.count
                    self._waiting_times.add(item.waited, item.count)
                else:
                    self._count_dropped(item.dropped, item.count)
            self._out += out
            self._computing_times.add(taken, out)
            if self._adapts and len(batch) == out == 1:
                self._backlog.computed_alone(taken)
            settled = self._backlog.settle(batch)
            if self._engine.closed:
                self._stop(self._closed_error())
        return settled

    def _account_lone(self) -> None:
        """The same for frames that :meth:`compute_here` has computed, many at once; with the lock held."""
        for waited, taken, dropped in self._lone_times:
            if dropped is None:
                self._out += 1
                self._waiting_times.add(waited)
                self._computing_times.add(taken)
            else:
                self._count_dropped(dropped, 1)
            self._sizes[1] = self._sizes.get(1, 0) + 1
        self._lone_times.clear()

    def _run(self, batch: list[_Job]) -> list[tuple[Images, Scores]]:
        """Images, which own their memory, and scores of each item."""
        first = batch[0]
        if len(batch) == 1:
            self._call_in()
            return [self._engine.run(first.array)]
        buffers = self._buffers.get(first.kind) or self._make_buffers(first.kind)
        places, stop = [], 0
        for item in batch:
            places.append(slice(stop, stop + item.count))
            stop += item.count
        images = buffers.images[:stop]
        slots = [item.slot for item in batch if item.slot is not None]
        if len(slots) < len(batch):
            np.concatenate([item.array for item in batch], out=images)
        else:
            # Not ``concatenate``: it lets go of the GIL for every array, and whoever puts takes it each time.
            buffers.waiting.take(slots, axis=0, out=images, mode="clip")
        self._call_in()
        purified, scores = self._engine.run(images, out=buffers.purified[:stop])
        return [(purified[place].copy(), scores[place]) for place in places]

    def _call_in(self) -> None:
        """Wake those who wait for room; sooner, they would take the GIL from whoever puts a batch together."""
        if self._blocked:
            with self._lock:
                self._room.notify_all()

    def _run_apart(self, batch: list[_Job], error: BaseException) -> list[_Part]:
        """After an error: each item by itself, so that only the one that causes it fails."""
        if len(batch) == 1 or self._engine.closed:
            return [error for _ in batch]
        parts: list[_Part] = []
        for item in batch:
            try:
                parts += self._run([item])
            except BaseException as own:  # noqa: PERF203 - each has its own
                parts.append(own)
        return parts

    def _hand_out(self, items: list[_Job]) -> None:
        results = [result for item in items if (result := self._hand_out_one(item)) is not None]
        if self._results is not None and results:
            with self._lock:
                for result in results:
                    if result.dropped is None or len(self._results) < self._queue:
                        self._results.append(result)
                self._wake_readers()

    def _hand_out_one(self, item: _Job) -> Result | None:
        result = None
        try:
            result = item.resolve()
            if result is not None and self._callback is not None:
                self._callback(result)
        except BaseException:  # not even sys.exit in a callback may take the other frames along
            _log.exception(_CALLBACK_RAISED)
        return result

    # With the lock held

    def _admit(self) -> None:
        """Queue what was left at the door, and close it."""
        self._door_room = 0
        if self._lone is not None and self._computing and self._lone_item is None:
            make, entry = self._lone
            self._lone_item = item = make(*entry)
            self._backlog.begin(item, item.name)  # what comes after it is not to overtake it
        while self._door:
            make, entry = self._door.popleft()
            item = make(*entry)
            self._backlog.add(item, item.name)

    def _open_door(self) -> None:
        """Let frames be left at the door if the thread will come back to them.

        As many as there is room for while it computes, and one while nobody has anything to do.
        """
        if self._blocked or self._closing or self._stopped is not None:
            return
        if self._away:
            self._door_room = self._backlog.room
        elif self.idle and self._thread is not None and not self._backlog.images and not self._door:
            self._door_room = 1

    def _take(self, now: float) -> tuple[list[_Job], list[_Job]]:
        """The next batch, and those whose deadline has passed and that may be handed out now."""
        batch, expired = self._backlog.take(now)
        self.idle = False
        self._computing = sum(item.count for item in batch)
        if self._blocked and not batch:
            self._room.notify_all()
        return batch, self._drop(expired, now) if expired else []

    def _drop(self, items: list[_Job], now: float) -> list[_Job]:
        """Account for dropped items; those that may be handed out now."""
        for item in items:
            item.waited = now - item.since
            self._free(item)
            assert item.dropped is not None
            self._count_dropped(item.dropped, item.count)
        return self._backlog.settle(items)

    def _count_dropped(self, cause: Cause, count: int) -> None:
        self._dropped[cause] = self._dropped.get(cause, 0) + count

    def _free(self, item: _Job) -> None:
        """Give the place of its copy back."""
        if item.slot is not None:
            self._buffers[item.kind].free.append(item.slot)
            item.slot = None

    def _closed_error(self) -> RuntimeError:
        return RuntimeError(f"the {self._engine.name} engine is closed")

    def _stop(self, reason: BaseException) -> None:
        self._admit()
        self._stopped = reason
        dropped = self._backlog.clear("stopped")
        for item in dropped:
            item.error = reason
        self._settled += self._drop(dropped, time.monotonic())
        self._room.notify_all()

    def _wake_readers(self) -> None:
        self._readable.notify_all()
        wakers, self._wakers = self._wakers, []
        for waker in wakers:
            with suppress(RuntimeError):  # its loop is closed, so nobody waits
                waker.get_loop().call_soon_threadsafe(_wake, waker)

    def _is_current(self) -> bool:
        return threading.current_thread() is self._thread

    # For readers

    def check_iterable(self) -> None:
        if self._results is None:
            raise TypeError(
                "expected a stream that keeps its results for iteration, got one that does not; "
                "make it with purifier.stream(iterate=True)"
            )

    def next_result(self) -> Result | None:
        """The next result, waited for; None at the end."""
        with self._lock:
            while (result := self._pop_result()) is None and not self._at_end():
                self._readable.wait()
            return result

    def poll_result(self, woken: asyncio.Future[None]) -> tuple[Result | None, bool]:
        """The next result or None, and whether the end has come; if neither, ``woken`` is told when to ask again."""
        with self._lock:
            result = self._pop_result()
            ended = result is None and self._at_end()
            if result is None and not ended:
                self._wakers.append(woken)
            return result, ended

    def _pop_result(self) -> Result | None:
        if not self._results:
            return None
        result = self._results.popleft()
        if len(self._results) == self._queue - 1:
            self._work.notify()
        return result

    def _at_end(self) -> bool:
        if self._ended and self._stopped is not None:
            raise RuntimeError(f"the stream has stopped: {self._stopped}") from self._stopped
        return self._ended

    # The rest

    def stats(self) -> dict[str, Any]:
        """See :meth:`Stream.stats`."""
        with self._lock:
            self._admit()
            self._open_door()
            self._account_lone()
            return {
                "frames_in": self._in,
                "frames_out": self._out,
                "dropped": dict(self._dropped),
                "in_progress": self._backlog.images + self._computing,
                "waiting_ms": _percentiles(self._waiting_times),
                "computing_ms": _percentiles(self._computing_times),
                "batch_sizes": dict(sorted(self._sizes.items())),
                "sources": self._backlog.sources,
            }

    def histograms(self, octaves: Sequence[int]) -> dict[str, tuple[list[tuple[float, int]], int, float]]:
        """See :meth:`Stream.histograms`."""
        with self._lock:
            self._account_lone()
            both = {"waiting": self._waiting_times, "computing": self._computing_times}
            return {name: (times.within(octaves), times.count, times.sum) for name, times in both.items()}

    def end(self) -> None:
        """Let the thread end after what waits, without waiting for it."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._closing = True
        if self._thread is None:
            self._ended = True
        self._work.notify_all()
        self._room.notify_all()
        self._wake_readers()

    def close(self, *, cancel: bool) -> None:
        """See :meth:`Stream.close` and :meth:`Stream.cancel`."""
        if os.getpid() != self._process:  # the thread stayed behind in the parent
            return
        on_thread = self._is_current()
        if on_thread and not cancel:
            raise RuntimeError("close() was called from a future's callback, which it would wait for; call it outside")
        with self._lock:
            if cancel:
                self._admit()
                self._settled += self._drop(self._backlog.clear("cancelled"), time.monotonic())
            self._end()
        if self._thread is not None and not on_thread:
            self._thread.join()


def _work(core: _Core) -> None:
    while core.step():  # a finished batch's memory is gone with its step, before the next one is waited for
        pass


def _kind(array: Images) -> ImageKind:
    return "uint8" if array.dtype.kind == "u" else "float"


def _wake(waker: asyncio.Future[None]) -> None:
    if not waker.done():
        waker.set_result(None)


def _percentiles(times: Histogram) -> dict[str, float | None]:
    values = {name: times.percentile(percent) for name, percent in _PERCENTILES.items()}
    return {name: None if value is None else round(1e3 * value, 4) for name, value in values.items()}


def _milliseconds(name: str, value: float) -> float:
    """Seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a number of milliseconds, 0 or more, got {value!r}")
    return value / 1e3
