"""Camera frames in device memory, and the numpy twins of the kernels that read and write them.

The kernels are in ``csrc/frames.cu``; a twin has its kernel's name, says what the kernel must compute, and is what the
kernel is tested against. The twins also serve frames in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Order = Literal["grey", "rgb", "bgr"]
Filter = Literal["bilinear", "area"]

ORDERS: tuple[str, ...] = get_args(Order)
FILTERS: tuple[str, ...] = get_args(Filter)
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey: ITU-R BT.601, as in PIL and OpenCV."""

TABLE = np.dtype([("address", "u8"), ("height", "i4"), ("width", "i4"), ("pitch", "i4"), ("order", "i4")])
"""A row of the table of frames, as ``struct Frame`` in ``csrc/frames.cu``: 24 bytes."""

_MAX_SIDE = 1 << 15  # a frame of more pixels than an int counts does not come out of a camera
Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Frame:
    """A uint8 frame in device memory.

    Args:
        address: device address of its first byte.
        height: rows.
        width: pixels in a row.
        pitch: bytes from one row to the next; 0 when they follow each other without a gap.
        order: "grey" (one byte a pixel), "rgb" or "bgr" (three).

    Raises:
        ValueError: a value is out of range, or rows overlap.
    """

    address: int
    height: int
    width: int
    pitch: int = 0
    order: Order = "rgb"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"Frame.order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        for name in ("height", "width"):
            if not 1 <= getattr(self, name) <= _MAX_SIDE:
                raise ValueError(f"Frame.{name}: expected 1 to {_MAX_SIDE} pixels, got {getattr(self, name)}")
        if self.address <= 0:
            raise ValueError(f"Frame.address: expected a device address, got {self.address}")
        row = self.width * self.bytes_per_pixel
        if self.pitch == 0:
            object.__setattr__(self, "pitch", row)
        if not row <= self.pitch < 1 << 31:
            raise ValueError(f"Frame.pitch: expected at least {row} bytes, those of a row, or 0, got {self.pitch}")

    @property
    def bytes_per_pixel(self) -> int:
        """1 for grey, 3 for colours."""
        return 1 if self.order == "grey" else 3

    @classmethod
    def of(cls, array: Any, order: Order | None = None) -> Frame:
        """The frame that a uint8 array (H, W) or (H, W, 3) in device memory is; it must outlive its use.

        Args:
            array: has ``__cuda_array_interface__``; rows may be any distance apart, pixels follow each other.
            order: "rgb" or "bgr" for three channels, which nothing in an array tells; left out for grey.

        Raises:
            ValueError: another dtype, shape, layout or order.
        """
        interface = array.__cuda_array_interface__
        shape = tuple(interface["shape"])
        channels = 1 if len(shape) == 2 else shape[2] if len(shape) == 3 else 0
        if interface["typestr"] != "|u1" or channels not in (1, 3):
            got = f"{interface['typestr']} {shape}"
            raise ValueError(f"frame: expected uint8 (H, W), (H, W, 1) or (H, W, 3), got {got}; convert it")
        if (order is None or order == "grey") != (channels == 1):
            raise ValueError(
                f"frame: expected order 'rgb' or 'bgr' for three channels and none for one, got {order!r} for {shape}"
            )
        strides = interface.get("strides") or (shape[1] * channels, channels, 1)[: len(shape)]
        if tuple(strides[1:]) != (channels, 1)[: len(shape) - 1] or strides[0] < shape[1] * channels:
            raise ValueError(f"frame: expected pixels one after the other in a row, got the strides {strides}")
        return cls(int(interface["data"][0]), shape[0], shape[1], int(strides[0]), order or "grey")


def pack(frames: Sequence[Frame]) -> npt.NDArray[np.void]:
    """The table of frames as the kernels read it."""
    rows = [(f.address, f.height, f.width, f.pitch, ORDERS.index(f.order)) for f in frames]
    return np.array(rows, TABLE)


def gather_frames(frames: Sequence[tuple[Bytes, Order]], channels: int, size: int, filter: Filter) -> Halves:
    """uint8 frames (H, W) or (H, W, 3) with their order -> float16 (N, channels, size, size) in [0, 1].

    A colour frame becomes grey by :data:`LUMA`, a grey one three equal channels. "bilinear" takes the four neighbours
    (half-pixel centres, edges repeated), "area" the mean over the area that a pixel covers; a frame of the network's
    size passes unchanged.
    """
    images = [_resize(_planes(frame, order, channels), size, size, filter) for frame, order in frames]
    return (np.stack(images) / 255).astype(np.float16)


def scatter_frames(purified: Halves, frames: Sequence[tuple[Bytes, Order]], filter: Filter) -> None:
    """float16 (N, channels, size, size) in [0, 1] -> uint8 frames of any size, resized and rounded to nearest even."""
    for image, (frame, order) in zip(purified, frames, strict=True):
        values = 255 * _resize(image.astype(np.float64), frame.shape[0], frame.shape[1], filter)
        if order == "grey":
            frame[...] = np.rint(values[0] if len(values) == 1 else np.tensordot(LUMA, values, 1))
        else:
            values = np.broadcast_to(values, (3, *values.shape[1:]))
            frame[...] = np.rint(values if order == "rgb" else values[::-1]).transpose(1, 2, 0)


def reconstruction_error(images: Halves, purified: Halves) -> npt.NDArray[np.float32]:
    """float16 (N, ...) twice -> float32 (N,): mean |images - purified| an image."""
    difference = np.abs(images.astype(np.float64) - purified.astype(np.float64))
    scores: npt.NDArray[np.float32] = difference.reshape(len(images), -1).mean(1).astype(np.float32)
    return scores


def _planes(frame: Bytes, order: Order, channels: int) -> npt.NDArray[np.float64]:
    if order == "grey":
        return np.broadcast_to(frame.astype(np.float64), (channels, *frame.shape))
    colours = (frame if order == "rgb" else frame[..., ::-1]).transpose(2, 0, 1).astype(np.float64)
    return np.tensordot(LUMA, colours, 1)[None] if channels == 1 else colours


def _resize(planes: npt.NDArray[np.float64], height: int, width: int, filter: Filter) -> npt.NDArray[np.float64]:
    weights = _area_weights if filter == "area" else _linear_weights
    if planes.shape[1:] == (height, width):
        return planes
    resized: npt.NDArray[np.float64] = weights(planes.shape[1], height) @ planes @ weights(planes.shape[2], width).T
    return resized


def _linear_weights(source: int, target: int) -> npt.NDArray[np.float64]:
    """(target, source): the share of each source pixel in each target pixel."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    first = centres.astype(int)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), first), 1 - (centres - first))
    np.add.at(weights, (np.arange(target), np.minimum(first + 1, source - 1)), centres - first)
    return weights


def _area_weights(source: int, target: int) -> npt.NDArray[np.float64]:
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    covered = np.minimum(pixels + 1, edges[1:, None]) - np.maximum(pixels, edges[:-1, None])
    weights: npt.NDArray[np.float64] = np.clip(covered, 0, None) / (source / target)
    return weights
