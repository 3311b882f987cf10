"""Live streams: what one costs beside the bare engine, and latencies under open-loop load against two obvious loops."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from bench.conftest import Measure, Record
from bench.inputs import batches
from bench.load import CONTESTANTS, STEADY, Arrivals, Contestant, Outcome, Streamed, arrivals, run, unsteady
from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.stream import Stream

BATCH = 64
BLOCK = 50
DELAY = 0.002  # seconds, the most that a stream has frames wait by default
LOADS = (0.5, 0.8, 0.95, 2.0)
SCENES: list[tuple[Arrivals, int]] = [("camera", 1), ("camera", 16), ("camera", 64), ("poisson", 16)]
SECONDS = 4.0
CAMERAS, FRAMES_A_SECOND = 16, 30
TRIES = 4
ROUNDS = 9  # runs of the load that is judged; the machines are noisy, so their median counts
ROUND_TRIES = 12

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def purifier(checkpoint_name: str, pytestconfig: pytest.Config) -> Iterator[Purifier]:
    with Purifier.from_pretrained(checkpoint_name, precision=pytestconfig.getoption("--bench-precision")) as made:
        made.warmup()
        yield made


@pytest.fixture
def record(record: Record, purifier: Purifier) -> Record:
    info = purifier.info()
    return functools.partial(record, engine=info["engine"], precision=info["precision"])


@pytest.fixture(scope="module")
def frames(checkpoint: Checkpoint) -> Array:
    return np.concatenate(batches(BATCH, checkpoint.config.image_shape))


def batch_seconds(purifier: Purifier, frames: Array, quick: bool) -> float:
    """Median time of one call with a full batch: the capacity that the loads are shares of."""
    times = []
    for turn in range(10 if quick else 40):
        start = time.perf_counter()
        purifier(frames[turn % 8 * BATCH :][:BATCH])
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 5 :])


def test_lone_frame(purifier: Purifier, frames: Array, quick: bool, measure: Measure, record: Record) -> None:
    """A frame at a time, the next one when the last is done.

    Blocks of calls and of frames take turns, so that both see the same machine; not single ones, because a CPU engine's
    helper threads go on spinning for a moment after a call and would be in the way of the other's. What the stream
    costs is told by the pairs of neighbouring blocks: over all of them the machine's speed changes by more than that.
    """
    times: dict[str, list[float]] = {"called": [], "streamed": []}

    def both(stream: Any, blocks: int) -> None:
        for _ in range(blocks):
            for name, purify in (("called", purifier), ("streamed", lambda frame: stream.put(frame).result())):
                for frame in frames[: BLOCK + 5]:
                    start = time.perf_counter()
                    purify(frame)
                    times[name].append(time.perf_counter() - start)
                del times[name][-BLOCK - 5 : -BLOCK]  # the change-over

    with purifier.stream() as stream:
        both(stream, 1)
        for each in times.values():
            each.clear()
        measure("stream, lone frame", both, args=(stream, 2 if quick else 40), rounds=1)
    alone, streamed = times["called"], times["streamed"]
    record("stream", "lone frame, called", seconds=alone, test="lone")
    record(
        "stream", "lone frame, streamed", seconds=streamed, test="lone",
        extra_seconds=statistics.median(
            after - before for before, after in zip(block_medians(alone), block_medians(streamed), strict=True)
        ),
    )  # fmt: skip


def block_medians(times: list[float]) -> list[float]:
    return [statistics.median(times[first : first + BLOCK]) for first in range(0, len(times), BLOCK)]


def test_throughput(purifier: Purifier, frames: Array, quick: bool, measure: Measure, record: Record) -> None:
    """As many frames as there is room for, against calls with full batches, in turns of eight batches each."""
    called, streamed = [], []

    def both(stream: Any, rounds: int) -> None:
        for _ in range(rounds):
            start = time.perf_counter()
            for first in range(0, len(frames), BATCH):
                purifier(frames[first : first + BATCH])
            middle = time.perf_counter()
            tickets = [stream.put(frame) for frame in frames]
            for ticket in tickets:
                ticket.result()
            called.append(middle - start)
            streamed.append(time.perf_counter() - middle)

    with purifier.stream() as stream:
        both(stream, 1)
        called.clear()
        streamed.clear()
        measure("stream, throughput", both, args=(stream, 3 if quick else 25), rounds=1)
    record("stream", f"full batches of {BATCH}, called", len(frames), seconds=called, test="throughput")
    record(
        "stream", "full batches, streamed", len(frames), seconds=streamed, test="throughput",
        share_of_calls=statistics.median(called) / statistics.median(streamed),
    )  # fmt: skip


def streamed_batch_seconds(stream: Stream, frames: Array) -> float:
    """The same for frames that go through a stream one by one, as fast as it takes them."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for ticket in [stream.put(frame) for frame in frames]:
            ticket.result()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * BATCH / len(frames)


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=[each.name for each in CONTESTANTS])
@pytest.mark.parametrize(("kind", "sources"), SCENES, ids=[f"{kind}-{sources}" for kind, sources in SCENES])
@pytest.mark.parametrize("load", LOADS, ids=[f"{load:.0%}" for load in LOADS])
def test_load(
    load: float,
    kind: Arrivals,
    sources: int,
    contestant: type[Contestant],
    purifier: Purifier,
    frames: Array,
    quick: bool,
    measure: Measure,
    record: Record,
) -> None:
    seconds = 0.4 if quick else SECONDS
    _run(
        contestant, kind, sources, lambda full: load * BATCH / full, seconds, purifier, frames, quick, measure, record
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "sources"), SCENES, ids=[f"{kind}-{sources}" for kind, sources in SCENES])
def test_own_capacity(
    kind: Arrivals, sources: int, purifier: Purifier, frames: Array, quick: bool, measure: Measure, record: Record
) -> None:
    """The stream at 80 % of what it manages itself, which is less than calls with ready batches do."""

    def rate(_: float) -> float:
        with purifier.stream() as stream:
            return 0.8 * BATCH / streamed_batch_seconds(stream, frames)

    seconds = 0.4 if quick else SECONDS
    _run(Streamed, kind, sources, rate, seconds, purifier, frames, quick, measure, record, "own capacity")


