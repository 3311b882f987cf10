"""Timelines of copies and computing: the arithmetic on made-up intervals, the picture, and the hooks of the workers."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import gpu_timeline, timeline
from bench.timeline import Overlap, Span, intersect, length, merge, overlap
from defense_vae_fast.engines.pieces import Lane, nothing, run_pieces


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        ([(1.0, 1.0)], []),
        ([(0.0, 1.0), (2.0, 3.0)], [(0, 1), (2, 3)]),
        ([(2.0, 3.0), (0.0, 1.0)], [(0, 1), (2, 3)]),
        ([(0.0, 1.0), (1.0, 2.0)], [(0, 2)]),
        ([(0.0, 5.0), (1.0, 2.0), (4.0, 6.0)], [(0, 6)]),
        ([(0.0, 1.0), (0.0, 1.0)], [(0, 1)]),
        ([(1.0, 1.0), (0.0, 2.0), (3.0, 3.0)], [(0, 2)]),
        ([(-2.0, -1.0), (-1.5, 0.5)], [(-2, 0.5)]),
    ],
    ids=["none", "empty", "apart", "unsorted", "touching", "nested", "twice", "empty inside", "before the origin"],
)
def test_merge(given: list[timeline.Interval], expected: list[timeline.Interval]) -> None:
    assert merge(given) == expected
    assert length(given) == sum(end - start for start, end in expected)


@pytest.mark.parametrize("wrong", [(2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))], ids=str)
def test_an_interval_that_is_none_is_refused(wrong: timeline.Interval) -> None:
    with pytest.raises(ValueError, match="expected finite numbers with start <= end"):
        merge([(0.0, 1.0), wrong])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([], [(0.0, 1.0)], []),
        ([(0.0, 1.0)], [(1.0, 2.0)], []),
        ([(0.0, 4.0)], [(1.0, 2.0), (3.0, 5.0)], [(1, 2), (3, 4)]),
        ([(0.0, 2.0), (3.0, 6.0)], [(1.0, 4.0), (5.0, 5.5)], [(1, 2), (3, 4), (5, 5.5)]),
        ([(0.0, 1.0)], [(0.0, 1.0)], [(0, 1)]),
    ],
    ids=["nothing", "touching", "one across two", "staggered", "same"],
)
def test_intersect(
    first: list[timeline.Interval], second: list[timeline.Interval], expected: list[timeline.Interval]
) -> None:
    assert intersect(first, second) == intersect(second, first) == expected


def test_intersect_and_merge_agree_with_counting_points() -> None:
    """On random whole numbers, against a list of unit steps."""
    random = np.random.default_rng(0)

    def made(count: int) -> tuple[list[timeline.Interval], set[int]]:
        starts = random.integers(0, 40, count)
        ends = starts + random.integers(0, 7, count)
        steps = {step for start, end in zip(starts, ends, strict=True) for step in range(start, end)}
        return [(float(start), float(end)) for start, end in zip(starts, ends, strict=True)], steps

    for count in (0, 1, 2, 9, 25):
        (ours, our_steps), (theirs, their_steps) = made(count), made(9)
        assert length(ours) == len(our_steps)
        assert length(intersect(ours, theirs)) == len(our_steps & their_steps)


def piece(worker: int, number: int, *times: float) -> list[Span]:
    return [
        Span(worker, number, stage, start, end)
        for stage, (start, end) in zip(timeline.STAGES, itertools.pairwise(times), strict=True)
    ]


IN_A_ROW = [*piece(0, 0, 1.0, 2.0, 4.0, 5.0), *piece(0, 1, 5.0, 6.0, 8.0, 9.0)]
# The second worker copies in while the first computes, and computes while the first copies out.
STAGGERED = [*piece(0, 0, 0.0, 1.0, 3.0, 4.0), *piece(1, 1, 1.0, 2.0, 5.0, 6.0)]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (IN_A_ROW, Overlap(copying=4, computing=4, both=0, elapsed=8, share=0)),
        (STAGGERED, Overlap(copying=4, computing=4, both=2, elapsed=6, share=0.5)),
        # Two copies at once count once, and so do two computations.
        (
            [*piece(0, 0, 0.0, 1.0, 3.0, 4.0), *piece(1, 1, 0.0, 1.0, 3.0, 4.0)],
            Overlap(copying=2, computing=2, both=0, elapsed=4, share=0),
        ),
        # All of the copies hidden.
        ([Span(0, 0, "compute", 0, 9), Span(1, 1, "copy in", 1, 2)], Overlap(1, 9, 1, 9, 1.0)),
        ([Span(0, 0, "compute", 0, 9)], Overlap(0, 9, 0, 9, None)),
        (piece(0, 0, 1.0, 1.0, 2.0, 2.0), Overlap(0, 1, 0, 1, None)),
    ],
    ids=["in a row", "staggered", "side by side", "hidden", "no copies", "copies of no time"],
)
def test_overlap(spans: list[Span], expected: Overlap) -> None:
    assert overlap(spans) == pytest.approx(expected)
    assert overlap(spans[::-1]) == pytest.approx(expected)


def test_a_timeline_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one, got none"):
        overlap([])


def test_the_picture_is_drawn_from_the_record(tmp_path: Any) -> None:
    rows = []
    for name, spans in (
        ("one stream", IN_A_ROW),
        ("two streams", STAGGERED),
        ("no copies", [Span(0, 0, "compute", 0, 1)]),
    ):
        details = {"overlap": overlap(spans)._asdict(), "spans": [list(span) for span in spans]}
        rows.append({"group": "timeline", "name": name, "details": details})
    made = timeline.of_rows(json.loads(json.dumps([*rows, {"group": "device", "name": "x", "details": {}}])))
    assert [line["title"] for line in made] == [
        "one stream: 0% of the shorter of copying and computing hidden",
        "two streams: 50% of the shorter of copying and computing hidden",
        "no copies: nothing to hide",
    ]
    path = tmp_path / "new" / "timeline.png"
    assert timeline.draw(path, made)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # a copy in, a computation, a copy out
        assert int((np.abs(pixels.astype(int) - colour).max(1) < 8).sum()) > 500, colour
    assert not timeline.draw(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


def test_every_driver_call_of_the_events_is_in_nvidias_bindings() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    for name in ("cuEventCreate", "cuEventRecordWithFlags", "cuEventElapsedTime", "cuEventDestroy", "CUstream"):
        assert hasattr(driver, name)
    assert int(driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL) == 1
    assert int(driver.CUevent_flags.CU_EVENT_DEFAULT) == 0


def test_tracing_takes_every_piece_and_leaves_the_workers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: slots that queue nothing, events that read a clock."""
    now = itertools.count()

    class Clock:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(now)

        def elapsed_time(self, other: Clock) -> float:
            return 1e3 * (other.at - self.at)

    class Slot:
        def start(self, batch: Any) -> None:
            self._queue(batch.dtype, len(batch))

        def _queue(self, dtype: Any, count: int, between: Any = nothing) -> None:
            assert (dtype, count) == (np.uint8, 2)
            for _ in range(4):
                between()

        def finish(self, purified: Any, scores: Any) -> None:
            purified[...] = 1

    class Engine:
        streams = 2
        _device = None

        def __init__(self) -> None:
            self.slots = [Slot(), Slot()]
            self._lane: Lane[Any] = Lane(self.slots)

        def run(self, batch: Any) -> None:
            out, scores = np.zeros_like(batch), np.zeros(len(batch))
            run_pieces([(self._lane, start, start + 2) for start in range(0, len(batch), 2)], batch, out, scores)
            assert (out == 1).all()

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Clock, synchronize=lambda device: None))
    engine: Any = Engine()
    spans = gpu_timeline.trace(engine, np.zeros((10, 1), np.uint8))
    assert [(span.piece, span.stage) for span in spans] == list(itertools.product(range(5), timeline.STAGES))
    assert [span.start for span in spans if span.stage == "copy in"] == [1, 5, 9, 13, 17]
    assert all(span.end == span.start + 1 for span in spans)
    assert {span.worker for span in spans} == {0, 1}
    assert not any(vars(slot) for slot in engine.slots)
    assert {engine._lane.try_acquire() for _ in range(2)} == set(engine.slots)
