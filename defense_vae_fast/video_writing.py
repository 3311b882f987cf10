"""Writing video: encoder, pixel format, clock and copied audio."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import IO, Any, NamedTuple

import numpy.typing as npt

from defense_vae_fast.video_reading import MATRICES, Feed, Frame, VideoError, pyav, reason

Array = npt.NDArray[Any]


class Container(NamedTuple):
    """A format of files."""

    name: str
    """FFmpeg's."""
    codecs: tuple[str, ...]
    """Those that are kept in it; the first is written in place of any other. All of them take frames at any time."""


_MP4 = ("h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg")
# All of these keep a time for each frame, which AVI, for one, does not.
CONTAINERS = {
    ".mp4": Container("mp4", _MP4),
    ".m4v": Container("mp4", _MP4),
    ".mov": Container("mov", _MP4),
    ".mkv": Container("matroska", (*_MP4, "vp8", "ffv1")),
    ".webm": Container("webm", ("vp9", "vp8", "av1")),
    ".ts": Container("mpegts", ("h264", "hevc")),
}
# A purified image is to survive its encoding: near to lossless where the encoder's own default is not. Without B-frames
# no frame waits for a later one.
_FINE: dict[str, dict[str, str]] = {
    "libx264": {"crf": "14", "preset": "veryfast", "bf": "0"},
    "libx265": {"crf": "16", "preset": "veryfast", "bf": "0", "x265-params": "log-level=error"},
    "libvpx-vp9": {"crf": "16", "b": "0", "deadline": "realtime", "cpu-used": "5"},
    "libsvtav1": {"crf": "20", "preset": "10"},
    "mpeg4": {"flags": "+qscale", "global_quality": "236"},  # 2 in units of FF_QP2LAMBDA, the finest but one
    "mjpeg": {"flags": "+qscale", "global_quality": "236"},
}
_TELEVISION = 1  # levels of 16 to 235 (AVCOL_RANGE_MPEG)
_MPEG4_CLOCK = 65535  # largest denominator that the format has room for


@contextmanager
def writing(
    target: IO[bytes],
    suffix: str,
    feed: Feed,
    size: tuple[int, int],
    encoder: str | None,
    options: Mapping[str, str] | None,
    note: Callable[[str], None],
) -> Iterator[Writer]:
    """A writer, whose file is complete when the block is left.

    Args:
        target: a binary file.
        suffix: of its name; one of ``CONTAINERS``.
        feed: the source, of which at least one frame has been read.
        size: (height, width) of the frames.
        encoder: FFmpeg's name of one, or None for that of the source's codec.
        options: for the encoder.
        note: called with what is not as in the source.

    Raises:
        VideoError: there is no such encoder, or it does not work.
    """
    av = pyav()
    container = CONTAINERS[suffix]
    codec = _encoder(container, feed.codec, encoder, note)

    def failure(error: Exception) -> VideoError:
        return VideoError(
            f"writing {container.name} with the encoder {codec.name}: {reason(error)}; "
            "another encoder, option, size or container may do"
        )

    try:
        with av.open(target, "w", format=container.name) as opened:
            try:
                writer = Writer(opened, codec, feed, size, options, note)
            except ValueError as error:  # PyAV's for a codec that the container does not take
                raise failure(error) from error
            yield writer
            writer.end()
    except av.error.FFmpegError as error:
        raise failure(error) from error


