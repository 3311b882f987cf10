"""Boxes and tiles of whole frames against a plain reference, and a real purifier behind them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_images import COLOUR, pixels

from defense_vae_fast import Purifier, VAEConfig, regions
from defense_vae_fast.checkpoint import Checkpoint

Array = np.ndarray[Any, Any]
GRAY = VAEConfig()


@pytest.fixture(scope="module")
def purifier(checkpoint: Checkpoint) -> Iterator[Purifier]:
    with Purifier(checkpoint, engine="openvino") as purifier:
        yield purifier


def unchanged(images: Array) -> tuple[Array, Array]:
    return images, np.arange(len(images), dtype=np.float32)


# Resizing


def by_hand(image: Array, height: int, width: int) -> Array:
    """Area means of a whole-number shrink."""
    down, across = image.shape[0] // height, image.shape[1] // width
    return np.rint(image.reshape(height, down, width, across, -1).mean((1, 3))).astype(np.uint8)


@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (3, 5), (1, 4)], ids=str)
def test_area_is_the_mean_over_a_pixel(factors: tuple[int, int]) -> None:
    image = pixels((28 * factors[0], 28 * factors[1], 3))
    for resize in (regions.resize, regions.resize_reference):
        np.testing.assert_array_equal(resize(image, (28, 28), "area"), by_hand(image, 28, 28))


def test_bilinear_goes_through_the_centres() -> None:
    image = np.array([[[0], [100]]], np.uint8)
    for resize in (regions.resize, regions.resize_reference):
        assert resize(image, (1, 4), "bilinear")[0, :, 0].tolist() == [0, 25, 75, 100]
        assert resize(image, (2, 2), "area")[..., 0].tolist() == [[0, 100], [0, 100]]  # area grows like bilinear


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.sampled_from([1, 3]),
    st.sampled_from(regions.METHODS),
    st.integers(0, 9),
)
def test_opencv_equals_the_reference(
    old: tuple[int, int], new: tuple[int, int], channels: int, method: regions.Method, seed: int
) -> None:
    pytest.importorskip("cv2", reason="the extra 'regions' is not installed")
    image = pixels((*old, channels), seed=seed)
    ours, right = regions.resize(image, new, method), regions.resize_reference(image, new, method)
    assert (ours.shape, ours.dtype) == ((*new, channels), np.uint8)
    difference = np.abs(ours.astype(np.int16) - right)
    assert difference.max() <= 1
    # They may part only at ties: OpenCV's float32 falls on the other side of half a level.
    rows, columns = (regions._weights(before, after, method) for before, after in zip(old, new, strict=True))
    exact = np.einsum("yh,hwc,xw->yxc", rows, image, columns)
    assert np.all(np.abs(exact - np.floor(exact) - 0.5)[difference > 0] < 0.01)


def test_without_opencv() -> None:
    code = """
import sys, importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "cv2" else found(name, *rest)
sys.modules["cv2"] = None
import numpy as np
from defense_vae_fast import regions
image = np.random.default_rng(0).integers(0, 256, (50, 40, 1), np.uint8)
assert (regions.resize(image, (28, 28)) == regions.resize_reference(image, (28, 28))).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=120)


# Boxes


def test_boxes_of_the_networks_size_are_plain_calls(purifier: Purifier) -> None:
    frame = pixels((90, 120))
    boxes = np.array([[0, 0, 28, 28], [92, 62, 120, 90], [10.0, 20.0, 38.0, 48.0]])
    found = purifier.regions(frame, boxes, paste=True)
    crops = np.stack([frame[int(y) : int(y) + 28, int(x) : int(x) + 28, None] for x, y, *_ in boxes])
    expected, scores = purifier(crops, return_score=True)
    np.testing.assert_array_equal(found.images, expected)
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.boxes, boxes.astype(int))
    pasted = frame.copy()
    for image, (left, top, right, bottom) in zip(expected, found.boxes, strict=True):
        pasted[top:bottom, left:right] = image[..., 0]
    np.testing.assert_array_equal(found.frame, pasted)
    assert purifier.regions(frame, boxes).frame is None


@pytest.mark.parametrize("method", regions.METHODS)
def test_boxes_of_any_size_are_resized_there_and_back(purifier: Purifier, method: regions.Method) -> None:
    frame = pixels((200, 300, 1))
    frame.flags.writeable = False
    boxes = [[15.3, 17.9, 100.2, 50.0], [-4, -9, 11, 13], [250, 150, 1000, 170]]
    whole = [[15, 17, 101, 50], [0, 0, 11, 13], [250, 150, 300, 170]]
    found = purifier.regions(frame, boxes, size=(50, 40), resize=method, paste=True)
    assert found.boxes.tolist() == whole
    crops = np.stack(
        [regions.resize(frame[top:bottom, left:right], (28, 28), method) for left, top, right, bottom in whole]
    )
    purified = purifier(crops)
    np.testing.assert_array_equal(found.images, [regions.resize(image, (50, 40), method) for image in purified])
    assert found.frame is not None
    assert found.frame.shape == frame.shape
    changed = np.zeros(frame.shape, bool)
    for image, (left, top, right, bottom) in zip(purified, whole, strict=True):
        changed[top:bottom, left:right] = True
        inside = regions.resize(image, (bottom - top, right - left), method)
        np.testing.assert_array_equal(found.frame[top:bottom, left:right], inside)
    np.testing.assert_array_equal(found.frame[~changed], frame[~changed])


