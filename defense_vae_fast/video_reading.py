"""Reading video: a thread that decodes, and the queue between it and whoever purifies."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from defense_vae_fast.backlog import Backlog, Item

Array = npt.NDArray[Any]

# FFmpeg's number of a YCbCr matrix (AVCOL_SPC) -> its scaler's (SWS_CS); others are taken for BT.601, both ways.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
_BT601 = 5
_LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "udp")
_CAMERAS = "/dev/video"
_CAMERA_FORMATS = ("v4l2", "video4linux2", "avfoundation", "dshow")
_TIMEOUT = 10.0  # seconds without a byte from the network
_PATIENCE = 2.0  # seconds that the reader may take to notice the end
_READ_AHEAD = 4  # decoded frames that wait while all are to be done
_POLL = 0.1  # seconds; a signal sets an event and wakes nobody


class VideoError(RuntimeError):
    """The video cannot be read, purified or written; the message says which and what to do."""


def pyav() -> Any:
    """The module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise ImportError("video: PyAV is not installed; pip install 'defense-vae-fast[video]'") from error
    return av


def reason(error: BaseException) -> str:
    """FFmpeg's words without its number and the file's name."""
    text = str(getattr(error, "strerror", None) or error)
    return "no answer in time" if "Immediate exit" in text else text


class Frame(Item):
    """A decoded frame on its way."""

    __slots__ = ("done", "number", "pts", "seconds", "time", "time_base")

    def __init__(
        self, pixels: Array, number: int, pts: int, time_base: Fraction, since: float, deadline: float
    ) -> None:
        super().__init__(pixels[None], "uint8", since, deadline)
        self.number = number
        self.pts = pts
        self.time_base = time_base
        self.time = float(pts * time_base)
        self.seconds = 0.0
        self.done: Any = None
        """What was made of it; None before, and for a dropped one."""

    @property
    def pixels(self) -> Array:
        """uint8 (H, W, C), upright."""
        frame: Array = self.array[0]
        return frame


