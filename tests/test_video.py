"""The video command on real encoded videos, made here: attacked test images that move over a background."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import random_checkpoint

from defense_vae_fast import Purifier, VAEConfig, cli, demo, video
from defense_vae_fast.boxes_file import Boxes, BoxesError
from defense_vae_fast.checkpoint import WEIGHTS_FOLDER, Checkpoint, save_checkpoint
from defense_vae_fast.regions import Tiles
from defense_vae_fast.video_reading import VideoError, is_live

Array = np.ndarray[Any, Any]
HEIGHT, WIDTH = 90, 160
LOSSLESS = {"crf": "4", "preset": "ultrafast"}


@pytest.fixture(scope="module")
def grey(checkpoint: Checkpoint) -> Iterator[Purifier]:
    with Purifier(checkpoint, engine="openvino", precision="fp32") as purifier:
        yield purifier


@pytest.fixture(scope="module")
def colour() -> Iterator[Purifier]:
    with Purifier(random_checkpoint(VAEConfig(32, 3), 3), engine="openvino", precision="fp32") as purifier:
        yield purifier


def encode(
    path: Path,
    frames: Sequence[Array],
    codec: str = "libx264",
    format: str = "yuv420p",
    pts: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    rotation: int = 0,
    audio: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write frames, (H, W) or (H, W, 3), and perhaps a second of sound."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=LOSSLESS if options is None else options)
        stream.width, stream.height, stream.pix_fmt = width, height, format
        stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream(audio, rate=8000, layout="mono") if audio else None
        if sound is not None:
            wave = (8000 * np.sin(np.arange(8000) / 9)).astype(np.int16)
            resampler = av.AudioResampler(format=sound.format, layout="mono", rate=8000)
            for start in range(0, 8000, 1000):
                samples = av.AudioFrame.from_ndarray(wave[None, start : start + 1000], format="s16", layout="mono")
                samples.sample_rate, samples.pts, samples.time_base = 8000, start, Fraction(1, 8000)
                for part in resampler.resample(samples):
                    container.mux(sound.encode(part))
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="gray" if frame.ndim == 2 else "rgb24")
            picture = picture.reformat(format=format)
            picture.pts, picture.time_base = (number if pts is None else pts[number]), time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            container.mux(sound.encode())
    return path


def decode(path: Path, format: str = "gray") -> tuple[Array, list[float]]:
    """All frames, and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        matrix = 1 if frames[0].colorspace == 1 else 5
        named = {} if format == "gray" else {"src_colorspace": matrix, "dst_colorspace": 5}
        arrays = [frame.to_ndarray(format=format, **named) for frame in frames]
        return np.stack(arrays), [frame.time for frame in frames]


def stream_of(path: Path) -> Any:
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context


