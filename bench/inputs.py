"""The images that every contestant is timed on: the same ones, made from a seed in every process."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["uint8", "float32"]
ROTATION = 8  # distinct batches that take turns, so that no contestant is timed on one that lies in its caches


def batches(
    batch: int, shape: tuple[int, int, int], kind: Kind = "uint8", count: int = ROTATION
) -> list[npt.NDArray[Any]]:
    """``count`` batches of random images of ``shape`` (C, H, W): uint8 (N, H, W, C) or float32 (N, C, H, W)."""
    channels, height, width = shape
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, batch, height, width, channels), dtype=np.uint8)
    return [batch_ if kind == "uint8" else as_float(batch_) for batch_ in pixels]


def as_float(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 (N, H, W, C) -> C-contiguous float32 (N, C, H, W) in [0, 1]."""
    scaled: npt.NDArray[np.float32] = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    return scaled