class Feed:
    """The source, read on a thread of its own, and the queue of its frames. A context manager.

    Frames of one channel are grey, luma in 0..255; of three, RGB. All are turned upright as their metadata say.

    Args:
        container: what PyAV opened, with a video stream; it is closed here.
        source: its name, for messages.
        channels: 1 or 3.
        live: it comes at its own pace. Times are counted from its first frame, and the audio is not read.
        realtime: a file is read at the pace of its times. Here and with ``live``, the newest frame alone waits.
        deadline_ms: how long it may, then.
        limit: most frames to read.
        stop: when set, :meth:`next` ends.

    Attributes:
        read: frames that were put into the queue.
        damaged: frames that could not be decoded.
        total: frames that there should be; None where nobody knows.
        trouble: why reading ended before the end.
        packets: of the audio, to be copied.
    """

    def __init__(
        self,
        container: Any,
        source: str,
        channels: int,
        *,
        live: bool,
        realtime: bool,
        deadline_ms: float,
        limit: int | None,
        stop: threading.Event,
    ) -> None:
        # Only the thread touches the stream once it runs; what others want of it is taken now or with the first frame.
        self._video = video = container.streams.video[0]
        self.codec: str = video.codec_context.codec.canonical_name
        self.aspect_ratio: Fraction | None = video.sample_aspect_ratio
        self.live = live
        audio = container.streams.audio
        self.audio = audio[0] if audio and not live else None
        self.packets: deque[Any] = deque()
        self.trouble: str | None = None
        self.read = self.damaged = 0
        self._left_out = len(container.streams) - 1 - (self.audio is not None)
        self._container = container
        self._source = source
        self.channels = channels
        self._paced = realtime and not live
        self.realtime = realtime or live
        self._deadline = deadline_ms / 1e3 if self.realtime else math.inf
        self._limit = limit
        self._stop = stop
        self._backlog: Backlog[Frame] = (
            Backlog(1, 1, 0.0, "latest") if self.realtime else Backlog(_READ_AHEAD, 1, 0.0, "block")
        )
        self._settled: list[Frame] = []
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._ended = False
        self._failed: BaseException | None = None
        self._shape: tuple[int, ...] | None = None
        self.source_format = ""
        self.matrix = 0
        """FFmpeg's number of the YCbCr matrix."""
        self.turned = 0
        """Degrees counterclockwise."""
        rate = video.average_rate or video.guessed_rate or video.base_rate or 30
        self.rate = Fraction(rate)
        self.time_base = Fraction(self._video.time_base or 1 / self.rate)
        duration = float(container.duration or 0) / 1e6
        count = self._video.frames or round(duration * float(self.rate))
        self.total = None if live or not count else min(count, limit or count)
        self._video.thread_type = "SLICE" if self.live else "AUTO"  # whole frames side by side come late
        self._thread = threading.Thread(target=self._read, name="defense_vae_fast-video", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_PATIENCE)
        if not self._thread.is_alive():  # one that waits for a dead network keeps what it reads from
            self._container.close()

    def notes(self) -> Iterator[str]:
        """What is not as in the source."""
        if self.channels == 1 and "gray" not in self.source_format:
            yield "the purifier is for grey images: frames are read as grey, and written so"
        if self.turned:
            yield f"frames are turned upright, by {self.turned % 360} degrees counterclockwise as their metadata say"
        if self.live and self._left_out:
            yield f"of this live source the video alone is recorded; {self._left_out} other stream(s) are left out"
        elif self._left_out:
            yield f"video and the first audio stream are kept; {self._left_out} other stream(s) are left out"
        if self.live:
            yield "a live source is read as it comes: frames that come while one is purified are dropped but the newest"

    # For the thread that purifies

    def next(self) -> Frame | None:
        """The next frame to purify; None at the end, or when the run was stopped.

        Raises:
            BaseException: what the reader failed with.
        """
        with self._changed:
            while True:
                if self._failed is not None:
                    raise self._failed
                if self._stop.is_set():
                    self._closing.set()
                    self._settled += self._backlog.settle(self._backlog.clear("cancelled"))
                    self._changed.notify_all()
                    return None
                batch, late = self._backlog.take(time.monotonic())
                self._settled += self._backlog.settle(late)
                if batch:
                    self._changed.notify_all()
                    return batch[0]
                if self._ended:
                    return None
                self._changed.wait(_POLL)

    def settle(self, frame: Frame) -> list[Frame]:
        """All frames up to ``frame`` that have not been given out yet, in their order."""
        with self._changed:
            settled, self._settled = [*self._settled, *self._backlog.settle([frame])], []
        return settled

    def rest(self) -> list[Frame]:
        """At the end: what has been dropped since the last frame, those included that the reader holds."""
        self._thread.join(_PATIENCE)
        with self._changed:
            self._settled += self._backlog.settle(self._backlog.clear("cancelled"))
            settled, self._settled = self._settled, []
        if self._failed is not None:
            raise self._failed
        return settled

    def nothing(self) -> VideoError:
        """Why there is not one frame."""
        if self._stop.is_set():
            return VideoError(f"{self._source}: stopped before its first frame; nothing is written")
        if self.trouble or self.damaged:
            why = self.trouble or f"{self.damaged} damaged ones"
            return VideoError(f"{self._source}: expected a video, could decode no frame of it: {why}; is it complete?")
        if self.read:
            return VideoError(f"{self._source}: all {self.read} frames came after their deadline; nothing is written")
        return VideoError(f"{self._source}: expected a video, got one without a frame")

    # The thread that reads

    def _read(self) -> None:
        try:
            self._read_packets()
        except BaseException as error:  # it is the other thread's to tell
            self._failed = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_packets(self) -> None:
        av = pyav()
        streams = [self._video] if self.audio is None else [self._video, self.audio]
        packets = self._container.demux(*streams)
        number, times, start = 0, _Times(self.rate, self.live), time.monotonic()
        while not self._closing.is_set():
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                self.trouble = reason(error)
                return
            if packet is None:
                return
            if packet.stream is self.audio:
                if packet.dts is not None:
                    self.packets.append(packet)
                continue
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self.damaged += 1
                continue
            for frame in frames:
                if self._limit is not None and number >= self._limit:
                    return
                if frame.is_corrupt:
                    self.damaged += 1
                    continue
                base = Fraction(frame.time_base or self.time_base)
                pts = times.next(frame.pts, base)
                item = self._item(frame, number, pts, base)
                if item is None:
                    return
                if self._paced:
                    item.since = start + float((pts - times.first) * base)
                    if self._closing.wait(max(0.0, item.since - time.monotonic())):
                        return
                number += 1
                if not self._put(item):
                    return

    def _item(self, frame: Any, number: int, pts: int, base: Fraction) -> Frame | None:
        """The upright frame; None, with the trouble noted, when it has another size than those before."""
        if number == 0:
            self.source_format, self.matrix = frame.format.name, int(frame.colorspace)
        pixels: Array
        if self.channels == 1:
            pixels = frame.to_ndarray(format="gray")
        else:
            # PyAV before 18 looks at the source's matrix only where one is named for the result, which RGB has none of.
            matrix = MATRICES.get(int(frame.colorspace), _BT601)
            pixels = frame.to_ndarray(format="rgb24", src_colorspace=matrix, dst_colorspace=_BT601)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if turns := round(frame.rotation / 90) % 4:
            self.turned = 90 * turns
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        self._shape = self._shape or pixels.shape
        if pixels.shape != self._shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (self._shape, pixels.shape)]
            self.trouble = f"frame {number}: expected {sizes[0]} pixels as before, got {sizes[1]}"
            return None
        return Frame(pixels, number, pts, base, time.monotonic(), self._deadline)

    def _put(self, item: Frame) -> bool:
        """False when nobody wants it any more."""
        with self._changed:
            while not self.realtime and not self._backlog.has_room(1) and not self._closing.is_set():
                self._changed.wait()
            self.read += 1
            dropped = self._backlog.add(item, None)
            if self._closing.is_set():
                dropped = self._backlog.clear("cancelled")
            self._settled += self._backlog.settle(dropped)
            self._changed.notify_all()
            return not self._closing.is_set()