def noise(count: int, height: int = 28, width: int = 28, channels: int = 0, seed: int = 0) -> list[Array]:
    """Frames that no two of are alike, and smooth enough to be encoded well."""
    random = np.random.default_rng(seed)
    shape = (count, height // 4 + 1, width // 4 + 1, *([channels] if channels else []))
    coarse = random.integers(0, 256, shape, dtype=np.uint8)
    fine = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
    return [np.ascontiguousarray(frame) for frame in fine]


def lossless(path: Path, frames: Sequence[Array], **options: Any) -> Path:
    """FFV1 keeps every value."""
    return encode(path, frames, "ffv1", "gray" if frames[0].ndim == 2 else "bgr0", options={}, **options)


def write_lines(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["video", *map(str, words)])


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# The main thing


@dataclass
class Scene:
    """A video of attacked images and the same of clean ones, with the boxes around them."""

    attacked: Path
    clean: Path
    boxes: Path
    places: list[list[list[int]]]
    labels: Array
    images: Array
    """Clean, uint8 (frames * 3, 28, 28)."""

    def crops(self, path: Path) -> Array:
        frames, _ = decode(path)
        cut = [
            frame[y1:y2, x1:x2] for frame, boxes in zip(frames, self.places, strict=True) for x1, y1, x2, y2 in boxes
        ]
        return np.stack(cut)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    with np.load(WEIGHTS_FOLDER / "fashion_mnist_demo.npz") as data:
        images, labels = {key: data[key] for key in ("clean", "fgsm")}, data["labels"]
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    count, shown = 30, [[12 * (frame // 10) + 4 * k for k in range(3)] for frame in range(30)]
    places = [
        [[x, y, x + 28, y + 28] for k in range(3)
         for x, y in [(int(12 + 50 * k + 8 * np.sin(t / 5 + k)), int(30 + 25 * np.sin(t / 7 + 2 * k)))]]
        for t in range(count)
    ]  # fmt: skip
    paths = {}
    for key in images:
        frames = []
        for t in range(count):
            waves = (np.sin(columns / 40 + t / 10), np.cos(rows / 30), np.sin((rows + columns) / 50))
            frame = np.stack([90 + 50 * wave for wave in waves], -1).astype(np.uint8)
            for index, (x1, y1, x2, y2) in zip(shown[t], places[t], strict=True):
                frame[y1:y2, x1:x2] = images[key][index][..., None]
            frames.append(frame)
        paths[key] = encode(folder / f"{key}.mp4", frames)
    boxes = write_lines(folder / "boxes.jsonl", [{"frame": t, "boxes": places[t]} for t in range(count)])
    order = np.concatenate(shown)
    return Scene(paths["fgsm"], paths["clean"], boxes, places, labels[order], images["clean"][order])


def test_attacked_images_that_move_over_a_background(tmp_path: Path, scene: Scene) -> None:
    out, scores = tmp_path / "out.mp4", tmp_path / "scores.jsonl"
    result = command(scene.attacked, "-o", out, "--boxes", scene.boxes, "--scores", scores)
    assert result.exit_code == 0, result.output
    assert "30 frames in, 30 purified, 0 without a box, 0 dropped" in result.stdout
    assert "90 regions" in result.stdout
    assert "read as grey, and written so" in result.stderr

    classify = demo.load_classifier("fashion_mnist")
    accuracy = {
        path: float((classify(scene.crops(path)[..., None]) == scene.labels).mean()) for path in (scene.attacked, out)
    }
    assert accuracy[scene.attacked] < 0.05
    assert accuracy[out] > 0.85
    before, after = (np.abs(scene.crops(path).astype(float) - scene.images).mean() for path in (scene.attacked, out))
    assert after < 0.4 * before

    given, times = decode(scene.attacked)
    written, new_times = decode(out)
    assert new_times == times
    outside = np.ones(given.shape, bool)
    for frame, boxes in enumerate(scene.places):
        for x1, y1, x2, y2 in boxes:
            outside[frame, y1 - 2 : y2 + 2, x1 - 2 : x2 + 2] = False
    assert np.abs(given.astype(float) - written)[outside].mean() < 2  # what is left is the encoding
    assert stream_of(out).name == "h264"
    assert stream_of(out).pix_fmt == "yuv420p"
    assert temporary(tmp_path) == []

    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [(line["frame"], line["box"]) for line in lines] == [
        (frame, box) for frame, boxes in enumerate(scene.places) for box in boxes
    ]
    assert lines[3]["time"] == pytest.approx(1 / 25)
    mean = float(np.mean([line["score"] for line in lines]))
    assert f"mean score {mean:.4f}" in result.stdout
    other = tmp_path / "other.jsonl"
    assert command(scene.clean, "-o", tmp_path / "clean.mp4", "--boxes", scene.boxes, "--scores", other).exit_code == 0
    assert mean > 2 * np.mean([json.loads(line)["score"] for line in other.read_text().splitlines()])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", ["boxes", "tiles"])
def test_what_is_written_is_what_the_purifier_gives(
    tmp_path: Path, grey: Purifier, colour: Purifier, channels: int, how: str
) -> None:
    """Without loss in the codec, every pixel: in grey and in colour."""
    purifier = grey if channels == 1 else colour
    frames = noise(5, 61, 83, 3 if channels == 3 else 0)
    source, out = lossless(tmp_path / "in.mkv", frames), tmp_path / "out.mkv"
    boxes = [[3, 5, 40, 33], [50.5, 20, 90, 61]]
    entries = [{"boxes": boxes}, {"frame": 2, "boxes": [], "by": "a detector"}]
    chosen = Boxes(write_lines(tmp_path / "b.jsonl", entries)) if how == "boxes" else None
    report = video.run(
        purifier, str(source), out, boxes=chosen, tiles=how == "tiles", overlap=6 if how == "tiles" else None
    )
    for number, (frame, written) in enumerate(
        zip(frames, decode(out, "gray" if channels == 1 else "rgb24")[0], strict=True)
    ):
        if how == "tiles":
            expected = purifier.tiles(frame, overlap=6).frame
        elif number == 2:
            expected = frame
        else:
            expected = purifier.regions(frame, boxes, paste=True).frame  # type: ignore[assignment]
        np.testing.assert_array_equal(written, expected)
    assert stream_of(out).name == "ffv1"
    assert stream_of(out).pix_fmt == stream_of(source).pix_fmt
    unchanged = 1 if how == "boxes" else 0
    assert (report.frames, report.purified, report.unchanged, report.dropped) == (5, 5 - unchanged, unchanged, {})
    assert report.regions == (8 if how == "boxes" else 5 * purifier.tiles(frames[0], overlap=6).scores.size)
    assert report.computing.count == report.purified


def test_a_colour_video_through_yuv(tmp_path: Path, colour: Purifier) -> None:
    """Both ways through the same matrix: HD video says BT.709, and must not be turned into BT.601."""
    frames = noise(4, 64, 96, 3)
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    encode(source, frames, format="yuv444p", options={**LOSSLESS, "x264-params": "colormatrix=bt709"})
    assert stream_of(source).colorspace == 1
    video.run(colour, str(source), out, tiles=True, encoder_options={"crf": "1"})
    assert (stream_of(out).pix_fmt, stream_of(out).colorspace) == ("yuv444p", 1)
    given, written = decode(source, "rgb24")[0], decode(out, "rgb24")[0]
    for frame, result in zip(given, written, strict=True):
        assert np.abs(colour.tiles(frame).frame.astype(float) - result).mean() < 2.5


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
def test_luma_is_stretched_to_all_levels(tmp_path: Path, grey: Purifier, matrix: str, monkeypatch: Any) -> None:
    """Black and white of television are 16 and 235; the purifier was trained on 0 and 255."""
    frame = np.zeros((28, 28, 3), np.uint8)
    frame[:, 14:] = 255
    source = encode(tmp_path / "in.mp4", [frame] * 2, options={"crf": "1", "x264-params": f"colormatrix={matrix}"})
    seen: list[Array] = []
    monkeypatch.setattr(
        Purifier, "tiles", lambda self, frame, overlap: seen.append(frame) or Tiles(frame, np.zeros((1, 1)))
    )
    video.run(grey, str(source), tmp_path / "out.mp4")
    assert seen[0].shape == (28, 28, 1)
    assert np.abs(seen[0][..., 0].astype(int) - frame[..., 0]).max() <= 2
    assert np.abs(decode(tmp_path / "out.mp4")[0][0].astype(int) - frame[..., 0]).max() <= 6


def test_a_grey_video_for_a_colour_purifier(tmp_path: Path, colour: Purifier) -> None:
    frames = noise(2, 40, 40)
    out = tmp_path / "out.mkv"
    video.run(colour, str(lossless(tmp_path / "in.mkv", frames)), out, tiles=True, encoder="ffv1")
    expected = colour.tiles(np.repeat(frames[0][..., None], 3, 2)).frame
    colours, lumas = decode(out, "rgb24")[0][0], decode(out)[0][0]
    assert np.abs(lumas - expected @ np.array([0.299, 0.587, 0.114])).mean() < 2
    assert np.ptp(colours.astype(int), axis=2).mean() > 10  # a random purifier makes colours of grey, and they are kept


# Time


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts"])
def test_times_of_a_variable_frame_rate_are_kept(tmp_path: Path, grey: Purifier, suffix: str) -> None:
    pts = [0, 2, 3, 9, 10, 31, 33, 34]
    source = encode(tmp_path / f"in.{suffix}", noise(8), pts=pts, time_base=Fraction(1, 20))
    video.run(grey, str(source), tmp_path / f"out.{suffix}")
    before, after = decode(source)[1], decode(tmp_path / f"out.{suffix}")[1]
    np.testing.assert_allclose(after, before, atol=1e-6)
    with av.open(str(source)) as given, av.open(str(tmp_path / f"out.{suffix}")) as made:
        assert given.streams.video[0].time_base == made.streams.video[0].time_base


def test_a_clock_that_mpeg4_cannot_count(tmp_path: Path, grey: Purifier) -> None:
    source = encode(tmp_path / "in.ts", noise(5), pts=[0, 3, 4, 8, 9], time_base=Fraction(1, 90000 // 3000))
    video.run(grey, str(source), tmp_path / "out.ts", encoder="mpeg4")
    assert stream_of(tmp_path / "out.ts").name == "mpeg4"
    np.testing.assert_allclose(decode(tmp_path / "out.ts")[1], decode(source)[1], atol=1e-4)


def test_in_real_time_late_frames_are_dropped(tmp_path: Path, grey: Purifier) -> None:
    frames = noise(60, 100, 120)
    source = lossless(tmp_path / "in.mkv", frames, time_base=Fraction(1, 50))
    out, scores = tmp_path / "out.mkv", tmp_path / "s.jsonl"
    began = time.monotonic()
    report = video.run(grey, str(source), out, tiles=True, overlap=14, realtime=True, scores=scores)
    assert time.monotonic() - began > 1.1  # 60 frames at 50 a second
    assert report.frames == 60 == report.purified + sum(report.dropped.values())
    assert report.dropped.get("replaced", 0) > 5
    assert report.waiting.count == report.purified
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(60))
    kept = [line["frame"] for line in lines if "score" in line]
    assert len(kept) == report.purified
    np.testing.assert_allclose(decode(out)[1], np.array(kept) / 50, atol=1e-3)
    expected = grey.tiles(frames[kept[-1]], overlap=14)
    np.testing.assert_array_equal(decode(out)[0][-1], expected.frame)
    row, column = lines[kept[-1]]["max_tile"]
    assert expected.scores[row, column] == expected.scores.max()


def test_a_frame_too_late_for_anyone_is_dropped(tmp_path: Path, grey: Purifier) -> None:
    """A decoder that is behind: each frame is past its deadline as it comes."""
    source = lossless(tmp_path / "in.mkv", noise(10), time_base=Fraction(1, 1000))
    with pytest.raises(VideoError, match="all 10 frames came after their deadline"):
        video.run(grey, str(source), tmp_path / "out.mkv", realtime=True, deadline_ms=0.001)
    assert not (tmp_path / "out.mkv").exists()


def test_a_number_of_frames(tmp_path: Path, grey: Purifier) -> None:
    source = encode(tmp_path / "in.mp4", noise(9))
    totals: list[int | None] = []
    report = video.run(
        grey, str(source), tmp_path / "out.mp4", limit=4, progress=lambda report: totals.append(report.total)
    )
    assert (report.frames, report.purified, report.dropped) == (4, 4, {})
    assert len(decode(tmp_path / "out.mp4")[1]) == 4
    assert totals == [4] * 4


# Containers, codecs and what else is in a file


@pytest.mark.parametrize(
    ("codec", "format", "suffix", "written"),
    [
        ("mpeg4", "yuv420p", "mp4", "mpeg4"),
        ("libx264", "yuv422p", "mov", "h264"),
        ("libx265", "yuv420p10le", "mkv", "hevc"),
        ("libvpx-vp9", "yuv420p", "webm", "vp9"),
        ("mjpeg", "yuvj420p", "mkv", "mjpeg"),
        ("mpeg2video", "yuv420p", "ts", "h264"),
        ("rawvideo", "yuv420p", "mkv", "h264"),
        ("libx264", "yuv420p", "webm", "vp9"),
    ],
    ids=lambda value: str(value),
)
def test_codecs(tmp_path: Path, grey: Purifier, codec: str, format: str, suffix: str, written: str) -> None:
    if not _has_encoder(codec):
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    frames = noise(3, 56, 56)
    source = encode(tmp_path / "in.mkv", [np.repeat(f[..., None], 3, 2) for f in frames], codec, format, options={})
    notes: list[str] = []
    video.run(grey, str(source), tmp_path / f"out.{suffix}", tiles=True, note=notes.append)
    result = stream_of(tmp_path / f"out.{suffix}")
    assert result.codec.canonical_name == written
    assert any("is written in" in text for text in notes) == (written != stream_of(source).codec.canonical_name)
    given, made = decode(source)[0], decode(tmp_path / f"out.{suffix}")[0]
    for frame, after in zip(given, made, strict=True):
        assert np.abs(grey.tiles(frame).frame.astype(float) - after).mean() < 4


def _has_encoder(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


@pytest.mark.parametrize(
    ("encoder", "suffix", "format"),
    [("mpeg4", "mp4", "yuv420p"), (None, "mp4", "yuv444p"), ("libvpx-vp9", "webm", "yuv420p")],
)
def test_odd_sizes(tmp_path: Path, grey: Purifier, encoder: str | None, suffix: str, format: str) -> None:
    source = encode(tmp_path / "in.mkv", noise(2, 37, 53), "ffv1", "yuv420p", options={})
    notes: list[str] = []
    video.run(
        grey, str(source), tmp_path / f"out.{suffix}", tiles=True, encoder=encoder or "libx264", note=notes.append
    )
    context = stream_of(tmp_path / f"out.{suffix}")
    assert (context.width, context.height, context.pix_fmt) == (53, 37, format)
    assert any("do not halve" in text for text in notes) == (format == "yuv444p")
    assert (
        np.abs(decode(tmp_path / f"out.{suffix}")[0][0] - grey.tiles(decode(source)[0][0]).frame.astype(float)).mean()
        < 6
    )


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_turned_upright(tmp_path: Path, grey: Purifier, rotation: int) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV does not write a rotation")
    upright = noise(1, 40, 64)[0]
    lying = np.ascontiguousarray(np.rot90(upright, -rotation // 90))
    source = encode(tmp_path / "in.mp4", [lying] * 2, rotation=rotation)
    boxes = Boxes(write_lines(tmp_path / "b.jsonl", [{"boxes": [[30, 4, 60, 34]]}]))
    notes: list[str] = []
    video.run(grey, str(source), tmp_path / "out.mp4", boxes=boxes, note=notes.append)
    assert any("turned upright" in text for text in notes)
    [frame, _] = decode(tmp_path / "out.mp4")[0]
    expected = grey.regions(upright, [[30, 4, 60, 34]], paste=True).frame
    assert frame.shape == (40, 64)
    assert np.abs(frame.astype(float) - expected).mean() < 3  # type: ignore[operator]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0


def packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        found = [packet for packet in container.demux(stream) if packet.dts is not None]
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in found]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_audio_is_copied(tmp_path: Path, grey: Purifier, suffix: str) -> None:
    source = encode(tmp_path / "in.mp4", noise(25), audio="aac")
    video.run(grey, str(source), tmp_path / f"out.{suffix}")
    before, after = packets(source), packets(tmp_path / f"out.{suffix}")
    assert [data for _, data in after] == [data for _, data in before]
    # Matroska has no negative times and moves all by what the sound starts early; against the pictures it stays.
    start, new_start = decode(source)[1][0], decode(tmp_path / f"out.{suffix}")[1][0]
    np.testing.assert_allclose(
        [when - new_start for when, _ in after], [when - start for when, _ in before], atol=1.1e-3
    )


def test_audio_that_the_container_does_not_take_is_left_out_and_said(tmp_path: Path, grey: Purifier) -> None:
    source = encode(tmp_path / "in.mkv", noise(5), audio="pcm_s16le")
    notes: list[str] = []
    video.run(grey, str(source), tmp_path / "out.webm", note=notes.append)
    assert any(text.startswith("the audio is left out: webm takes none in pcm_s16le") for text in notes)
    with av.open(str(tmp_path / "out.webm")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


# Sources that are no files


def test_what_counts_as_live() -> None:
    live = ["/dev/video0", "rtsp://host/x", "RTSP://host/x", "rtmp://host/x", "udp://0.0.0.0:1"]
    others = ["street.mp4", "http://host/x.mp4", "https://host/x.m3u8", "rtsp", "/home/dev/x.mp4"]
    assert [is_live(source, None) for source in live + others] == [True] * len(live) + [False] * len(others)
    assert is_live("Integrated Camera", "dshow")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


CAMERA = """
import sys, time
from fractions import Fraction
import av, numpy as np

url = sys.argv[1]
levels = np.random.default_rng(0).integers(0, 256, (50, 7, 7), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
for _ in range(100):
    try:
        container = av.open(url, "w", format="rtsp", options={"rtsp_transport": "tcp"})
        stream = container.add_stream("libx264", rate=25, options={"tune": "zerolatency", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        container.start_encoding()
        break
    except OSError:
        time.sleep(0.1)  # nobody listens yet
with container:
    for number, frame in enumerate(levels):
        picture = av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuv420p")
        picture.pts, picture.time_base = 1000 + number, Fraction(1, 25)
        container.mux(stream.encode(picture))
        time.sleep(1 / 25)
    container.mux(stream.encode())
"""


def test_a_real_rtsp_session(tmp_path: Path, grey: Purifier) -> None:
    """FFmpeg listens; a camera, another process, announces itself and sends 50 frames at 25 a second."""
    url = f"rtsp://127.0.0.1:{free_port()}/yard"
    camera = subprocess.Popen([sys.executable, "-c", CAMERA, url], stderr=subprocess.PIPE, text=True)
    notes: list[str] = []
    out = tmp_path / "out.mkv"
    options = {"rtsp_flags": "listen", "listen_timeout": "20", "rtsp_transport": "tcp"}
    try:
        report = video.run(grey, url, out, tiles=True, note=notes.append, input_options=options)
        _, told = camera.communicate(timeout=20)
    finally:
        camera.kill()
    assert camera.returncode == 0, told
    assert any("a live source is read as it comes" in text for text in notes)
    assert report.frames == report.purified + sum(report.dropped.values())
    assert report.purified >= 5
    written, times = decode(out)
    assert len(written) == report.purified
    assert times[0] < 0.5  # counted from its start
    assert report.total is None


def test_a_url_that_is_a_file(tmp_path: Path, grey: Purifier) -> None:
    encode(tmp_path / "in.mp4", noise(12), options={**LOSSLESS})
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"http://127.0.0.1:{server.server_port}/in.mp4"
        report = video.run(grey, source, tmp_path / "out.mp4")
        assert (report.frames, report.purified) == (12, 12)  # all, as of a file
        with pytest.raises(VideoError, match=r"none.mp4: expected a video that FFmpeg reads, got: .*404"):
            video.run(grey, f"http://127.0.0.1:{server.server_port}/none.mp4", tmp_path / "none.mp4")
        server.shutdown()


def test_a_source_that_breaks_off(tmp_path: Path, checkpoint_path: Path) -> None:
    """A server that hangs up in the middle: what came by then is kept, and the exit code says that it is not all."""
    whole = encode(tmp_path / "in.ts", noise(40)).read_bytes()

    class HangsUp(_Quiet):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) * 2 // 3])
            self.close_connection = True

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"http://127.0.0.1:{server.server_port}/in.ts"
        result = command(source, "-o", tmp_path / "out.mp4", "-c", checkpoint_path)
        server.shutdown()
    assert result.exit_code == 1, result.output
    assert "reading ended before its time" in result.stderr
    assert 10 < len(decode(tmp_path / "out.mp4")[1]) < 40


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_this_pyav_reads_cameras() -> None:
    if sys.platform != "linux":
        pytest.skip("Video4Linux is Linux's")
    assert any("v4l2" in name for name in av.formats_available)


# Stopping


def start(*words: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", "from defense_vae_fast.cli import main; main()", "video", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "twice"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stopped_run_leaves_a_finished_video_or_nothing(
    tmp_path: Path, checkpoint_path: Path, kind: signal.Signals, twice: bool
) -> None:
    source = lossless(tmp_path / "in.mkv", noise(2000, 40, 40), time_base=Fraction(1, 20))
    out, scores = tmp_path / "new" / "out.mp4", tmp_path / "new" / "s.jsonl"
    out.parent.mkdir()
    words = ("--realtime", "--tiles", "-c", checkpoint_path, "--scores", scores, "--encoder", "libx264")
    process = start(source, "-o", out, *words)
    deadline = time.monotonic() + 60
    while not temporary(out.parent) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    process.send_signal(kind)
    if twice:  # before the first has been noticed, or after: either way without a traceback
        process.send_signal(kind)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert temporary(out.parent) == []
    if not twice:
        frames, times = decode(out)
        assert len(frames) >= 3
        assert times[0] == 0
        lines = [json.loads(line) for line in scores.read_text().splitlines()]
        assert len(frames) == sum("score" in line for line in lines)
        assert f"{len(lines)} frames in, {len(frames)} purified" in stdout
    elif out.exists():
        assert len(decode(out)[0]) >= 1


def test_a_stop_before_the_first_frame_writes_nothing(tmp_path: Path, grey: Purifier) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(VideoError, match="stopped before its first frame"):
        video.run(grey, str(encode(tmp_path / "in.mp4", noise(3))), tmp_path / "out.mp4", stop=stop)
    assert not (tmp_path / "out.mp4").exists()


def test_waiting_frames_are_accounted_for_when_stopped(tmp_path: Path, grey: Purifier) -> None:
    stop = threading.Event()
    source = encode(tmp_path / "in.mp4", noise(200))
    report = video.run(
        grey, str(source), tmp_path / "out.mp4", stop=stop, progress=lambda r: stop.set() if r.purified == 3 else None
    )
    assert report.stopped
    assert report.purified == len(decode(tmp_path / "out.mp4")[1]) == 3
    assert report.frames == 3 + report.dropped.get("cancelled", 0) < 200


def test_a_failure_leaves_nothing(tmp_path: Path, grey: Purifier, monkeypatch: pytest.MonkeyPatch) -> None:
    source = encode(tmp_path / "in.mp4", noise(20))
    right, calls = Purifier.tiles, []

    def fails(self: Purifier, frame: Array, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no room")
        return right(self, frame, **options)

    monkeypatch.setattr(Purifier, "tiles", fails)
    before = threading.active_count()
    with pytest.raises(MemoryError):
        video.run(grey, str(source), tmp_path / "out.mp4", scores=tmp_path / "s.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
    assert threading.active_count() == before


# Damage


def test_a_damaged_frame_is_dropped_and_the_rest_goes_on(tmp_path: Path, checkpoint_path: Path) -> None:
    frames = noise(30)
    source = encode(tmp_path / "in.mkv", frames, "mjpeg", "yuvj420p", options={})
    with av.open(str(source)) as container:
        whole = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = source.read_bytes()
    for number in (12, 20):
        data = data.replace(whole[number], b"\x55" * len(whole[number]))
    source.write_bytes(data)
    result = command(source, "-o", tmp_path / "out.mkv", "-c", checkpoint_path)
    assert result.exit_code == 1, result.output
    assert "30 frames in, 28 purified, 0 without a box, 2 dropped (2 damaged)" in result.stdout
    times = [round(25 * when) for when in decode(tmp_path / "out.mkv")[1]]
    assert times == [number for number in range(30) if number not in (12, 20)]


def test_a_video_that_ends_too_soon(tmp_path: Path, checkpoint_path: Path) -> None:
    source = encode(tmp_path / "in.ts", noise(30), "mpeg2video", options={})
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    result = command(source, "-o", tmp_path / "out.mp4", "-c", checkpoint_path)
    assert result.exit_code in (0, 1), result.output
    assert 5 < len(decode(tmp_path / "out.mp4")[1]) < 30


def test_a_video_that_changes_its_size(tmp_path: Path, checkpoint_path: Path) -> None:
    parts = [encode(tmp_path / f"{side}.ts", noise(6, side, side)).read_bytes() for side in (28, 56)]
    (tmp_path / "in.ts").write_bytes(b"".join(parts))
    result = command(tmp_path / "in.ts", "-o", tmp_path / "out.mp4", "-c", checkpoint_path)
    assert result.exit_code == 1, result.output
    assert "expected 28x28 pixels as before, got 56x56" in result.stderr
    assert 4 <= len(decode(tmp_path / "out.mp4")[1]) <= 6


# Errors: one line each


def one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if "read as grey" not in line]
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("short") / "in.mp4", noise(3, 40, 60))


def _truncated(path: Path, source: Path) -> Path:
    path.write_bytes(source.read_bytes()[:300])
    return path


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


SOURCES: dict[str, tuple[Callable[[Path, Path], str | Path], str]] = {
    "no such file": (lambda folder, _: folder / "none.mp4", "expected a video file, a camera or a URL, found none"),
    "a folder": (lambda folder, _: folder, "found a folder"),
    "noise": (lambda folder, _: _written(folder / "n.mp4", bytes(range(256)) * 40), "got: Invalid data"),
    "nothing": (lambda folder, _: _written(folder / "e.mp4", b""), "expected a video that FFmpeg reads"),
    "a cut-off file": (lambda folder, short: _truncated(folder / "t.mp4", short), "expected a video that FFmpeg reads"),
    "no camera": (lambda *_: "/dev/video97", "/dev/video97: expected a video that FFmpeg reads, got: No such file"),
    "no server": (lambda *_: f"rtsp://127.0.0.1:{free_port()}/x", "got: Connection refused"),
    "no scheme": (lambda *_: "nonsense://x", "got: Protocol not found"),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_cannot_be_read(tmp_path: Path, checkpoint_path: Path, short: Path, case: str) -> None:
    make, message = SOURCES[case]
    if case == "no camera" and sys.platform != "linux":
        pytest.skip("Video4Linux is Linux's")
    one_line(command(make(tmp_path, short), "-o", tmp_path / "out.mp4", "--tiles", "-c", checkpoint_path), message)
    assert not (tmp_path / "out.mp4").exists()
    assert temporary(tmp_path) == []


def test_results_of_a_source_that_is_no_file(tmp_path: Path, checkpoint_path: Path) -> None:
    scores, url = _written(tmp_path / "s.jsonl", b"mine"), f"rtsp://127.0.0.1:{free_port()}/x"
    words = (url, "-o", tmp_path / "out.mp4", "--tiles", "--scores", scores, "-c", checkpoint_path)
    one_line(command(*words), "s.jsonl exists already; pass --force to overwrite")
    one_line(command(*words, "--force"), "got: Connection refused")
    assert scores.read_bytes() == b"mine"


def test_sound_alone(tmp_path: Path, checkpoint_path: Path) -> None:
    with av.open(str(tmp_path / "in.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    one_line(
        command(tmp_path / "in.wav", "-o", tmp_path / "out.mp4", "-c", checkpoint_path), "expected a video, got a file"
    )


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "both": (("-o", "OUT", "--tiles", "--boxes", "IN"), "expected --boxes or --tiles, got both"),
    "overlap alone": (("-o", "OUT", "--overlap", "3"), "--overlap: expected with --tiles alone"),
    "too much overlap": (("-o", "OUT", "--tiles", "--overlap", "15"), "overlap: expected an int from 0 to 14"),
    "neither": (("-o", "OUT"), "expected frames of 28x28 pixels, got 60x40; say what to purify in them with --boxes"),
    "itself": (("-o", "IN", "--tiles", "--force"), "is one of the inputs and is never overwritten"),
    "there already": (("-o", "THERE", "--tiles"), "exists already; pass --force to overwrite"),
    "no folder": (("-o", "FOLDER/none/out.mp4", "--tiles"), "expected an existing folder"),
    "into a folder": (("-o", "FOLDER", "--tiles"), "expected a file name, got a folder"),
    "no suffix": (("-o", "FOLDER/out", "--tiles"), "expected a name that ends in .mp4, "),
    "avi": (("-o", "FOLDER/out.avi", "--tiles"), "expected a name that ends in .mp4, "),
    "scores over it": (("-o", "OUT", "--tiles", "--scores", "OUT"), "is also the name of a result"),
    "scores over the input": (("-o", "OUT", "--tiles", "--scores", "IN", "--force"), "is one of the inputs"),
    "scores nowhere": (("-o", "OUT", "--tiles", "--scores", "FOLDER/none/s"), "expected an existing folder"),
    "no encoder": (("-o", "OUT", "--tiles", "--encoder", "quick"), "expected one that this FFmpeg has, got 'quick'"),
    "another's encoder": (("-o", "OUT", "--tiles", "--encoder", "aac"), "expected one of video, got 'aac'"),
    "a bad option": (("-o", "OUT", "--tiles", "--encoder-option", "crf"), "expected KEY=VALUE, got 'crf'"),
    "a bad value": (("-o", "OUT", "--tiles", "--encoder-option", "preset=x"), "writing mp4 with the encoder libx264: "),
    "no format": (("-o", "OUT", "--tiles", "--input-format", "quick"), "expected a video that FFmpeg reads"),
    "not for webm": (("-o", "FOLDER/out.webm", "--tiles", "--encoder", "libx264"), "writing webm with the encoder"),
    "no boxes": (("-o", "OUT", "--boxes", "FOLDER/none"), "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be(tmp_path: Path, checkpoint_path: Path, short: Path, case: str) -> None:
    words, message = OPTIONS[case]
    folder = tmp_path / "results"
    folder.mkdir()
    there = _written(folder / "there.mp4", b"mine")
    places = {"OUT": str(folder / "out.mp4"), "IN": str(short), "THERE": str(there)}
    named = [places.get(word, word.replace("FOLDER", str(folder))) for word in words]
    one_line(command(short, *named, "-c", checkpoint_path), message)
    assert [path.name for path in folder.iterdir()] == ["there.mp4"]
    assert there.read_bytes() == b"mine"
    assert short.stat().st_size > 1000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected JSON, got '{'"),
        ("[" * 100_000, "expected JSON"),
        ("\xff", "expected JSON"),
        ("[1, 2]", 'expected {"frame": n'),
        ('{"frame": 1}', 'expected {"frame": n'),
        ('{"frame": -1, "boxes": []}', "expected a frame number from 0 on, got -1"),
        ('{"frame": 1.0, "boxes": []}', "expected a frame number"),
        ('{"frame": true, "boxes": []}', "expected a frame number"),
        ('{"frame": null, "boxes": []}', "expected a frame number"),
        ('{"frame": 1, "boxes": [[1, 2, 3]]}', "expected boxes of four finite numbers"),
        ('{"frame": 1, "boxes": [[1, 2, 3, NaN]]}', "expected boxes of four finite numbers"),
        ('{"frame": 1, "boxes": [[5, 2, 3, 4]]}', "left < right"),
        ('{"frame": 1, "boxes": [1, 2, 3, 4]}', "expected boxes of four finite numbers"),
        ('{"frame": 1, "boxes": {"a": 1}}', "expected boxes of four finite numbers"),
        ('{"frame": 0, "boxes": []}', "got a second one for frame 0 after line 1"),
    ],
    ids=lambda value: value[:30],
)
def test_lines_that_hold_no_boxes(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "boxes.jsonl"
    path.write_bytes(b'{"frame": 0, "boxes": [[0, 0, 9, 9]]}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(BoxesError, match=r"boxes\.jsonl, line 3: ") as error:
        Boxes(path)
    assert message in str(error.value)
    assert len(str(error.value)) < 400


def test_boxes_outside_the_frame_and_frames_outside_the_video(
    tmp_path: Path, checkpoint_path: Path, short: Path
) -> None:
    outside = write_lines(tmp_path / "a.jsonl", [{"boxes": []}, {"frame": 7, "boxes": [[60, 0, 70, 20]]}])
    one_line(
        command(short, "-o", tmp_path / "out.mp4", "--boxes", outside, "-c", checkpoint_path),
        "a.jsonl, line 2: boxes[0]: expected left < right and top < bottom within 60x40 pixels",
    )
    beyond = write_lines(tmp_path / "b.jsonl", [{"frame": n, "boxes": [[0, 0, 30, 30]]} for n in range(5)])
    result = command(short, "-o", tmp_path / "out.mp4", "--boxes", beyond, "-c", checkpoint_path)
    assert result.exit_code == 0
    assert "2 of its lines are for frames after the last one, 2" in result.stderr


def test_a_purifier_that_no_video_fits(tmp_path: Path, short: Path) -> None:
    save_checkpoint(tmp_path / "two.safetensors", random_checkpoint(VAEConfig(32, 2)))
    one_line(
        command(short, "-o", tmp_path / "out.mp4", "--tiles", "-c", tmp_path / "two.safetensors"),
        "expected a purifier of 1 or 3 channels for video, got one of 2",
    )


def test_without_pyav_the_extra_is_named(
    tmp_path: Path, short: Path, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    one_line(
        command(short, "-o", tmp_path / "out.mp4", "--tiles", "-c", checkpoint_path),
        "pip install 'defense-vae-fast[video]'",
    )


def test_the_command_is_quick_to_say_what_it_does() -> None:
    code = (
        "import sys; from defense_vae_fast import cli\n"
        "try: cli.main(['video', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'av', 'cv2', 'openvino', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "no colour comes through unpurified" in " ".join(done.stdout.split())