class Writer:
    """A video that is being written."""

    def __init__(
        self,
        container: Any,
        codec: Any,
        feed: Feed,
        size: tuple[int, int],
        options: Mapping[str, str] | None,
        note: Callable[[str], None],
    ) -> None:
        height, width = size
        av = pyav()
        self._new_frame = av.VideoFrame.from_ndarray
        self._container = container
        chosen = {**_FINE.get(codec.name, {}), **(options or {})}
        self._video = container.add_stream(codec.name, rate=feed.rate, options=chosen)
        context = self._video.codec_context
        self._video.width, self._video.height = width, height
        self._video.pix_fmt = self._format = _pixel_format(codec, feed.source_format, feed.channels, size)
        if "420" not in self._format and "420" in feed.source_format and (height % 2 or width % 2):
            note(f"{width}x{height} pixels do not halve: written as {self._format}, which some players lack")
        context.time_base = _clock(codec.name, feed.time_base)
        if ratio := feed.aspect_ratio:
            context.sample_aspect_ratio = 1 / ratio if feed.turned % 180 else ratio
        self._matrix = MATRICES.get(feed.matrix) if self._format.startswith("yuv") else None
        if self._matrix is not None:
            context.colorspace = feed.matrix
        self._audio = None
        if feed.audio is not None:
            try:
                self._audio = container.add_stream_from_template(feed.audio)
            except (ValueError, av.error.FFmpegError):
                name = feed.audio.codec_context.name
                note(f"the audio is left out: {container.format.name} takes none in {name}; another suffix may")

    def write(self, pixels: Array, frame: Frame) -> None:
        """Encode a frame, uint8 (H, W, C)."""
        grey = pixels.shape[2] == 1
        picture = self._new_frame(pixels[..., 0] if grey else pixels, format="gray" if grey else "rgb24")
        if self._format != picture.format.name:
            limited = _TELEVISION if re.match("yuv[^j]|nv", self._format) else None
            picture = picture.reformat(format=self._format, dst_colorspace=self._matrix, dst_color_range=limited)
        picture.pts, picture.time_base = frame.pts, frame.time_base
        for packet in self._video.encode(picture):
            self._container.mux(packet)

    def copy(self, packets: deque[Any]) -> None:
        """Write the audio that has been read."""
        while packets:
            packet = packets.popleft()
            if self._audio is not None:
                packet.stream = self._audio
                self._container.mux(packet)

    def end(self) -> None:
        """Write what the encoder still holds."""
        for packet in self._video.encode():
            self._container.mux(packet)


def _encoder(container: Container, source: str, wanted: str | None, note: Callable[[str], None]) -> Any:
    """The encoder that was asked for, or one of the source's codec, or of the container's first."""
    av = pyav()
    kept = [source] if source in container.codecs else []
    for name in [wanted] if wanted is not None else [*kept, container.codecs[0]]:
        try:
            codec = av.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        if codec.type != "video":
            raise VideoError(f"encoder: expected one of video, got {name!r}, of {codec.type}; leave it out")
        if wanted is None and name != source:
            note(f"the video is written in {name}, not in {source}, which {container.name} files or encoders here lack")
        return codec
    raise VideoError(f"encoder: expected one that this FFmpeg has, got {wanted or source!r}; name one with --encoder")


def _pixel_format(codec: Any, source: str, channels: int, size: tuple[int, int]) -> str:
    """The source's where the encoder takes it and it has eight bits, or the nearest to it."""
    known = [each.name for each in codec.video_formats or ()]
    if codec.name == "mjpeg":  # it knows no other range of levels
        return "yuvj420p"
    eight = not re.search(r"(9|10|12|14|16|32|48|64)(le|be)$", source)
    source = re.sub("^yuvj", "yuv", source)  # levels are written in the range of television
    colours_fit = channels == 1 or "gray" not in source
    wanted = [source] if eight and colours_fit and not source.startswith("yuva") else []
    wanted += ["yuv420p", "yuv444p", "gbrp", "rgb24", "bgr0"]
    if codec.name in ("libx264", "libx265") and (size[0] % 2 or size[1] % 2):  # the others pad within the stream
        wanted = [name for name in wanted if not re.search("42[02]|nv", name)]
    return next((name for name in wanted if not known or name in known), (known or wanted)[0])


def _clock(encoder: str, time_base: Fraction) -> Fraction:
    """The source's time base, or the finest part of it that the encoder can count in."""
    if encoder != "mpeg4":
        return time_base
    divisor = -(-time_base.denominator // _MPEG4_CLOCK)
    while time_base.denominator % divisor and divisor < time_base.denominator:
        divisor += 1
    return time_base * divisor
