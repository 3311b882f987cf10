"""The runner of pieces, with slots that finish when the test says: orders that real engines meet by chance."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from defense_vae_fast.engines.pieces import Lane, Runner


class Slot:
    """Adds one to its images; knows when it is misused."""

    def __init__(self, gate=None):
        self.gate = gate
        self.held = None
        self.abandoned = 0

    def start(self, batch):
        assert self.held is None, "two pieces in one slot"
        if (batch == 255).any():
            raise ZeroDivisionError
        self.held = batch.copy()

    def finish(self, purified, scores):
        if self.gate is not None:
            assert self.gate.wait(30)
        held, self.held = self.held, None
        if (held == 254).any():
            raise OverflowError
        purified[...] = held + 1
        scores[...] = held.reshape(len(held), -1).mean(1)

    def abandon(self):
        self.held = None
        self.abandoned += 1


def images(count, value=7):
    return np.full((count, 2, 2, 1), value, np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]


def pieces(lane, count, size=2):
    return [(lane, start, min(start + size, count)) for start in range(0, count, size)]


def run(runner, lane, batch):
    purified, scores = np.zeros_like(batch), np.zeros(len(batch), np.float32)
    runner.run(pieces(lane, len(batch)), batch, purified, scores)
    return purified, scores


@pytest.fixture
def runner():
    made = Runner("test")
    yield made
    made.stop()
    made.join()


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_run_and_submit_give_every_image_its_result(runner, slots, count):
    lane = Lane(Slot() for _ in range(slots))
    batch = images(count)
    for purified, scores in (run(runner, lane, batch), runner.submit(pieces(lane, count), batch).result(30)):
        assert np.array_equal(purified, batch + 1)
        assert np.array_equal(scores, batch[:, 0, 0, 0])
    assert lane.free.qsize() == slots


@pytest.mark.parametrize(("value", "error"), [(250, ZeroDivisionError), (249, OverflowError)], ids=["start", "finish"])
def test_an_error_reaches_the_caller_and_every_slot_comes_home(runner, value, error):
    lane = Lane(Slot() for _ in range(3))
    batch = images(6, value)  # one image of the last piece
    with pytest.raises(error):
        run(runner, lane, batch)
    with pytest.raises(error):
        runner.submit(pieces(lane, 6), batch).result(30)
    run(runner, lane, images(6))
    assert lane.free.qsize() == 3
    assert all(lane.free.get().held is None for _ in range(3))


def test_threads_that_each_want_more_slots_than_there_are(runner):
    lane = Lane(Slot() for _ in range(2))
    ready = threading.Barrier(6)

    def work(index):
        ready.wait()
        batch = images(9, 10 * index)
        for _ in range(30):
            assert np.array_equal(run(runner, lane, batch)[0], batch + 1)
            assert np.array_equal(runner.submit(pieces(lane, 9), batch).result(30)[0], batch + 1)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert lane.free.qsize() == 2


@pytest.mark.parametrize("again", ["run", "submit"])
def test_a_callback_may_call_again_while_every_slot_is_flying(runner, again):
    """The thread that would bring them home is the one that waits: it brings the next one home itself."""
    gate = threading.Event()
    lane = Lane(Slot(gate) for _ in range(3))
    batch = images(2)
    done = threading.Event()
    results = []

    def callback(_):
        if again == "run":
            results.append(run(runner, lane, images(8))[0])
        else:
            results.extend(runner.submit(pieces(lane, 2), batch) for _ in range(40))
        done.set()

    futures = [runner.submit(pieces(lane, 2), batch) for _ in range(3)]
    futures[0].add_done_callback(callback)
    gate.set()
    assert done.wait(30)
    if again == "run":
        assert np.array_equal(results[0], images(8) + 1)
    else:
        assert all(np.array_equal(future.result(30)[0], batch + 1) for future in results)
    assert all(np.array_equal(future.result(30)[0], batch + 1) for future in futures)


def test_a_callback_waits_for_a_slot_that_another_thread_holds(runner):
    """Nothing is flying that the runner's thread could bring home; it waits, and is not left waiting."""
    lane, elsewhere, gate = Lane([Slot()]), threading.Event(), threading.Event()
    batch = images(1)
    slot = runner.acquire(lane)
    results = []

    def callback(_):
        elsewhere.set()
        results.append(run(runner, lane, batch)[0])

    future = runner.submit(pieces(Lane([Slot(gate)]), 1), batch)
    future.add_done_callback(callback)
    gate.set()
    assert elsewhere.wait(30)
    assert not results
    lane.free.put(slot)
    runner.stop()
    runner.join()
    assert np.array_equal(results[0], batch + 1)


def test_closing_from_a_callback_is_refused_and_from_elsewhere_not(runner):
    gate = threading.Event()
    lane = Lane([Slot(gate)])
    told, done = [], threading.Event()

    def callback(_):
        try:
            runner.refuse_close_from_callback()
        except RuntimeError as error:
            told.append(str(error))
        done.set()

    runner.submit(pieces(lane, 1), images(1)).add_done_callback(callback)
    gate.set()
    assert done.wait(30)
    assert "called from a future's callback" in told[0]
    runner.refuse_close_from_callback()