def test_eighty_percent(purifier: Purifier, frames: Array, quick: bool, measure: Measure, record: Record) -> None:
    """The load that is judged: the stream at 80 % of the capacity of calls, all scenes in turns.

    A run's p99 is told as a share of its own bound, four full batches as right before it and the delay, and the median
    of the shares is to be at most 1. Whether a run is made again is decided by the machine's speed, as everywhere here,
    and not by the p99.
    """
    ran: dict[tuple[Arrivals, int], list[_Ran]] = {scene: [] for scene in SCENES}

    def turns() -> None:
        for _ in range(1 if quick else ROUNDS):
            for (kind, sources), runs in ran.items():
                runs.append(
                    _steady(Streamed, kind, sources, lambda full: 0.8 * BATCH / full, 0.4 if quick else SECONDS,
                            purifier, frames, quick, ROUND_TRIES)
                )  # fmt: skip

    measure("stream, 80 % of capacity", turns, rounds=1)
    for (kind, sources), runs in ran.items():
        p99s = [each.outcome.percentile(99) for each in runs]
        bounds = [4 * each.full + DELAY for each in runs]
        record(
            "stream", f"80 % of capacity, {kind}, {sources} sources", seconds=p99s, test="eighty percent",
            shares_of_bound=[p99 / bound for p99, bound in zip(p99s, bounds, strict=True)], bounds=bounds,
            frames=[each.outcome.frames for each in runs], dropped=[each.outcome.dropped for each in runs],
            full_batch_changes=[each.change for each in runs],
            unsteady=[unsteady(each.outcome.pulses) for each in runs], tries=[each.tries for each in runs],
        )  # fmt: skip


def test_sixteen_cameras(purifier: Purifier, frames: Array, quick: bool, measure: Measure, record: Record) -> None:
    """Sixteen sources at 30 frames a second."""
    seconds = 0.5 if quick else 20.0
    rate = float(CAMERAS * FRAMES_A_SECOND)
    _run(
        Streamed, "camera", CAMERAS, lambda full: rate, seconds, purifier, frames, quick, measure, record, "cameras"
    )  # fmt: skip


def _run(
    contestant: type[Contestant],
    kind: Arrivals,
    sources: int,
    rate_for: Callable[[float], float],
    seconds: float,
    purifier: Purifier,
    frames: Array,
    quick: bool,
    measure: Measure,
    record: Record,
    test: str = "load",
) -> None:
    """One contestant at the rate that ``rate_for`` gives for the time of a full batch, measured and recorded."""
    outcome, full, rate, change, _ = measure(
        f"stream, {kind} {sources}", _steady, rounds=1,
        args=(contestant, kind, sources, rate_for, seconds, purifier, frames, quick),
    )  # fmt: skip
    load = rate * full / BATCH
    record(
        "stream", f"{contestant.name}, {kind}, {sources} sources, {rate:,.0f}/s", seconds=outcome.kept(), test=test,
        contestant=contestant.name, arrivals=kind, sources=sources, load=load, offered_per_second=rate,
        out_per_second=len(outcome.latencies) / outcome.seconds, frames=outcome.frames, dropped=outcome.dropped,
        p99=outcome.percentile(99), p999=outcome.percentile(99.9), sender_late=outcome.late,
        full_batch_seconds=full, full_batch_change=change, bound=(4 * full + DELAY) * (2 if load > 1 else 1),
        stats=outcome.stats,
    )  # fmt: skip


class _Ran(NamedTuple):
    outcome: Outcome
    full: float
    """Seconds of a full batch right before."""
    rate: float
    change: float
    """Of the time of a full batch, from right before to right after."""
    tries: int


def _steady(
    contestant: type[Contestant],
    kind: Arrivals,
    sources: int,
    rate_for: Callable[[float], float],
    seconds: float,
    purifier: Purifier,
    frames: Array,
    quick: bool,
    tries: int = TRIES,
) -> _Ran:
    """One contestant at the rate that ``rate_for`` gives for the time of a full batch.

    That time is taken right before and after, and the machine's speed is looked at all the while. Where it has changed,
    as that of shared machines does by a factor of two, the load was not what it is called, and the run is made again,
    a few times at most.
    """
    made, most = 0, 1 if quick else tries
    while True:
        made += 1
        before = batch_seconds(purifier, frames, quick)
        rate = rate_for(before)
        schedule = arrivals(kind, sources, rate, seconds)
        outcome = run(contestant(purifier, len(schedule)), schedule, frames)
        change = batch_seconds(purifier, frames, quick) / before - 1
        if made == most or (abs(change) <= STEADY and unsteady(outcome.pulses) <= STEADY):
            return _Ran(outcome, before, rate, change, made)
