"""Whole frames for a network of small images: boxes cut out and resized, or the frame in overlapping tiles.

:func:`resize` is OpenCV's where that is installed (``pip install 'defense-vae-fast[regions]'``) and else
:func:`resize_reference`, a plain NumPy one that says what is meant; they differ by a grey level where a sum of weights
rounds, and nowhere else. Frames in GPU memory are for :mod:`defense_vae_fast.regions_on_gpu`, whose kernels have
:func:`crop_boxes`, :func:`paste_boxes` and :func:`blend_tiles` for their specification.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from defense_vae_fast.architecture import VAEConfig

Array = npt.NDArray[Any]
Method = Literal["area", "bilinear"]
METHODS: tuple[Method, ...] = ("area", "bilinear")
Purify = Callable[[Array], tuple[Array, Array]]  # uint8 (N, H, W, C) -> the same purified, and scores (N,)

_TILES_AT_ONCE = 1024  # bounds the memory of a frame's tiles on their way


class Regions(NamedTuple):
    """Purified boxes of a frame."""

    images: Array
    """uint8 (N, height, width, C)."""
    scores: Array
    """float32 (N,): mean |x - x_hat| of each crop at the network's size."""
    boxes: Array
    """int64 (N, 4): the pixels that were cut out, as (left, top, right, bottom), the last two exclusive."""
    frame: Array | None
    """A copy of the frame with the purified boxes in it, later ones over earlier ones; None unless asked for."""


class Tiles(NamedTuple):
    """A frame purified in tiles."""

    frame: Array
    """The purified frame, like the one handed in."""
    scores: Array
    """float32 (rows, columns): mean |x - x_hat| of each tile; a map of where something was found."""


def purify_regions(
    purify: Purify,
    config: VAEConfig,
    frame: Array,
    boxes: Any,
    size: int | tuple[int, int] | None,
    method: Method,
    paste: bool,
) -> Regions:
    """What :meth:`Purifier.regions` does; ``purify`` is the network of ``config``."""
    pixels = _frame(frame, config)
    places = check_boxes(boxes, pixels.shape[:2])
    side = config.image_size
    height, width = check_size(side if size is None else size)
    check_method(method)
    crops = crop_boxes(pixels, places, (side, side), method)
    if len(places):
        purified, scores = purify(crops)
    else:
        purified, scores = crops, np.empty(0, np.float32)
    result = paste_boxes(pixels, places, purified, method).reshape(frame.shape) if paste else None
    images = purified
    if (height, width) != (side, side):
        images = np.empty((len(places), height, width, config.channels), np.uint8)
        for image, small in zip(images, purified, strict=True):
            image[...] = resize(small, (height, width), method)
    return Regions(images, scores, places, result)


def purify_tiles(purify: Purify, config: VAEConfig, frame: Array, overlap: int | None) -> Tiles:
    """What :meth:`Purifier.tiles` does; ``purify`` is the network of ``config``."""
    pixels = _frame(frame, config)
    side = config.image_size
    overlap = check_overlap(overlap, side)
    places, grid = tile_boxes(pixels.shape[:2], side, overlap)
    tiles = np.empty((len(places), side, side, config.channels), np.uint8)
    scores = np.empty(len(places), np.float32)
    for first in range(0, len(places), _TILES_AT_ONCE):
        some = slice(first, first + _TILES_AT_ONCE)
        tiles[some], scores[some] = purify(crop_boxes(pixels, places[some], (side, side)))
    return Tiles(blend_tiles(tiles, pixels.shape[:2], overlap).reshape(frame.shape), scores.reshape(grid))


def crop_boxes(frame: Array, boxes: Array, size: tuple[int, int], method: Method = "area") -> Array:
    """Boxes (N, 4) of a uint8 frame (H, W, C), resized: (N, height, width, C)."""
    crops = np.empty((len(boxes), *size, frame.shape[2]), np.uint8)
    for crop, (left, top, right, bottom) in zip(crops, boxes, strict=True):
        crop[...] = resize(frame[top:bottom, left:right], size, method)
    return crops


def paste_boxes(frame: Array, boxes: Array, images: Array, method: Method) -> Array:
    """A copy of the frame with images (N, side, side, C) resized into its boxes, later ones over earlier ones."""
    result: Array = frame.copy()
    for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
        result[top:bottom, left:right] = resize(image, (bottom - top, right - left), method)
    return result


def blend_tiles(tiles: Array, shape: tuple[int, int], overlap: int) -> Array:
    """The frame (height, width, C) that uint8 tiles (N, side, side, C) at :func:`tile_boxes` make together."""
    side, channels = tiles.shape[2:]
    height, width = shape
    ramp = _ramp(side, overlap)
    weight = (ramp[:, None] * ramp)[..., None]
    total = np.zeros((height, width, channels), np.float32)
    for tile, (left, top, right, bottom) in zip(tiles, tile_boxes(shape, side, overlap)[0], strict=True):
        total[top:bottom, left:right] += weight * tile
    # The weights of a pixel's tiles are those of its row times those of its column.
    rows, columns = (_coverage(length, _starts(length, side, overlap), ramp) for length in shape)
    total /= (rows[:, None] * columns)[..., None]
    result: Array = np.rint(total, out=total).astype(np.uint8)
    return result


def tile_boxes(shape: tuple[int, ...], side: int, overlap: int) -> tuple[Array, tuple[int, int]]:
    """The tiles of a frame of ``shape`` (height, width), row by row: int64 (N, 4), and (rows, columns).

    Raises:
        ValueError: the frame is smaller than a tile.
    """
    height, width = shape
    if min(height, width) < side:
        raise ValueError(
            f"frame: expected at least {side}x{side} pixels, got {width}x{height}; pad it, or use Purifier.regions"
        )
    tops, lefts = _starts(height, side, overlap), _starts(width, side, overlap)
    places = np.array([(left, top, left + side, top + side) for top in tops for left in lefts], np.int64)
    return places, (len(tops), len(lefts))


