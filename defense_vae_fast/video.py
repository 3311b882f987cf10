"""What the ``video`` command does: files, cameras and network streams through a purifier, by PyAV (extra ``video``).

One thread reads and decodes, the caller's purifies, encodes and writes. Between them stands the queue of
:mod:`~defense_vae_fast.backlog`: it holds the reader back, so that every frame is done, or, in real time, keeps the
newest frame alone, so that late ones are dropped as a camera would.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from defense_vae_fast.atomic import replacing
from defense_vae_fast.backlog import Cause
from defense_vae_fast.boxes_file import Boxes
from defense_vae_fast.files import Job, PlanError, check_extra_output
from defense_vae_fast.histogram import Histogram
from defense_vae_fast.regions import Method
from defense_vae_fast.video_reading import Feed, Frame, is_live, open_source
from defense_vae_fast.video_writing import CONTAINERS, Writer, writing

if TYPE_CHECKING:
    from defense_vae_fast.purifier import Purifier

Array = npt.NDArray[Any]
Dropped = Cause | str


@dataclass
class Report:
    """What came of a video, up to now or in the end.

    At the end ``frames == purified + unchanged + sum(dropped.values())``.

    Attributes:
        frames: frames that were read, damaged ones included.
        purified: frames that were purified and written.
        unchanged: frames that were written as they were, since they had no boxes.
        dropped: why frames are missing from the result, and how many. "replaced": a newer one came while it waited;
            "deadline": it waited too long; "cancelled": it waited when the run was stopped; "damaged": it could not be
            decoded.
        regions: boxes or tiles that were purified.
        total: frames that there should be, None where nobody knows.
        score: sum of the regions' scores.
        computing: seconds that purifying a frame took.
        waiting: in real time, seconds from when a frame was due to the start of its purifying.
        seconds: from the first frame to the end.
        live: whether the source came at its own pace.
        stopped: whether the run was asked to end early.
        broken: why the source ended before its time, or None.
    """

    frames: int = 0
    purified: int = 0
    unchanged: int = 0
    dropped: dict[Dropped, int] = field(default_factory=dict)
    regions: int = 0
    total: int | None = None
    score: float = 0.0
    computing: Histogram = field(default_factory=Histogram)
    waiting: Histogram = field(default_factory=Histogram)
    seconds: float = 0.0
    live: bool = False
    stopped: bool = False
    broken: str | None = None

    @property
    def mean_score(self) -> float | None:
        """Mean |x - x_hat| over all regions, in [0, 1]."""
        return self.score / self.regions if self.regions else None

    def drop(self, cause: Dropped, count: int = 1) -> None:
        """Count dropped frames."""
        self.dropped[cause] = self.dropped.get(cause, 0) + count


def run(
    purifier: Purifier,
    source: str,
    output: Path,
    *,
    boxes: Boxes | None = None,
    tiles: bool = False,
    overlap: int | None = None,
    resize: Method = "area",
    realtime: bool = False,
    deadline_ms: float = 1000.0,
    limit: int | None = None,
    encoder: str | None = None,
    encoder_options: Mapping[str, str] | None = None,
    input_format: str | None = None,
    input_options: Mapping[str, str] | None = None,
    scores: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    progress: Callable[[Report], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Report:
    """Purify a video frame by frame and write it with the times of its frames.

    A purifier of three channels reads frames as RGB. One of one channel reads them as grey (their luma in 0..255), and
    what is written is grey, too: colours that were not purified do not come through. Frames are turned upright as their
    metadata say, and written so. Video is written in 8 bits, with the codec of the source where container and encoder
    allow it; the first audio stream of a file is copied, everything else is left out, and ``note`` is told.

    ``output`` and ``scores`` appear when everything has been written, or not at all.

    Args:
        purifier: of one channel or three.
        source: a file, a camera such as "/dev/video0" (Video4Linux), or a URL that FFmpeg opens.
        output: the video to write, as :func:`check_output` takes it; its suffix says the format.
        boxes: what to purify in each frame; frames without boxes pass as they are.
        tiles: purify whole frames, in tiles. Without ``boxes`` and ``tiles`` frames must have the network's size.
        overlap: of tiles, as in :meth:`Purifier.tiles`.
        resize: of boxes, as in :meth:`Purifier.regions`.
        realtime: take frames at the pace of their times and drop those that come too late. Cameras and live streams are
            always read so, at their own pace.
        deadline_ms: how long a frame may wait in real time, in milliseconds.
        limit: most frames to read.
        encoder: FFmpeg's name of one.
        encoder_options: of that, over this module's.
        input_format: FFmpeg's name of the source's format, where it does not find out.
        input_options: of format, protocol and device, such as {"rtsp_transport": "tcp"} or {"video_size": "1280x720"}.
        scores: a file for JSON lines, in the order of the frames: ``frame``, ``time`` in seconds, and for each box
            ``box`` in whole pixels and ``score``, for tiles their mean ``score``, the highest as ``max_score`` and its
            place as ``max_tile`` [row, column], or for a dropped frame ``dropped``.
        note: called with what a user should know.
        progress: called after each frame; the report changes with the next one.
        stop: when set, reading ends; what has been purified by then is written.

    Raises:
        VideoError: the source cannot be read, has no video or no frame, or the result cannot be encoded.
        ValueError, TypeError: frames, boxes and purifier do not fit together.
        ImportError: PyAV is not installed.
    """
    channels = purifier.config.channels
    if channels not in (1, 3):
        raise ValueError(f"expected a purifier of 1 or 3 channels for video, got one of {channels}; train such a one")
    stop = stop or threading.Event()
    report = Report()
    opened = open_source(source, input_format, input_options)
    purifier.warmup()  # or the first frames of a camera would come too late
    feed = Feed(
        opened, source, channels,
        live=is_live(source, input_format), realtime=realtime, deadline_ms=deadline_ms, limit=limit, stop=stop,
    )  # fmt: skip
    with feed, ExitStack() as files:
        report.total, report.live = feed.total, feed.live
        first = feed.next()
        if first is None:
            raise feed.nothing()
        height, width = first.pixels.shape[:2]
        if boxes is not None:
            boxes.check(height, width)
        work = _work(purifier, boxes, tiles, overlap, resize, (height, width))
        for text in feed.notes():
            note(text)
        lines = files.enter_context(replacing(scores)) if scores is not None else None
        # Entered last, left first: its trailer is written before the file takes its place.
        target = files.enter_context(replacing(output))
        writer = files.enter_context(
            writing(target, output.suffix.lower(), feed, (height, width), encoder, encoder_options, note)
        )
        began = time.monotonic()
        frame: Frame | None = first
        while frame is not None:
            started = time.monotonic()
            frame.waited = started - frame.since
            frame.done = work(frame)
            frame.seconds = time.monotonic() - started
            for settled in feed.settle(frame):
                _finish(settled, writer, lines, report)
            if feed.realtime:
                report.waiting.add(frame.waited)
            writer.copy(feed.packets)
            report.frames, report.seconds = feed.read, time.monotonic() - began
            progress(report)
            frame = feed.next()
        for settled in feed.rest():
            _finish(settled, writer, lines, report)
        writer.copy(feed.packets)
        report.frames, report.seconds = feed.read + feed.damaged, time.monotonic() - began
        if feed.damaged:
            report.drop("damaged", feed.damaged)
        report.stopped = stop.is_set()
        report.broken = feed.trouble
        if boxes is not None and not report.stopped and limit is None and (extra := boxes.beyond(feed.read)):
            note(f"{boxes.path}: {extra} of its lines are for frames after the last one, {feed.read - 1}")
    return report


class Done(NamedTuple):
    """A purified frame."""

    pixels: Array
    """uint8 (H, W, C)."""
    regions: int
    score: float
    """Sum over the regions."""
    lines: list[dict[str, Any]]
    """What a file of scores says of it."""


def _work(
    purifier: Purifier, boxes: Boxes | None, tiles: bool, overlap: int | None, method: Method, size: tuple[int, int]
) -> Callable[[Frame], Done]:
    """What is done to each frame."""
    side = purifier.config.image_size

    def by_boxes(frame: Frame) -> Done:
        assert boxes is not None
        found = purifier.regions(frame.pixels, boxes.of(frame.number), resize=method, paste=True)
        assert found.frame is not None
        lines = [
            {"box": place.tolist(), "score": round(float(score), 6)}
            for place, score in zip(found.boxes, found.scores, strict=True)
        ]
        return Done(found.frame, len(lines), float(found.scores.sum()), lines)

    def by_tiles(frame: Frame) -> Done:
        found = purifier.tiles(frame.pixels, overlap=overlap)
        scores = found.scores
        row, column = map(int, np.unravel_index(scores.argmax(), scores.shape))
        line: dict[str, Any] = {"score": round(float(scores.mean()), 6), "max_score": round(float(scores.max()), 6)}
        return Done(found.frame, scores.size, float(scores.sum()), [{**line, "max_tile": [row, column]}])

    if boxes is not None:
        return by_boxes
    if not tiles and size != (side, side):
        raise ValueError(
            f"expected frames of {side}x{side} pixels, got {size[1]}x{size[0]}; "
            "say what to purify in them with --boxes, or purify them whole with --tiles"
        )
    return by_tiles


def _finish(frame: Frame, writer: Writer, lines: IO[bytes] | None, report: Report) -> None:
    """Write a frame whose turn has come, or note that it was dropped."""
    head = {"frame": frame.number, "time": round(frame.time, 6)}
    if frame.done is None:
        cause = frame.dropped or "cancelled"
        report.drop(cause)
        entries: list[dict[str, Any]] = [{"dropped": cause}]
    else:
        done: Done = frame.done
        writer.write(done.pixels, frame)
        if done.regions:
            report.purified += 1
            report.regions += done.regions
            report.score += done.score
            report.computing.add(frame.seconds)
        else:
            report.unchanged += 1
        entries = done.lines
    if lines is not None:
        lines.writelines(json.dumps({**head, **entry}).encode() + b"\n" for entry in entries)


def check_output(output: Path, source: str, boxes: Path | None, scores: Path | None, *, force: bool) -> None:
    """Check the places of the results before any work.

    Raises:
        PlanError: a folder is missing, the suffix is not one of ``CONTAINERS``, or a result would replace an input,
            another result or, without ``force``, any file that exists.
    """
    if output.is_dir():
        raise PlanError(f"output {output}: expected a file name, got a folder; name a file in it with -o")
    if output.suffix.lower() not in CONTAINERS:
        raise PlanError(f"output {output}: expected a name that ends in {', '.join(CONTAINERS)}")
    if not output.parent.is_dir():
        raise PlanError(f"{output}: expected an existing folder {output.parent}, found none; make it first")
    inputs = [path for path in (Path(source), boxes) if path is not None and path.is_file()]
    if any(output.exists() and output.samefile(path) for path in inputs):
        raise PlanError(f"{output} is one of the inputs and is never overwritten; name another file with -o")
    if output.exists() and not force:
        raise PlanError(f"{output} exists already; pass --force to overwrite, or name another file")
    if scores is not None:
        # A camera is no file; its folder, which is there, stands in for it.
        jobs = [Job(path, output, output.name) for path in inputs or [output.parent]]
        check_extra_output(scores, jobs, force=force)