class _Times:
    """Rising times of a source's frames, in units of its time base.

    Frames without a time follow at ``rate``; ``from_zero`` counts from the first frame, since a camera counts
    from its start, or from 1970.
    """

    def __init__(self, rate: Fraction, from_zero: bool) -> None:
        self.first = 0
        self._rate = rate
        self._last: int | None = None
        self._shift: int | None = None if from_zero else 0

    def next(self, pts: int | None, base: Fraction) -> int:
        """The time of the next frame, whose own is ``pts``."""
        following = 0 if self._last is None else self._last + max(1, round(1 / self._rate / base))
        if pts is None:
            pts = following
        else:
            if self._shift is None:
                self._shift = pts - following
            pts -= self._shift
        if self._last is None:
            self.first = pts
        elif pts <= self._last:  # damaged sources; an encoder takes rising times alone
            pts = self._last + 1
        self._last = pts
        return pts


def open_source(source: str, input_format: str | None, options: Mapping[str, str] | None) -> Any:
    """The source's container, with a video stream in it.

    Raises:
        VideoError: it cannot be opened or has no video.
        ImportError: PyAV is not installed.
    """
    av = pyav()
    camera = source.startswith(_CAMERAS)
    local = "://" not in source and not camera and input_format is None
    if local and (Path(source).is_dir() or not Path(source).exists()):
        found = "a folder" if Path(source).is_dir() else "none"
        raise VideoError(f"{source}: expected a video file, a camera or a URL, found {found}")
    form = input_format or ("v4l2" if camera else None)
    try:
        container = av.open(source, format=form, options=dict(options or {}), timeout=None if local else _TIMEOUT)
    except (av.error.FFmpegError, ValueError) as error:  # a ValueError for a format that is not known
        raise VideoError(f"{source}: expected a video that FFmpeg reads, got: {reason(error)}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{source}: expected a video, got a file without pictures in it")
    return container


def is_live(source: str, input_format: str | None) -> bool:
    """Whether a source comes at its own pace: a camera, or a stream that is not fetched like a file."""
    device = source.startswith(_CAMERAS) or input_format in _CAMERA_FORMATS
    return device or (source.partition("://")[0].lower() in _LIVE_SCHEMES and "://" in source)