def check_overlap(overlap: int | None, side: int) -> int:
    """``overlap`` itself, or the default where it is None."""
    overlap = side // 4 if overlap is None else overlap
    if type(overlap) is not int or not 0 <= overlap <= side // 2:
        raise ValueError(f"overlap: expected an int from 0 to {side // 2}, half a tile, got {overlap!r}")
    return overlap


def resize(image: Array, size: tuple[int, int], method: Method = "area") -> Array:
    """uint8 (H, W, C) -> (height, width, C), by OpenCV where it is installed; see :func:`resize_reference`."""
    if image.shape[:2] == size:
        return image
    cv2 = _opencv()
    if cv2 is None:
        return resize_reference(image, size, method)
    values = image.astype(np.float32)  # in uint8 OpenCV rounds its weights, and after each axis
    for axis in (1, 0):
        shrinks = size[axis] < values.shape[axis]
        target = [values.shape[0], values.shape[1]]
        target[axis] = size[axis]
        kind = cv2.INTER_AREA if method == "area" and shrinks else cv2.INTER_LINEAR
        values = cv2.resize(values, (target[1], target[0]), interpolation=kind).reshape(*target, -1)
    return np.rint(values).astype(np.uint8)


def resize_reference(image: Array, size: tuple[int, int], method: Method = "area") -> Array:
    """The meaning of :func:`resize`: each axis by itself, a matrix product, rounded once at the end.

    "area": along an axis that shrinks, the mean over the interval that a new pixel covers; along one that grows, as
    "bilinear": between the centres of the two nearest pixels, the border repeated.
    """
    rows = _weights(image.shape[0], size[0], method)
    columns = _weights(image.shape[1], size[1], method)
    values: Array = np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True)
    return np.rint(values).astype(np.uint8)


def _weights(old: int, new: int, method: Method) -> Array:
    """(new, old) float64: how much of each old pixel a new one takes."""
    scale = old / new
    weights = np.zeros((new, old))
    place = np.arange(old)
    for index in range(new):
        if method == "area" and new < old:
            covered = np.minimum(place + 1, (index + 1) * scale) - np.maximum(place, index * scale)
            weights[index] = np.maximum(covered, 0) / scale
        else:
            centre = min(max((index + 0.5) * scale - 0.5, 0), old - 1)
            weights[index] = np.maximum(0, 1 - np.abs(place - centre))
    return weights


@functools.cache
def _opencv() -> Any:
    """The module, or None where it is not installed."""
    if importlib.util.find_spec("cv2") is None:
        return None
    import cv2

    return cv2


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: ``overlap`` pixels shared, the last one flush with the edge."""
    return [*range(0, length - side, side - overlap), length - side]


def _ramp(side: int, overlap: int) -> Array:
    """(side,) float32 weights that rise over the overlap, are 1 in the middle, and fall again."""
    place = np.arange(side)
    nearest = np.minimum(place, side - 1 - place) + 1
    ramp: Array = np.minimum(nearest, overlap + 1) / np.float32(overlap + 1)
    return ramp.astype(np.float32)


def _coverage(length: int, starts: list[int], ramp: Array) -> Array:
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + len(ramp)] += ramp
    return total


def _frame(frame: Any, config: VAEConfig) -> Array:
    """(H, W, C) view of a frame of the network's channels."""
    channels = config.channels
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise TypeError(f"frame: expected a uint8 NumPy array in 0..255, got {got}; convert it")
    pixels = frame[..., None] if frame.ndim == 2 and channels == 1 else frame
    if pixels.ndim != 3 or pixels.shape[2] != channels or 0 in pixels.shape:
        gray = "(H, W) or " if channels == 1 else ""
        raise ValueError(f"frame: expected {gray}(H, W, {channels}), got {frame.shape}; convert its colours or layout")
    return pixels


def check_boxes(boxes: Any, shape: tuple[int, ...]) -> Array:
    """(N, 4) boxes -> int64 (N, 4) whole pixels inside a frame of ``shape`` (H, W).

    Raises:
        ValueError: a wrong shape, or a box without a pixel in the frame.
    """
    values = np.asarray(boxes, np.float64)
    if values.size == 0:
        values = values.reshape(0, 4)
    if values.ndim != 2 or values.shape[1] != 4 or not np.isfinite(values).all():
        raise ValueError(f"boxes: expected finite numbers of the shape (N, 4), xyxy in pixels, got {values.shape}")
    height, width = shape[:2]
    # Outwards, so that nothing of a box is lost; detectors also point a little beyond the frame.
    low = np.floor(values[:, :2]).clip(0, [width, height])
    high = np.ceil(values[:, 2:]).clip(0, [width, height])
    places = np.concatenate([low, high], axis=1).astype(np.int64)
    if len(wrong := np.flatnonzero((places[:, 0] >= places[:, 2]) | (places[:, 1] >= places[:, 3]))):
        raise ValueError(
            f"boxes[{wrong[0]}]: expected left < right and top < bottom within {width}x{height} pixels, "
            f"got {values[wrong[0]].tolist()}; boxes are xyxy, drop those outside the frame"
        )
    return places


def check_size(size: Any) -> tuple[int, int]:
    """(height, width) of what comes back."""
    sides = size if isinstance(size, tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"size: expected a positive int, or (height, width) of such, got {size!r}")
    return sides


def check_method(method: str) -> None:
    """Raise a ValueError unless it is one of :data:`METHODS`."""
    if method not in METHODS:
        raise ValueError(f"resize: expected 'area' or 'bilinear', got {method!r}")
