"""Boxes and tiles of a frame in GPU memory, by the kernels of ``csrc/regions.cu``: the frame never leaves the GPU.

What is computed is said by :mod:`defense_vae_fast.regions`; resized values may differ from it by a grey level where a
sum rounds, blended tiles do not. Kernels are launched on the caller's current stream, and arrays are made by the
caller's library, so everything keeps the order that the caller knows, and nothing waits for the GPU.
"""

from __future__ import annotations

from ctypes import c_void_p
from typing import Any

import numpy as np

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.cuda import BLOCK, REGIONS, Kernels
from defense_vae_fast.engines import device_arrays
from defense_vae_fast.engines.device_arrays import Plane
from defense_vae_fast.regions import (
    METHODS,
    Method,
    Purify,
    Regions,
    Tiles,
    check_boxes,
    check_method,
    check_overlap,
    check_size,
    tile_boxes,
)

_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_BOX_BYTES = 16
_MOST_ROWS = 65535  # of blocks in a grid


def purify_regions(
    purify: Purify,
    config: VAEConfig,
    frame: Any,
    boxes: Any,
    size: int | tuple[int, int] | None,
    method: Method,
    paste: bool,
) -> Regions:
    """:func:`regions.purify_regions` for a torch or CuPy frame on a GPU; the result's ``boxes`` are NumPy's."""
    source = _plane(frame, config)
    places = check_boxes(boxes, (source.height, source.width))
    side = config.image_size
    wanted = check_size(side if size is None else size)
    check_method(method)
    table = device_arrays.send(places.astype(np.int32), frame)
    purified = _crop(frame, source, table, (side, side), method)
    scores = device_arrays.empty(frame, (0,), _FLOAT32)
    if len(places):
        purified, scores = purify(purified)
    result = _paste(frame, source, table, purified, method) if paste else None
    images = purified
    if wanted != (side, side):
        # The purified images, one above the other, are a frame of their own.
        tops = np.arange(0, len(places) * side, side)
        whole = np.stack([0 * tops, tops, 0 * tops + side, tops + side], axis=1).astype(np.int32)
        column = Plane(
            _address(purified), len(tops) * side, side, source.channels, side * source.channels, source.device,
            source.stream,
        )  # fmt: skip
        images = _crop(frame, column, device_arrays.send(whole, frame), wanted, method)
    return Regions(images, scores, places, result)


def purify_tiles(purify: Purify, config: VAEConfig, frame: Any, overlap: int | None) -> Tiles:
    """:func:`regions.purify_tiles` for a torch or CuPy frame on a GPU."""
    source = _plane(frame, config)
    side = config.image_size
    overlap = check_overlap(overlap, side)
    places, grid = tile_boxes((source.height, source.width), side, overlap)
    tiles = _crop(frame, source, device_arrays.send(places.astype(np.int32), frame), (side, side), "area")
    purified, scores = purify(tiles)
    result = device_arrays.empty(frame, tuple(frame.shape), _UINT8)
    _launch(
        source, "blend_tiles", _blocks(source.width, source.height), _pointer(purified), side, overlap,
        source.channels, _pointer(result), source.height, source.width,
    )  # fmt: skip
    return Tiles(result, scores.reshape(grid))


def _plane(frame: Any, config: VAEConfig) -> Plane:
    source = device_arrays.plane(frame, config.channels)
    if max(source.height, source.width) > _MOST_ROWS:
        raise ValueError(f"frame: expected at most {_MOST_ROWS} pixels a side, got {source.width}x{source.height}")
    return source


def _crop(frame: Any, source: Plane, table: Any, size: tuple[int, int], method: Method) -> Any:
    """Boxes of ``source`` resized to ``size``: uint8 (N, height, width, C)."""
    count = len(table)
    crops = device_arrays.empty(frame, (count, *size, source.channels), _UINT8)
    image = size[0] * size[1] * source.channels
    for first in range(0, count, _MOST_ROWS):
        _launch(
            source, "crop_boxes", _blocks(size[0] * size[1], min(count - first, _MOST_ROWS)), c_void_p(source.address),
            source.pitch, source.channels, _pointer(table, first * _BOX_BYTES), _pointer(crops, first * image), *size,
            METHODS.index(method),
        )  # fmt: skip
    return crops


def _paste(frame: Any, source: Plane, table: Any, images: Any, method: Method) -> Any:
    """A copy of the frame with the images resized into their boxes."""
    result = device_arrays.empty(frame, tuple(frame.shape), _UINT8)
    _launch(
        source, "paste_boxes", _blocks(source.width, source.height), c_void_p(source.address), source.pitch,
        source.channels, _pointer(table), len(table), _pointer(images), int(images.shape[1]), _pointer(result),
        source.width, METHODS.index(method),
    )  # fmt: skip
    return result


def _launch(source: Plane, name: str, grid: tuple[int, int], *arguments: int | c_void_p) -> None:
    Kernels.get(source.device, REGIONS).launch(name, grid, source.stream, *arguments)


def _blocks(pixels: int, rows: int) -> tuple[int, int]:
    return -(-pixels // BLOCK), rows


def _pointer(array: Any, offset: int = 0) -> c_void_p:
    return c_void_p(_address(array) + offset)


def _address(array: Any) -> int:
    return device_arrays.view(array).address
