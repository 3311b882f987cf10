"""CUDA events around the copies and the computing of an engine's workers, in a run as it always is.

The torch engine queues its copies and its graph one after the other, with events between. The TensorRT engines launch
one graph for all three: it is captured once more, with nodes between that record the events.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

from bench.timeline import STAGES, Span
from defense_vae_fast import cuda
from defense_vae_fast.engines import Engine
from defense_vae_fast.engines.base import Images
from defense_vae_fast.engines.buckets import bucket_of
from defense_vae_fast.engines.tensorrt import _KIND, TensorRTEngine


def trace(engine: Engine, batch: Images) -> list[Span]:
    """Run ``batch`` once and give the spans of all its pieces; nobody else may use the engine meanwhile."""
    run = _trace_tensorrt if isinstance(engine, TensorRTEngine) else _trace_torch
    marked: list[tuple[int, list[float]]] = run(engine, batch)
    return [
        Span(worker, piece, stage, start, end)
        for piece, (worker, times) in enumerate(marked)
        for stage, (start, end) in zip(STAGES, pairwise(times), strict=True)
    ]


@contextmanager
def _idle(engine: Any) -> Iterator[list[Any]]:
    """The slots of an engine's lane, all idle, until they have been changed."""
    slots = [engine._lane.free.get() for _ in range(engine.streams)]
    yield slots
    for slot in slots:
        engine._lane.free.put(slot)


def _trace_torch(engine: Any, batch: Images) -> list[tuple[int, list[float]]]:
    import torch

    pieces: list[tuple[int, list[Any]]] = []

    def event() -> Any:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    def queue(number: int, plain: Any, dtype: Any, count: int) -> None:
        marks: list[Any] = []
        pieces.append((number, marks))
        plain(dtype, count, between=lambda: marks.append(event()))

    with _idle(engine) as slots:
        for number, slot in enumerate(slots):
            slot._queue = functools.partial(queue, number, slot._queue)
    try:
        torch.cuda.synchronize(engine._device)
        origin = event()
        engine.run(batch)
    finally:
        for slot in slots:
            del slot._queue
    torch.cuda.synchronize(engine._device)
    return [(number, [origin.elapsed_time(mark) / 1e3 for mark in marks]) for number, marks in pieces]


class Event:
    """A moment on a stream; inside the device's context."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._cuda = driver
        self._event = cuda.call(driver, driver.cuEventCreate, int(driver.CUevent_flags.CU_EVENT_DEFAULT))

    def record(self, stream: int, *, captured: bool = False) -> None:
        """At this place of a stream, or, of a stream in capture, whenever the graph comes to it."""
        flags = self._cuda.CUevent_record_flags
        chosen = flags.CU_EVENT_RECORD_EXTERNAL if captured else flags.CU_EVENT_RECORD_DEFAULT
        place = self._cuda.CUstream(stream)
        cuda.call(self._cuda, self._cuda.cuEventRecordWithFlags, self._event, place, int(chosen))

    def seconds_since(self, origin: Event) -> float:
        """Both have passed."""
        return float(cuda.call(self._cuda, self._cuda.cuEventElapsedTime, origin._event, self._event)) / 1e3

    def free(self) -> None:
        cuda.call(self._cuda, self._cuda.cuEventDestroy, self._event)


def _trace_tensorrt(engine: Any, batch: Images) -> list[tuple[int, list[float]]]:
    kind, pieces = _KIND[batch.dtype], []
    buckets = {bucket_of(stop - start, engine._buckets) for _, start, stop in engine._pieces(len(batch))}
    with engine._gpu, ExitStack() as undo:
        origin = Event()
        undo.callback(origin.free)

        def finish(number: int, worker: Any, marks: list[Event], plain: Any, purified: Any, scores: Any) -> None:
            plain(purified, scores)  # waits for the stream, so that all its events have passed
            with engine._gpu:
                pieces.append((number, [mark.seconds_since(origin) for mark in marks]))

        with _idle(engine):
            for number, worker in enumerate(engine._workers):
                marks = [Event() for _ in range(len(STAGES) + 1)]
                for mark in marks:
                    undo.callback(mark.free)
                for bucket in buckets:
                    step = worker._steps[kind, bucket]
                    turns = iter(marks)
                    graph = worker.stream.capture(
                        functools.partial(
                            worker._whole, step.context, worker._kinds[kind], bucket,
                            between=lambda: next(turns).record(worker.stream.handle, captured=True),  # noqa: B023
                        )
                    )  # fmt: skip
                    worker._steps[kind, bucket] = step._replace(whole=graph)
                    undo.callback(graph.free)
                    undo.callback(worker._steps.__setitem__, (kind, bucket), step)
                worker.finish = functools.partial(finish, number, worker, marks, worker.finish)
                undo.callback(delattr, worker, "finish")
        for _ in range(2):  # a graph's first launch takes longer
            pieces.clear()
            origin.record(engine._workers[0].stream.handle)
            engine.run(batch)
    return pieces
