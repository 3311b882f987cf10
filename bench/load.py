"""Open-loop load: frames arrive when they arrive, whether or not the earlier ones are done, as cameras do it.

A latency runs from the moment at which a frame was due to arrive, not from the moment at which it was handed over, so a
contestant that holds the sender up pays for it ("coordinated omission").
"""

from __future__ import annotations

import gc
import math
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from defense_vae_fast import Purifier
from defense_vae_fast.stream import Result

Array = npt.NDArray[Any]
Arrivals = Literal["camera", "poisson"]
TICK = 0.001  # seconds that the sender sleeps at least: as network packets and camera frames, arrivals come in bunches
KEPT = 1000  # latencies kept of each run: quantiles, the largest among them
FIXED_BATCH = 64
PULSE_EVERY = 0.02  # seconds between two looks at the machine's speed
PULSES = 5  # that are looked at together
PULSE_CHANGE = 0.15  # of the machine's speed from its median: it has two here, a factor of 1.4 apart for Python
# What a run still counts with: change of the machine's speed from right before to right after, and share of the run in
# which it was another than most of the time.
STEADY = 0.1


def pulse() -> float:
    """CPU seconds of a fixed piece of work: more while the clock is low or a neighbour uses the same core.

    Time spent waiting for a core does not count, so the load under test hardly shows in it.
    """
    start = time.thread_time()
    total = 0
    for number in range(1000):
        total += number * number
    return time.thread_time() - start


def unsteady(pulses: Sequence[float]) -> float:
    """Share of the time in which the machine's speed was another than its median, single outliers left out.

    0 where there are too few pulses to say.
    """
    if len(pulses) < PULSES:
        return 0.0
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(np.asarray(pulses), PULSES), axis=1)
    ratio = smooth / np.median(smooth)
    return float(np.mean((ratio > 1 + PULSE_CHANGE) | (ratio < 1 / (1 + PULSE_CHANGE))))


class Arrival(NamedTuple):
    """A frame that is due."""

    at: float
    """Seconds from the start."""
    source: int


def arrivals(kind: Arrivals, sources: int, rate: float, seconds: float, seed: int = 0) -> list[Arrival]:
    """Arrivals of ``sources`` equal sources that give ``rate`` frames a second together, in the order of time.

    "camera": each source sends at a fixed interval, the first frame at a random moment of it. "poisson": exponential
    intervals.
    """
    rng = np.random.default_rng(seed)
    interval = sources / rate
    found: list[Arrival] = []
    for source in range(sources):
        if kind == "camera":
            times = np.arange(rng.uniform(0, interval), seconds, interval)
        else:
            times = np.cumsum(rng.exponential(interval, math.ceil(2 * seconds / interval) + 50))
            times = times[times < seconds]
        found += [Arrival(float(at), source) for at in times]
    return sorted(found)


class Contestant(ABC):
    """Takes frames and notes when each was done."""

    name: str

    def __init__(self, purifier: Purifier, count: int) -> None:
        self.purifier = purifier
        self.done = np.full(count, np.nan)
        """Seconds of ``time.perf_counter`` at which each was done; NaN where it was dropped."""
        self.images: dict[int, Array] = {}
        """Some results, to be checked afterwards."""

    @abstractmethod
    def put(self, index: int, frame: Array, source: int) -> None:
        """Take one frame and return at once."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all that was not dropped is done."""

    def note(self, index: int, image: Array) -> None:
        """A frame is done."""
        self.done[index] = time.perf_counter()
        if index % 97 == 0:
            self.images[index] = image


