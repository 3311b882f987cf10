"""Live streams on a real engine; where timing itself is tested, a gate holds the engine until the test opens it."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import pickle
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from PIL import Image
from test_images import pixels

from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.stream import Result, Stream, Ticket

Array = np.ndarray[Any, Any]
WAIT = 60.0  # seconds, never reached unless something hangs


@pytest.fixture(scope="module")
def purifier(checkpoint: Checkpoint) -> Iterator[Purifier]:
    with Purifier(checkpoint, engine="openvino", max_batch=16) as purifier:
        yield purifier


@pytest.fixture(scope="module")
def frames() -> Array:
    return pixels((40, 28, 28, 1))[..., 0]


@pytest.fixture(scope="module")
def expected(purifier: Purifier, frames: Array) -> Array:
    """Each frame by a call of its own."""
    return np.stack([purifier(frame) for frame in frames])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def adds_up(stream: Stream) -> bool:
    stats = stream.stats()
    return bool(stats["frames_in"] == stats["frames_out"] + sum(stats["dropped"].values()) + stats["in_progress"])


class Gate:
    """The real engine's ``run``, which waits at the gate while it is shut, and notes what it was given."""

    def __init__(self, purifier: Purifier, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run = purifier._engine.run
        self._open = threading.Event()
        self.batches: list[Array] = []
        self.poison: Array | None = None
        monkeypatch.setattr(purifier._engine, "run", self.run)

    def run(self, batch: Array, out: Array | None = None) -> Any:
        self.batches.append(batch.copy())
        assert self._open.wait(WAIT)
        if self.poison is not None and (batch == self.poison).all((1, 2, 3)).any():
            raise ZeroDivisionError("poison")
        return self._run(batch, out=out)

    def open(self) -> None:
        self._open.set()

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


@pytest.fixture
def gate(purifier: Purifier, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(purifier, monkeypatch)
    yield gate
    gate.open()


async def awaited(ticket: Ticket) -> Result:
    return await ticket


def busy(stream: Stream, gate: Gate, frame: Array) -> Any:
    """Put a frame and wait until the engine has it, so that what follows has to wait."""
    before = len(gate.batches)
    ticket = stream.put(frame, source="first")
    wait_until(lambda: len(gate.batches) > before)
    return ticket


# Results


def test_many_sources_from_many_threads(purifier: Purifier, frames: Array, expected: Array) -> None:
    """Every result is the serial one, bit for bit, and each source's come in its order."""
    seen: dict[Any, list[Result]] = defaultdict(list)
    together = threading.Barrier(8)
    tickets: dict[int, list[Any]] = {}

    def feed(source: int) -> None:
        together.wait()
        order = np.random.default_rng(source).integers(0, len(frames), 60)
        tickets[source] = [
            stream.put(frames[index], source=source, tag=(turn, index)) for turn, index in enumerate(order)
        ]

    with purifier.stream(max_batch=16, queue=32, callback=lambda result: seen[result.source].append(result)) as stream:
        threads = [threading.Thread(target=feed, args=(source,)) for source in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    for source in range(8):
        assert [result.tag[0] for result in seen[source]] == list(range(60))
        for ticket, result in zip(tickets[source], seen[source], strict=True):
            assert ticket.result(0) is result
            np.testing.assert_array_equal(result.image, expected[result.tag[1]])
            assert result.dropped is None
            assert result.error is None
            assert result.waited_ms >= 0
    stats = stream.stats()
    json.dumps(stats, allow_nan=False)
    assert (stats["frames_in"], stats["frames_out"], stats["dropped"], stats["in_progress"]) == (480, 480, {}, 0)
    assert sum(size * count for size, count in stats["batch_sizes"].items()) == 480
    assert max(stats["batch_sizes"]) <= 16
    assert stats["sources"] == 0
    for name in ("waiting_ms", "computing_ms"):
        assert 0 < stats[name]["p50"] <= stats[name]["p99"] <= stats[name]["p99.9"]
    [buffers] = stream._core._buffers.values()
    assert sorted(buffers.free) == list(range(48))  # every place came back


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(pixels((28, 28)), id="uint8"),
        pytest.param(pixels((28, 28, 1)), id="uint8 with channel"),
        pytest.param(pixels((1, 28, 28), "f4"), id="float32"),
        pytest.param(pixels((1, 28, 28), "f8"), id="float64"),
        pytest.param(pixels((56, 28))[::2], id="strided"),
        pytest.param(torch.from_numpy(pixels((1, 28, 28), "f4")).half(), id="torch float16"),
        pytest.param(Image.fromarray(pixels((28, 28))), id="PIL"),
    ],
)
def test_kinds_of_frames(purifier: Purifier, frame: Any) -> None:
    image, score = purifier(frame, return_score=True)
    with purifier.stream() as stream:
        result = stream.put(frame).result(WAIT)
    assert type(result.image) is type(image)
    assert np.array_equal(np.asarray(result.image), np.asarray(image))
    assert result.score == score
    assert (result.source, result.tag) == (None, None)
    if isinstance(frame, np.ndarray | torch.Tensor):
        assert (result.image.dtype, result.image.shape) == (frame.dtype, frame.shape)


def test_kinds_share_a_stream_but_not_a_batch(purifier: Purifier, gate: Gate, frames: Array) -> None:
    floats = (frames[:, None] / 255).astype("f4")
    with purifier.stream(max_delay_ms=0) as stream:
        first = busy(stream, gate, frames[0])
        tickets = [stream.put(image, source=index) for index, image in enumerate([frames[1], floats[2], frames[3]])]
        gate.open()
        images = [ticket.result(WAIT).image for ticket in [first, *tickets]]
    assert gate.sizes == [1, 2, 1]
    assert [image.dtype for image in images] == ["u1", "u1", "f4", "u1"]
    np.testing.assert_array_equal(images[2], purifier(floats[2]))


def test_results_belong_to_the_receiver(purifier: Purifier, frames: Array, expected: Array) -> None:
    frame = np.empty((28, 28), np.uint8)
    with purifier.stream() as stream:
        tickets = []
        for each in frames:
            frame[...] = each  # the caller's memory is free at once
            tickets.append(stream.put(frame))
        images = [ticket.result(WAIT).image for ticket in tickets]
        for image, right in zip(images, expected, strict=True):
            np.testing.assert_array_equal(image, right)
            image[...] = 7
            assert image.base is None or image.base.nbytes == image.nbytes  # it does not keep a whole batch alive


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_submitted_batches_share_the_queue(checkpoint: Checkpoint, engine: str) -> None:
    batches = [pixels((count, 28, 28, 1), seed=count) for count in (1, 2, 7, 16, 37)] * 4
    with Purifier(checkpoint, engine=engine, precision="fp32", max_batch=16) as purify:
        futures = [purify.submit(batch, return_score=True) for batch in batches]
        for batch, future in zip(batches, futures, strict=True):
            images, scores = future.result(WAIT)
            right, right_scores = purify(batch, return_score=True)
            assert np.abs(images.astype("i2") - right).max() <= (0 if engine == "openvino" else 1)
            np.testing.assert_allclose(scores, right_scores, rtol=0, atol=0 if engine == "openvino" else 1e-5)
        assert purify._submissions.stats()["frames_out"] == sum(map(len, batches))


# When a batch starts


def test_an_idle_engine_takes_a_lone_frame_at_once(purifier: Purifier, frames: Array) -> None:
    with purifier.stream(max_delay_ms=1e9) as stream:
        for frame in frames[:5]:
            stream.put(frame).result(WAIT)


def test_a_full_batch_does_not_wait(purifier: Purifier, gate: Gate, frames: Array) -> None:
    with purifier.stream(max_batch=4, max_delay_ms=1e9) as stream:
        first = busy(stream, gate, frames[0])
        tickets = [stream.put(frame) for frame in frames[1:6]]
        gate.open()
        for ticket in [first, *tickets[:4]]:
            ticket.result(WAIT)
        assert gate.sizes == [1, 4]
        assert not tickets[4].done()  # its company may still come
        assert adds_up(stream)
    assert gate.sizes == [1, 4, 1]  # leaving finishes what waits


def test_a_batch_starts_when_the_oldest_has_waited(purifier: Purifier, gate: Gate, frames: Array) -> None:
    with purifier.stream(max_delay_ms=300) as stream:
        busy(stream, gate, frames[0])
        tickets = [stream.put(frame) for frame in frames[1:3]]
        gate.open()
        assert tickets[0].result(WAIT).waited_ms >= 300
    assert gate.sizes == [1, 2]


@pytest.mark.parametrize(("given", "adapts"), [({}, True), ({"max_delay_ms": 2}, False)], ids=["default", "given"])
def test_the_default_delay_follows_the_engine(
    given: dict[str, float], adapts: bool, purifier: Purifier, frames: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purifier._engine, "run", lambda images, out=None: (images.copy(), np.zeros(1, np.float32)))
    with purifier.stream(callback=lambda _: None, **given) as stream:
        assert stream._core._backlog.delay == 0.002
        for frame in frames:
            stream.put(frame).result()
        assert (stream._core._backlog.delay < 0.001) == adapts


def test_sources_take_turns(purifier: Purifier, gate: Gate, frames: Array) -> None:
    order: list[Any] = []
    with purifier.stream(max_batch=4, queue=32, max_delay_ms=0, callback=lambda r: order.append(r.source)) as stream:
        busy(stream, gate, frames[0])
        for frame in frames[1:21]:
            stream.put(frame, source="flood")
        stream.put(frames[21], source="slow")
        gate.open()
    assert order.index("slow") <= 1 + 4  # in the first batch after the one under way


# Dropping


@pytest.mark.parametrize(
    ("when_full", "images", "dropped"),
    [
        pytest.param("reject", [0, 1, 2, 3], {"rejected": 4}, id="reject"),
        pytest.param("drop_oldest", [0, 5, 6, 7], {"oldest": 4}, id="drop_oldest"),
        pytest.param("latest", [0, 7], {"replaced": 6}, id="latest"),
    ],
)
def test_when_full(
    purifier: Purifier,
    gate: Gate,
    frames: Array,
    expected: Array,
    when_full: Any,
    images: list[int],
    dropped: dict[str, int],
) -> None:
    """One frame is computed, three may wait, and seven come."""
    seen: list[Result] = []
    with purifier.stream(queue=3, when_full=when_full, callback=seen.append) as stream:
        busy(stream, gate, frames[0])
        tickets = [stream.put(frame, source="first", tag=turn) for turn, frame in enumerate(frames[1:8], 1)]
        assert adds_up(stream)
        gate.open()
    assert [result.tag for result in seen] == [None, *range(1, 8)]  # in order, dropped ones included
    kept = [turn for turn, result in enumerate(seen) if result.dropped is None]
    for turn in kept:
        np.testing.assert_array_equal(seen[turn].image, expected[turn])
    if when_full == "latest":  # all but the newest went at the fourth frame, and again at the seventh
        assert kept == [0, 7]
        dropped = {"replaced": 6}
    else:
        assert kept == images
    stats = stream.stats()
    assert stats["dropped"] == dropped
    assert stats["frames_in"] == stats["frames_out"] + sum(stats["dropped"].values()) == 8
    for ticket, result in zip(tickets, seen[1:], strict=True):
        assert ticket.result(0) is result
        assert (result.image is None) == (result.score is None) == (result.dropped is not None)


def test_block_waits_for_room_in_turn(purifier: Purifier, gate: Gate, frames: Array) -> None:
    order: list[Any] = []
    with purifier.stream(queue=2, max_batch=1, callback=lambda result: order.append(result.tag)) as stream:
        busy(stream, gate, frames[0])
        for turn in range(2):
            stream.put(frames[1], tag=turn)
        threads = []
        for turn in range(2, 8):
            threads.append(threading.Thread(target=stream.put, args=(frames[2],), kwargs={"tag": turn}))
            threads[-1].start()
            wait_until(lambda turn=turn: len(stream._core._blocked) == turn - 1)  # type: ignore[misc]
        assert stream.stats()["frames_in"] == 3
        gate.open()
        for thread in threads:
            thread.join(WAIT)
    assert order == [None, *range(8)]
    assert stream.stats()["frames_out"] == 9


def test_no_frame_overtakes_those_who_wait_for_room(
    purifier: Purifier, gate: Gate, frames: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is taken makes room, which is theirs, although the engine is busy and a frame could be left."""
    with purifier.stream(queue=2, max_batch=1) as stream:
        core = stream._core
        room: list[int] = []
        call_in = core._call_in

        def note() -> None:
            if core._blocked:
                room.append(core._door_room)
            call_in()

        busy(stream, gate, frames[0])
        assert core._door_room == 2
        for frame in frames[1:3]:
            stream.put(frame)
        waiting = threading.Thread(target=stream.put, args=(frames[3],))
        waiting.start()
        wait_until(lambda: len(core._blocked) == 1)
        monkeypatch.setattr(core, "_call_in", note)
        gate.open()
        waiting.join(WAIT)
    assert set(room) == {0}


def test_a_late_frame_costs_nothing(purifier: Purifier, gate: Gate, frames: Array, expected: Array) -> None:
    with purifier.stream() as stream:
        first = busy(stream, gate, frames[0])
        late = stream.put(frames[1], deadline_ms=1, tag="late")
        fine = stream.put(frames[2], deadline_ms=1e6)
        time.sleep(0.002)
        gate.open()
        assert first.result(WAIT).dropped is None
        result = late.result(WAIT)
        np.testing.assert_array_equal(fine.result(WAIT).image, expected[2])
    assert (result.dropped, result.image, result.tag, result.error) == ("deadline", None, "late", None)
    assert result.waited_ms >= 1
    assert gate.sizes == [1, 1]
    assert stream.stats()["dropped"] == {"deadline": 1}


def test_a_bad_frame_fails_alone(purifier: Purifier, gate: Gate, frames: Array, expected: Array) -> None:
    with purifier.stream() as stream:
        first = busy(stream, gate, frames[0])
        good = [stream.put(frame) for frame in frames[1:4]]
        for bad, error in ((frames[0][:27], ValueError), (np.full((1, 28, 28), np.nan), ValueError), (None, TypeError)):
            with pytest.raises(error, match="expected"):
                stream.put(bad)
        with pytest.raises(ValueError, match="expected one image, got a batch of 40; put its images one by one"):
            stream.put(frames[..., None])
        for deadline in (-1, float("nan"), "soon", True):
            with pytest.raises(ValueError, match="deadline_ms: expected a number of milliseconds"):
                stream.put(frames[0], deadline_ms=deadline)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="unhashable"):
            stream.put(frames[0], source=[])  # type: ignore[arg-type]
        assert adds_up(stream)
        gate.open()
        for ticket, right in zip([first, *good], expected, strict=False):
            np.testing.assert_array_equal(ticket.result(WAIT).image, right)
    assert stream.stats()["dropped"] == {"invalid": 9}
    assert stream.stats()["frames_in"] == 13


def test_an_image_that_breaks_the_engine_fails_alone(
    purifier: Purifier, gate: Gate, frames: Array, expected: Array
) -> None:
    gate.poison = frames[3][..., None]
    seen: list[Result] = []
    with purifier.stream(callback=seen.append) as stream:
        busy(stream, gate, frames[0])
        tickets = [stream.put(frame) for frame in frames[1:6]]
        gate.open()
        for index, ticket in enumerate(tickets, 1):
            if index == 3:
                with pytest.raises(ZeroDivisionError):
                    ticket.result(WAIT)
            else:
                np.testing.assert_array_equal(ticket.result(WAIT).image, expected[index])
    [failed] = [result for result in seen if result.dropped]
    assert failed.dropped == "failed"
    assert isinstance(failed.error, ZeroDivisionError)
    assert stream.stats()["dropped"] == {"failed": 1}
    assert adds_up(stream)


# Lone frames


@pytest.fixture
def computed_on(purifier: Purifier, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread of every call of the engine."""
    threads: list[threading.Thread] = []
    real = purifier._engine.run

    def run(*args: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return real(*args, **named)

    monkeypatch.setattr(purifier._engine, "run", run)
    return threads


def test_whoever_waits_for_a_lone_frame_computes_it(
    purifier: Purifier, computed_on: list[threading.Thread], frames: Array, expected: Array
) -> None:
    with purifier.stream() as stream:
        for index, frame in enumerate(frames):
            result = stream.put(frame, source=index % 3, tag=index).result()
            np.testing.assert_array_equal(result.image, expected[index])
            assert (result.tag, result.source, result.dropped) == (index, index % 3, None)
        stats = stream.stats()
    assert (stats["frames_out"], stats["in_progress"], stats["sources"]) == (len(frames), 0, 0)
    assert stats["batch_sizes"] == {1: len(frames)}
    # The stream's thread may have been quicker for the first one, which starts it.
    assert computed_on[1:] == [threading.current_thread()] * (len(frames) - 1)


@pytest.mark.parametrize("watch", ["stream's callback", "ticket's callback", "iteration", "timeout"])
def test_nobody_elses_code_runs_where_a_result_is_waited_for(
    purifier: Purifier, computed_on: list[threading.Thread], frames: Array, watch: str
) -> None:
    called_on: list[threading.Thread] = []

    def note(_: Any) -> None:
        called_on.append(threading.current_thread())

    options: dict[str, Any] = {"callback": note} if watch == "stream's callback" else {"iterate": watch == "iteration"}
    with purifier.stream(**options) as stream:
        for frame in frames[:20]:
            ticket = stream.put(frame)
            if watch == "ticket's callback":
                ticket.add_done_callback(note)
            ticket.result(WAIT if watch == "timeout" else None)
    assert threading.current_thread() not in {*called_on, *computed_on}
    assert len(called_on) == (20 if "callback" in watch else 0)


def test_a_frame_that_is_left_is_computed_all_the_same(
    purifier: Purifier, computed_on: list[threading.Thread], frames: Array, expected: Array
) -> None:
    """After frames that were waited for, the thread is not woken for the next; it looks for itself."""
    with purifier.stream(max_delay_ms=50) as stream:
        for _ in range(3):
            for frame in frames[:5]:
                stream.put(frame).result()
            ticket = stream.put(frames[7])
            wait_until(ticket.done)
            np.testing.assert_array_equal(ticket.result().image, expected[7])
            assert computed_on[-1] is not threading.current_thread()
            pair = [stream.put(frame) for frame in frames[:2]]
            assert [one.result().dropped for one in pair] == [None, None]
            stream.put(frames[0]).result()
            # Half of its deadline is less than the thread sleeps.
            assert stream.put(frames[0], deadline_ms=40).result(WAIT).dropped in (None, "deadline")
    assert adds_up(stream)


def test_a_lone_frame_is_handed_out_once(
    purifier: Purifier, frames: Array, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However often the thread looks in meanwhile."""
    monkeypatch.setattr(purifier._engine, "run", lambda images, out=None: (images.copy(), np.zeros(1, np.float32)))
    with purifier.stream(max_delay_ms=0.001) as stream:
        for turn in range(3000):
            assert stream.put(frames[0], source="cam", tag=turn).result().tag == turn
    stats = stream.stats()
    assert stats["frames_out"] == stats["batch_sizes"][1] == 3000
    assert stats["computing_ms"]["p50"] is not None
    assert not caplog.records


@pytest.mark.parametrize("ask", ["callback", "timeout", "exception", "await"])
def test_a_frame_that_is_asked_for_is_not_left(purifier: Purifier, frames: Array, expected: Array, ask: str) -> None:
    """The thread, which sleeps for minutes here, is woken whichever way the result is asked for."""
    with purifier.stream(max_delay_ms=60_000) as stream:
        for frame in frames[:3]:
            stream.put(frame).result()
        wait_until(lambda: stream._core._watching)
        ticket = stream.put(frames[7])
        if ask == "callback":
            called = threading.Event()
            ticket.add_done_callback(lambda _: called.set())
            assert called.wait(WAIT)
        elif ask == "timeout":
            ticket.result(WAIT)
        elif ask == "exception":
            assert ticket.exception(WAIT) is None
        else:
            asyncio.run(asyncio.wait_for(awaited(ticket), WAIT))
        np.testing.assert_array_equal(ticket.result(0).image, expected[7])


def called_back(ticket: Ticket) -> Result:
    seen: list[Result] = []
    ticket.add_done_callback(lambda done: seen.append(done.result(0)))
    return seen.pop()


LOOKS: dict[str, Callable[[Ticket], Any]] = {
    "result": lambda ticket: ticket.result(0),
    "done": lambda ticket: ticket.done() and not ticket.running() and not ticket.cancelled() and ticket._outcome,
    "exception": lambda ticket: ticket.exception(0) is None and ticket._outcome,
    "wait": lambda ticket: futures.wait([ticket], 0).done.pop().result(0),
    "callback": called_back,
    "await": lambda ticket: asyncio.run(asyncio.wait_for(awaited(ticket), WAIT)),
    "repr": lambda ticket: "finished" in repr(ticket) and ticket._outcome,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_a_lone_frames_ticket_is_a_future_as_soon_as_somebody_looks(
    purifier: Purifier, frames: Array, expected: Array, look: Callable[[Ticket], Any]
) -> None:
    with purifier.stream() as stream:
        wait_until(lambda: stream.put(frames[0]).result() is not None and stream._core.idle)
        ticket = stream.put(frames[1])
        result = ticket.result()
        assert not ticket._made
        assert look(ticket) is result
        assert ticket._made
        assert not hasattr(ticket, "no such thing")
    np.testing.assert_array_equal(result.image, expected[1])


def test_many_look_at_a_ticket_while_its_future_is_made(
    purifier: Purifier, frames: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits is woken, whether the future or the result was first."""
    monkeypatch.setattr(purifier._engine, "run", lambda images, out=None: (images.copy(), np.zeros(1, np.float32)))
    turns, lookers = 300, 6
    tickets: list[Ticket] = []
    together = threading.Barrier(lookers)
    seen: list[list[Result]] = [[] for _ in range(lookers)]

    def look(place: int) -> None:
        for turn in range(turns):
            if together.wait(WAIT) == 0:
                tickets.append(stream.put(frames[0], tag=turn))
            together.wait(WAIT)
            ticket = tickets[turn]
            seen[place].append(ticket.result(None if place % 2 else WAIT))
            assert ticket.done()

    with purifier.stream() as stream:
        threads = [threading.Thread(target=look, args=(place,)) for place in range(lookers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        stats = stream.stats()
    assert [[result.tag for result in each] for each in seen] == [list(range(turns))] * lookers
    assert stats["frames_out"] == turns
    assert adds_up(stream)


def test_frames_that_come_while_a_lone_one_is_computed(purifier: Purifier, gate: Gate, frames: Array) -> None:
    """They wait for the engine, keep the order of their source, and are dropped as ever."""
    with purifier.stream(max_delay_ms=0, queue=2, when_full="drop_oldest") as stream:
        lone = stream.put(frames[0], source="a")
        waiter = threading.Thread(target=lone.result)
        waiter.start()
        wait_until(lambda: gate.sizes == [1])
        done: list[int] = []
        later = [stream.put(frame, source="a") for frame in frames[1:5]]
        for number, ticket in enumerate(later):
            ticket.add_done_callback(lambda _, number=number: done.append(number))
        assert not done
        gate.open()
        waiter.join(WAIT)
        assert [ticket.result(WAIT).dropped for ticket in later] == ["oldest", "oldest", None, None]
    assert done == [0, 1, 2, 3]
    assert lone.result(0).dropped is None
    assert gate.sizes == [1, 2]


def test_ctrl_c_while_a_lone_frame_is_computed(
    purifier: Purifier, frames: Array, expected: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the wait, and neither the stream nor the frame's source hangs."""

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with purifier.stream() as stream:
        stream.put(frames[0]).result()
        with monkeypatch.context() as patch:
            patch.setattr(purifier._engine, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.put(frames[1]).result()
        np.testing.assert_array_equal(stream.put(frames[2]).result().image, expected[2])
        stats = stream.stats()
    assert stats["dropped"] == {"failed": 1}
    assert stats["frames_out"] == 2


def test_a_result_does_not_keep_the_stream(purifier: Purifier, frames: Array) -> None:
    with purifier.stream() as stream:
        tickets = [stream.put(frames[0]), stream.put(frames[1])]
        assert not tickets[1].cancel()
        core = weakref.ref(stream._core)
    del stream
    gc.collect()
    assert core() is None
    assert tickets[0].result().dropped is None


# The end


def test_cancel_does_not_drain(purifier: Purifier, gate: Gate, frames: Array) -> None:
    stream = purifier.stream()
    first = busy(stream, gate, frames[0])
    tickets = [stream.put(frame) for frame in frames[1:6]]
    threading.Timer(0.05, gate.open).start()
    stream.cancel()
    assert first.result(0).dropped is None  # it was under way
    assert [ticket.result(0).dropped for ticket in tickets] == ["cancelled"] * 5
    assert gate.sizes == [1]
    assert stream.stats()["dropped"] == {"cancelled": 5}
    for call in (lambda: stream.put(frames[0]), stream.cancel, stream.close):
        if call in (stream.cancel, stream.close):
            call()
        else:
            with pytest.raises(RuntimeError, match="expected an open stream, got a closed one"):
                call()


def test_a_stopped_engine_wakes_everyone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, frames: Array
) -> None:
    purify = Purifier(checkpoint, engine="openvino")
    gate = Gate(purify, monkeypatch)
    stream = purify.stream(queue=2, iterate=True)
    first = busy(stream, gate, frames[0])
    queued = [stream.put(frame) for frame in frames[1:3]]
    errors: list[BaseException] = []

    def note(work: Callable[[], Any]) -> None:
        try:
            work()
        except RuntimeError as error:
            errors.append(error)

    async def read() -> None:
        async for _ in stream:
            pass

    async def wait() -> None:
        await queued[0]

    works: list[Callable[[], Any]] = [
        lambda: stream.put(frames[3]),
        lambda: list(stream),
        lambda: asyncio.run(read()),
        lambda: asyncio.run(wait()),
        lambda: queued[1].result(WAIT),
    ]
    threads = [threading.Thread(target=note, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(stream._core._blocked) == 1 and len(stream._core._wakers) == 1)
    purify._engine.close()
    gate.open()
    for thread in threads:
        thread.join(WAIT)
    assert len(errors) == len(works)
    assert all("the openvino engine is closed" in str(error) for error in errors)
    with pytest.raises(RuntimeError, match="the stream has stopped: the openvino engine is closed"):
        stream.put(frames[0])
    with pytest.raises(RuntimeError, match="closed"):
        first.result(WAIT)
    assert stream.stats()["dropped"] == {"failed": 1, "stopped": 2}
    assert adds_up(stream)
    stream.close()
    purify.close()


def test_a_stopped_engine_drops_what_came_meanwhile(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, frames: Array
) -> None:
    with Purifier(checkpoint, engine="openvino") as purify:
        gate = Gate(purify, monkeypatch)
        stream = purify.stream()
        busy(stream, gate, frames[0])
        tickets = [stream.put(frame) for frame in frames[1:4]]
        purify._engine.close()
        gate.open()
        for ticket in tickets:
            with pytest.raises(RuntimeError, match="the openvino engine is closed"):
                ticket.result(WAIT)
        assert stream.stats()["dropped"] == {"failed": 1, "stopped": 3}
        assert adds_up(stream)
        stream.close()


def test_closing_the_purifier_finishes_its_streams(checkpoint: Checkpoint, frames: Array) -> None:
    purify = Purifier(checkpoint, engine="openvino")
    stream = purify.stream(max_delay_ms=1e9)
    tickets = [stream.put(frame) for frame in frames[:10]]
    purify.close()
    assert all(ticket.result(0).dropped is None for ticket in tickets)
    with pytest.raises(RuntimeError, match="expected an open Purifier"):
        purify.stream()


def test_those_who_wait_for_room_are_told_of_the_end(purifier: Purifier, gate: Gate, frames: Array) -> None:
    stream = purifier.stream(queue=1)
    busy(stream, gate, frames[0])
    stream.put(frames[1])
    errors: list[str] = []

    def put() -> None:
        try:
            stream.put(frames[2])
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=put)
    thread.start()
    wait_until(lambda: len(stream._core._blocked) == 1)
    closing = threading.Thread(target=stream.close)
    closing.start()
    thread.join(WAIT)
    assert errors == ["expected an open stream, got a closed one; make another with Purifier.stream"]
    gate.open()
    closing.join(WAIT)
    assert stream.stats()["frames_in"] == 2


def test_a_forgotten_stream_ends_its_thread(checkpoint: Checkpoint, frames: Array) -> None:
    purify = Purifier(checkpoint, engine="openvino")
    tickets = [purify.submit(frames[0]), purify.stream().put(frames[1])]
    threads = [stream._core._thread for stream in purify._streams]
    engine = weakref.ref(purify._engine)
    del purify
    for ticket in tickets:
        ticket.result(WAIT)  # what was put is finished first
    gc.collect()
    for thread in threads:
        if thread is not None:
            thread.join(WAIT)
            assert not thread.is_alive()
    wait_until(lambda: gc.collect() >= 0 and engine() is None)


def test_a_stream_may_be_collected_at_any_moment(purifier: Purifier, gate: Gate, frames: Array) -> None:
    """The garbage collector may run in the stream's own thread, in the middle of what it does."""
    stream = purifier.stream()
    busy(stream, gate, frames[0])
    core = stream._core

    def collected() -> None:
        with core._lock:
            core.end()

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive()
    gate.open()
    assert core._thread is not None
    core._thread.join(WAIT)
    assert stream.stats()["frames_out"] == 1


# Callbacks


def test_a_callback_may_use_the_stream(purifier: Purifier, gate: Gate, frames: Array, expected: Array) -> None:
    """It may put into a full queue, call the purifier and cancel, but not close: it would wait for itself."""
    chained: list[Any] = []
    errors: list[str] = []
    done = threading.Event()

    def again(result: Result) -> None:
        if result.tag != "chain":
            return
        chained.append(purifier(frames[1]))
        for frame in frames[:9]:
            chained.append(stream.put(frame))  # noqa: PERF401 - a list that is read while it grows
        try:
            stream.close()
        except RuntimeError as error:
            errors.append(str(error))
        try:
            purifier.close()
        except RuntimeError as error:
            errors.append(str(error))
        done.set()

    with purifier.stream(queue=3, callback=again) as stream:
        busy(stream, gate, frames[0])
        stream.put(frames[0], tag="chain")
        gate.open()
        assert done.wait(WAIT)
        np.testing.assert_array_equal(chained[0], expected[1])
        for ticket, right in zip(chained[1:], expected, strict=False):
            np.testing.assert_array_equal(ticket.result(WAIT).image, right)
    assert errors == ["close() was called from a future's callback, which it would wait for; call it outside"] * 2
    assert purifier(frames[0]).shape == (28, 28)


def test_cancelling_from_a_callback(purifier: Purifier, gate: Gate, frames: Array) -> None:
    seen: list[Any] = []

    def stop(result: Result) -> None:
        seen.append(result.dropped)
        stream.cancel()

    with purifier.stream(max_batch=1, callback=stop) as stream:
        busy(stream, gate, frames[0])
        for frame in frames[1:4]:
            stream.put(frame)
        gate.open()
    assert seen == [None, "cancelled", "cancelled", "cancelled"]


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_a_callback_that_raises_is_logged(
    purifier: Purifier, frames: Array, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Result) -> None:
        raise error("in the callback")

    with caplog.at_level(logging.ERROR), purifier.stream(callback=fail) as stream:
        for frame in frames[:5]:
            assert stream.put(frame).result(WAIT).image is not None
    assert caplog.text.count("a callback of the stream raised") == 5
    assert stream.stats()["frames_out"] == 5


# Iteration and await


def test_iteration(purifier: Purifier, frames: Array, expected: Array) -> None:
    stream = purifier.stream(iterate=True, queue=8)

    def feed() -> None:
        for turn in range(200):
            stream.put(frames[turn % 40], tag=turn)
        stream.close()

    thread = threading.Thread(target=feed)
    thread.start()
    seen = list(stream)
    thread.join(WAIT)
    assert [result.tag for result in seen] == list(range(200))
    for result in seen:
        np.testing.assert_array_equal(result.image, expected[result.tag % 40])


def test_async_iteration_and_await(purifier: Purifier, frames: Array, expected: Array) -> None:
    async def main() -> None:
        stream = purifier.stream(iterate=True)

        async def feed() -> None:
            for index, frame in enumerate(frames):
                result = await stream.put(frame, tag=index)
                np.testing.assert_array_equal(result.image, expected[index])
            await asyncio.to_thread(stream.close)

        feeding = asyncio.create_task(feed())
        assert [result.tag async for result in stream] == list(range(40))
        await feeding
        with purifier.stream() as other:
            results = await asyncio.gather(*(other.put(frame) for frame in frames))
        np.testing.assert_array_equal([result.image for result in results], expected)

    asyncio.run(asyncio.wait_for(main(), WAIT))


def test_an_abandoned_await_harms_nobody(purifier: Purifier, gate: Gate, frames: Array) -> None:
    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ticket, 0.01)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.01)

    with purifier.stream(iterate=True) as stream:
        ticket = stream.put(frames[0])
        asyncio.run(main())
        gate.open()
        assert ticket.result(WAIT).image is not None
        stream.put(frames[1]).result(WAIT)
    assert len(list(stream)) == 2


def test_a_reader_that_is_behind_holds_the_stream_up(purifier: Purifier, gate: Gate, frames: Array) -> None:
    """Nothing piles up: results wait in bounded number, then frames, and then frames are dropped."""
    gate.open()
    stream = purifier.stream(iterate=True, queue=4, max_batch=2, max_delay_ms=0, when_full="drop_oldest")
    for turn in range(50):
        stream.put(frames[turn % 40], tag=turn)
        time.sleep(0.001)
    wait_until(lambda: not stream._core._may_compute())
    computed = len(gate.batches)
    for turn in range(50, 100):
        stream.put(frames[turn % 40], tag=turn)
    assert len(gate.batches) == computed
    assert len(stream._core._results or []) <= 4 + 2
    assert adds_up(stream)
    stream.close()  # the reader may come later
    tags = [result.tag for result in stream]
    assert tags == sorted(tags)
    assert tags[-1] == 99
    stats = stream.stats()
    assert stats["frames_in"] == 100 == stats["frames_out"] + stats["dropped"]["oldest"]


def test_iteration_has_to_be_asked_for(purifier: Purifier) -> None:
    with purifier.stream() as stream:
        with pytest.raises(TypeError, match=r"make it with purifier.stream\(iterate=True\)"):
            iter(stream)
        with pytest.raises(TypeError, match="iterate=True"):
            stream.__aiter__()


# Options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"max_batch": 0}, ValueError, "max_batch: expected an int from 1", id="max_batch"),
        pytest.param({"queue": 2.5}, ValueError, "queue: expected an int from 1", id="queue"),
        pytest.param({"max_delay_ms": -1}, ValueError, "max_delay_ms: expected a number of milli", id="delay"),
        pytest.param({"max_delay_ms": float("inf")}, ValueError, "max_delay_ms: expected", id="infinite delay"),
        pytest.param({"when_full": "panic"}, ValueError, "when_full: expected one of 'block'", id="when_full"),
        pytest.param({"callback": 3}, TypeError, "callback: expected a function", id="callback"),
    ],
)
def test_wrong_options(purifier: Purifier, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        purifier.stream(**options)


def test_a_stream_is_not_pickled(purifier: Purifier) -> None:
    with purifier.stream() as stream:
        for call in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="expected a Stream to stay in the process that made it"):
                call(stream)


def test_colour(frames: Array) -> None:
    from test_images import COLOUR

    with Purifier(random_checkpoint(COLOUR, 4), engine="openvino") as purify:
        size, channels = COLOUR.image_size, COLOUR.channels
        images = pixels((7, size, size, channels))
        with purify.stream() as stream:
            results = [ticket.result(WAIT) for ticket in [stream.put(image) for image in images]]
        for image, result in zip(images, results, strict=True):
            np.testing.assert_array_equal(result.image, purify(image))