def test_no_boxes(purifier: Purifier) -> None:
    frame = pixels((40, 50))
    found = purifier.regions(frame, [], size=32, paste=True)
    assert (found.images.shape, found.scores.shape, found.boxes.shape) == ((0, 32, 32, 1), (0,), (0, 4))
    np.testing.assert_array_equal(found.frame, frame)
    assert found.frame is not frame


def test_colour() -> None:
    frame = pixels((100, 130, 3))
    with Purifier(random_checkpoint(COLOUR, 4), engine="openvino") as purify:
        side = COLOUR.image_size
        found = purify.regions(frame[:, ::-1], [[0, 0, 90, 80]])
        expected = purify(regions.resize(frame[:80, ::-1][:, :90], (side, side)))
        np.testing.assert_array_equal(found.images[0], expected)
        assert purify.tiles(frame).frame.shape == frame.shape


# Tiles


@pytest.mark.parametrize("overlap", [0, 1, 7, 14, None], ids=str)
@pytest.mark.parametrize("size", [(28, 28), (29, 57), (100, 75)], ids=str)
def test_tiles_that_are_not_changed_give_the_frame(size: tuple[int, int], overlap: int | None) -> None:
    frame = pixels(size)
    tiled = regions.purify_tiles(unchanged, GRAY, frame, overlap)
    np.testing.assert_array_equal(tiled.frame, frame)
    assert tiled.scores.ravel().tolist() == list(range(tiled.scores.size))  # row by row


def test_tiles_are_plain_calls_blended(purifier: Purifier) -> None:
    """One pixel at a time, by the definition: the mean of its tiles, weighted by the distance to their edges."""
    frame = pixels((41, 49))
    tiled = purifier.tiles(frame, overlap=7)
    tops, lefts = [0, 13], [0, 21]
    assert tiled.scores.shape == (2, 2)
    total, weights = np.zeros(frame.shape), np.zeros(frame.shape)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            tile, score = purifier(frame[top : top + 28, left : left + 28].copy(), return_score=True)
            assert tiled.scores[row, column] == np.float32(score)
            for y in range(28):
                for x in range(28):
                    weight = min(y + 1, 28 - y, 8) / 8 * min(x + 1, 28 - x, 8) / 8
                    total[top + y, left + x] += weight * tile[y, x]
                    weights[top + y, left + x] += weight
    assert np.abs(tiled.frame - total / weights).max() <= 0.5 + 1e-3


def test_many_tiles_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_TILES_AT_ONCE", 5)
    counts = []

    def count(images: Array) -> tuple[Array, Array]:
        counts.append(len(images))
        return images, np.zeros(len(images), np.float32)

    frame = pixels((100, 100))
    np.testing.assert_array_equal(regions.purify_tiles(count, GRAY, frame, 7).frame, frame)
    assert counts == [5, 5, 5, 5, 5]


FRAME = pixels((90, 90))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda p: p.regions([[1]], []), TypeError, "expected a uint8 NumPy array.*got list", id="list"),
        pytest.param(lambda p: p.tiles(np.zeros((40, 40))), TypeError, "uint8 NumPy array.*got float64", id="float"),
        pytest.param(lambda p: p.tiles(pixels((40, 40, 3))), ValueError, r"expected \(H, W\) or \(H, W, 1\)", id="RGB"),
        pytest.param(lambda p: p.tiles(FRAME[:27]), ValueError, "at least 28x28 pixels, got 90x27", id="small"),
        pytest.param(lambda p: p.tiles(FRAME, overlap=15), ValueError, "expected an int from 0 to 14", id="overlap"),
        pytest.param(lambda p: p.regions(FRAME, [1, 2, 3, 4]), ValueError, r"boxes: expected .*\(N, 4\)", id="flat"),
        pytest.param(lambda p: p.regions(FRAME, [[0, 0, np.nan, 4]]), ValueError, "expected finite", id="nan"),
        pytest.param(
            lambda p: p.regions(FRAME, [[0, 0, 9, 9], [95, 0, 99, 9]]),
            ValueError,
            r"boxes\[1\]: expected left < right",
            id="outside",
        ),
        pytest.param(lambda p: p.regions(FRAME, [[9, 9, 0, 0]]), ValueError, "boxes are xyxy", id="reversed"),
        pytest.param(lambda p: p.regions(FRAME, [], resize="cubic"), ValueError, "expected 'area' or", id="method"),
        pytest.param(lambda p: p.regions(FRAME, [], size=0), ValueError, "size: expected a positive int", id="size"),
        pytest.param(lambda p: p.regions(FRAME, [], size=(9, 9.0)), ValueError, "size: expected", id="fractional size"),
    ],
)
def test_errors(purifier: Purifier, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(purifier)