class Loop(Contestant):
    """What one writes first: a thread that takes frame after frame from a queue and purifies each by a call."""

    name = "one call a frame"

    def __init__(self, purifier: Purifier, count: int) -> None:
        super().__init__(purifier, count)
        self._queue: queue.SimpleQueue[tuple[int, Array] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def put(self, index: int, frame: Array, source: int) -> None:
        self._queue.put((index, frame))

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (taken := self._queue.get()) is not None:
            self.note(taken[0], self.purifier(taken[1]))


class Fixed(Loop):
    """What one writes next: the same, but a call is made when 64 frames are there."""

    name = f"fixed batches of {FIXED_BATCH}"

    def _work(self) -> None:
        while True:
            batch: list[tuple[int, Array]] = []
            while len(batch) < FIXED_BATCH and (taken := self._queue.get()) is not None:
                batch.append(taken)
            if batch:
                images = self.purifier(np.stack([frame for _, frame in batch]))
                for (index, _), image in zip(batch, images, strict=True):
                    self.note(index, image)
            if len(batch) < FIXED_BATCH:
                return


class Streamed(Contestant):
    """``Purifier.stream`` with ``when_full="latest"`` and else its defaults."""

    name = "stream"

    def __init__(self, purifier: Purifier, count: int) -> None:
        super().__init__(purifier, count)
        self.stream = purifier.stream(when_full="latest", callback=self._note)

    def put(self, index: int, frame: Array, source: int) -> None:
        self.stream.put(frame, source=source, tag=index)

    def finish(self) -> None:
        self.stream.close()

    def _note(self, result: Result) -> None:
        if result.dropped is None:
            self.note(result.tag, result.image)


CONTESTANTS: tuple[type[Contestant], ...] = (Loop, Fixed, Streamed)


@dataclass(frozen=True)
class Outcome:
    """One contestant under one load.

    Attributes:
        latencies: seconds from due arrival to result, sorted, of the frames that were not dropped.
        frames: that arrived.
        seconds: from the first due arrival to the last result.
        late: the longest that the sender was behind its schedule, in seconds.
        stats: of the stream, where it is one.
        pulses: of the machine meanwhile, each from :func:`pulse`.
    """

    latencies: Array
    frames: int
    seconds: float
    late: float
    stats: dict[str, Any] | None
    pulses: list[float]

    @property
    def dropped(self) -> int:
        """Frames without a result."""
        return self.frames - len(self.latencies)

    def percentile(self, percent: float) -> float:
        """Nearest rank."""
        return float(self.latencies[max(0, math.ceil(len(self.latencies) * percent / 100) - 1)])

    def kept(self) -> list[float]:
        """At most ``KEPT`` of the latencies, evenly spread over the ranks, the largest among them."""
        ranks = np.unique(np.linspace(len(self.latencies) - 1, 0, min(KEPT, len(self.latencies))).round().astype(int))
        return [float(value) for value in self.latencies[ranks]]


def run(contestant: Contestant, schedule: Sequence[Arrival], frames: Array) -> Outcome:
    """Send a schedule and wait for the results; frame i of it is ``frames[i % len(frames)]``.

    Everything that is there already is kept out of garbage collections, as a live program does after its set-up: a full
    one over the 200,000 objects of PyTorch, ONNX and pytest stops all threads for 150 ms.

    Raises:
        AssertionError: a result is not what the purifier gives for that frame alone, bit for bit on OpenVINO.
    """
    late = 0.0
    pulses: list[float] = []
    next_pulse = 0.0
    gc.collect()
    gc.freeze()
    try:
        start = time.perf_counter() + 0.01
        for index, arrival in enumerate(schedule):
            wait = start + arrival.at - time.perf_counter()
            if wait > 0:
                if arrival.at >= next_pulse:
                    pulses.append(pulse())
                    next_pulse = arrival.at + PULSE_EVERY
                time.sleep(max(wait, TICK))
            else:
                late = max(late, -wait)
            contestant.put(index, frames[index % len(frames)], arrival.source)
        contestant.finish()
    finally:
        gc.unfreeze()
    due = start + np.array([arrival.at for arrival in schedule])
    taken = contestant.done - due
    for index, image in contestant.images.items():
        alone = contestant.purifier(frames[index % len(frames)])
        assert np.abs(image.astype(np.int16) - alone).max() <= (
            0 if contestant.purifier.info()["engine"] == "openvino" else 2
        )
    stats = contestant.stream.stats() if isinstance(contestant, Streamed) else None
    if stats is not None:
        assert stats["frames_in"] == len(schedule) == stats["frames_out"] + sum(stats["dropped"].values())
        assert stats["frames_out"] == np.isfinite(taken).sum()
    return Outcome(
        np.sort(taken[np.isfinite(taken)]), len(schedule), float(np.nanmax(contestant.done) - due[0]), late, stats,
        pulses,
    )  # fmt: skip
