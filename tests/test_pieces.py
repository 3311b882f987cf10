"""Pieces in slots that know when they are misused: orders that real engines meet by chance."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from defense_vae_fast.engines.pieces import Lane, run_pieces


class Slot:
    """Adds one to its images; knows when it is misused."""

    def __init__(self):
        self.held = None
        self.abandoned = 0

    def start(self, batch):
        assert self.held is None, "two pieces in one slot"
        if (batch == 255).any():
            raise ZeroDivisionError
        self.held = batch.copy()

    def finish(self, purified, scores):
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


def run(lane, batch):
    purified, scores = np.zeros_like(batch), np.zeros(len(batch), np.float32)
    run_pieces(pieces(lane, len(batch)), batch, purified, scores)
    return purified, scores


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_image_has_its_result(slots, count):
    lane = Lane(Slot() for _ in range(slots))
    batch = images(count)
    purified, scores = run(lane, batch)
    assert np.array_equal(purified, batch + 1)
    assert np.array_equal(scores, batch[:, 0, 0, 0])
    assert lane.free.qsize() == slots


@pytest.mark.parametrize(("value", "error"), [(250, ZeroDivisionError), (249, OverflowError)], ids=["start", "finish"])
def test_an_error_reaches_the_caller_and_every_slot_comes_home(value, error):
    lane = Lane(Slot() for _ in range(3))
    batch = images(6, value)  # one image of the last piece
    with pytest.raises(error):
        run(lane, batch)
    run(lane, images(6))
    assert lane.free.qsize() == 3
    assert all(lane.free.get().held is None for _ in range(3))


def test_threads_that_each_want_more_slots_than_there_are():
    lane = Lane(Slot() for _ in range(2))
    ready = threading.Barrier(6)

    def work(index):
        ready.wait()
        batch = images(9, 10 * index)
        for _ in range(30):
            assert np.array_equal(run(lane, batch)[0], batch + 1)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert lane.free.qsize() == 2
