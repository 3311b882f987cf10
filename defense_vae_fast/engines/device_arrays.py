"""Arrays in GPU memory of whichever library the caller uses, without importing that library.

An array exists only where its library has been imported, so its own methods make the results.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np


class DeviceArray(NamedTuple):
    """Where an array lies."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int
    stream: int
    """The caller's current stream, in whose order the array is read and the results are written."""


def view(array: Any) -> DeviceArray:
    """Where a torch tensor or a CuPy array lies.

    Raises:
        TypeError: it is neither.
        ValueError: it is not C-contiguous, or not in GPU memory.
    """
    library = type(array).__module__.partition(".")[0]
    if library == "torch":
        torch: Any = sys.modules["torch"]
        if not array.is_cuda or not array.is_contiguous():
            raise ValueError(f"images: expected a contiguous CUDA tensor, got one on {array.device}; use .contiguous()")
        device = int(array.device.index)
        stream = int(torch.cuda.current_stream(array.device).cuda_stream)
        dtype = np.dtype(str(array.dtype).removeprefix("torch."))
        return DeviceArray(int(array.data_ptr()), tuple(array.shape), dtype, device, stream)
    if library == "cupy":
        cupy: Any = sys.modules["cupy"]
        if not array.flags.c_contiguous:
            raise ValueError("images: expected a C-contiguous array, got a strided one; use cupy.ascontiguousarray")
        with array.device:
            stream = int(cupy.cuda.get_current_stream().ptr)
        return DeviceArray(int(array.data.ptr), tuple(array.shape), array.dtype, int(array.device.id), stream)
    raise TypeError(f"images: expected a torch tensor or a CuPy array, got {type(array).__module__}; convert it first")


class Plane(NamedTuple):
    """Where a uint8 frame lies: pixels of ``channels`` bytes without a gap, rows ``pitch`` bytes apart."""

    address: int
    height: int
    width: int
    channels: int
    pitch: int
    device: int
    stream: int
    """The caller's current stream."""


def on_gpu(array: Any) -> bool:
    """Whether it is a torch tensor or a CuPy array in GPU memory."""
    library = type(array).__module__.partition(".")[0]
    return bool(array.is_cuda) if library == "torch" and hasattr(array, "is_cuda") else library == "cupy"


def plane(frame: Any, channels: int) -> Plane:
    """Where a frame of so many channels lies, which may be a part of a larger one; it is only looked at.

    Raises:
        TypeError: it is not uint8.
        ValueError: another shape than (H, W, channels), or (H, W) of one channel, or gaps between pixels.
    """
    on_torch = type(frame).__module__.partition(".")[0] == "torch"
    if str(frame.dtype).removeprefix("torch.") != "uint8":
        raise TypeError(f"frame: expected uint8 in 0..255, got {frame.dtype}; convert it")
    shape = tuple(frame.shape)
    strides = tuple(frame.stride()) if on_torch else tuple(frame.strides)
    if len(shape) == 2 and channels == 1:
        shape, strides = (*shape, 1), (*strides, 1)
    if len(shape) != 3 or shape[2] != channels or 0 in shape:
        gray = "(H, W) or " if channels == 1 else ""
        raise ValueError(f"frame: expected {gray}(H, W, {channels}), got {tuple(frame.shape)}; convert its colours")
    height, width, _ = shape
    gaps = (channels > 1 and strides[2] != 1) or (width > 1 and strides[1] != channels)
    if gaps or (height > 1 and strides[0] < width * channels):
        raise ValueError(
            f"frame: expected pixels one after the other in rows from top to bottom, got strides {strides}; "
            "make it contiguous"
        )
    if on_torch:
        address, device = int(frame.data_ptr()), _ordinal(frame.device)
        stream = int(sys.modules["torch"].cuda.current_stream(frame.device).cuda_stream)
    else:
        address, device = int(frame.data.ptr), int(frame.device.id)
        with frame.device:
            stream = int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return Plane(address, height, width, channels, max(strides[0], width * channels), device, stream)


def _ordinal(device: Any) -> int:
    return int(device.index)


def send(values: np.ndarray[Any, Any], like: Any) -> Any:
    """A copy of host values in an array of the kind and on the device of ``like``, in its current stream's order."""
    if type(like).__module__.partition(".")[0] == "torch":
        return sys.modules["torch"].from_numpy(values).to(like.device)
    with like.device:
        return sys.modules["cupy"].asarray(values)


def empty(like: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A fresh C-contiguous array of the kind and on the device of ``like``."""
    if type(like).__module__.partition(".")[0] == "torch":
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype.name))
    with like.device:
        return sys.modules["cupy"].empty(shape, dtype)
