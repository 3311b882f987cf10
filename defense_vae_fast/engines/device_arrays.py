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


def empty(like: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A fresh C-contiguous array of the kind and on the device of ``like``."""
    if type(like).__module__.partition(".")[0] == "torch":
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype.name))
    with like.device:
        return sys.modules["cupy"].empty(shape, dtype)
