"""What callers may hand in and what they get back.

Two forms of images are understood, and nothing is guessed:

- uint8, channels last, 0..255: (H, W) for one-channel networks, (H, W, C), (N, H, W, C);
- floating, channels first, [0, 1]: (C, H, W), (N, C, H, W), as float16, float32 or float64 (torch: bfloat16 too).

Three channels are red, green, blue, in this order. The images may be NumPy arrays, torch tensors, CuPy arrays, PIL
images, a list or tuple of PIL images, or any object with ``__dlpack__`` or ``__cuda_array_interface__``; strides, byte
order and write protection do not matter. :meth:`ImageReader.read` turns all of them into the two kinds of array that an
engine takes, and remembers how to turn the results back.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from defense_vae_fast.architecture import VAEConfig

Array = npt.NDArray[Any]

_UINT8 = np.dtype(np.uint8)
_FLOAT32 = np.dtype(np.float32)
# The bits of a float in [0, 1], read as an unsigned integer, are at most those of 1.0; negative numbers, infinities and
# NaN of either sign are above. So one integer maximum, which numpy vectorises, checks everything that can be wrong.
_BITS: dict[np.dtype[Any], tuple[np.dtype[Any], int]] = {
    np.dtype(f"f{size}"): (np.dtype(f"u{size}"), int(np.ones(1, f"f{size}").view(f"u{size}")[0])) for size in (2, 4, 8)
}
_PIL_MODES = {1: "L", 3: "RGB"}
_DLPACK_HOST = frozenset({1, 3, 11, 13})  # kDLCPU, kDLCUDAHost, kDLROCMHost, kDLCUDAManaged: memory the CPU can read
_KINDS = (
    "a NumPy array, a torch tensor, a CuPy array, a PIL image, a list of PIL images, "
    "or an object with __dlpack__ or __cuda_array_interface__"
)


def _as_is(values: Array) -> Any:
    return values


class Batch(NamedTuple):
    """Images as an engine takes them, and the way back."""

    array: Any
    """C-contiguous uint8 (N, H, W, C) or float32 (N, C, H, W), N at least 1, checked. It may be the caller's memory.
    A NumPy array, or with ``on_device`` a torch tensor or CuPy array."""
    single: bool
    """The caller handed in one image, not a batch."""
    images: Callable[[Any], Any]
    """Purified images, an array like ``array``, in the caller's kind, dtype, shape and device."""
    scores: Callable[[Any], Any]
    """(N,) float32 scores in the caller's kind and device; for PIL images a NumPy array."""
    on_device: bool = False
    """``array`` and the results are arrays in the engine's own memory, for its ``run_tensor``."""


class ImageReader:
    """Reads images for one network and raises on everything that is not exactly what it takes.

    Args:
        config: the network, which fixes the images' size and channels.
        tensor_device: a torch device, "cuda:0" for instance, whose tensors are to stay there; None to bring all to the
            host. Those of another device of the same type go through the host.
        cupy_device: a CUDA device by its number, whose CuPy arrays are to stay there; None to bring all to the host.
    """

    def __init__(self, config: VAEConfig, tensor_device: str | None = None, cupy_device: int | None = None) -> None:
        channels, height, width = config.image_shape
        self._tensor_device = tensor_device
        self._cupy_device = cupy_device
        self._channels = channels
        self._chw = (channels, height, width)
        self._hwc = (height, width, channels)
        self._hw = (height, width)

    def read(self, images: Any) -> Batch:
        """Check ``images`` and prepare them for an engine, without a copy where the memory already fits.

        Raises:
            TypeError: the kind of object or its dtype is not one of those above.
            ValueError: the shape is not the network's, the batch is empty, a value is NaN, infinite or outside [0, 1],
                a PIL image has the wrong mode or is damaged, or a tensor requires a gradient.
        """
        if type(images) is np.ndarray:
            return self._read_numpy(images)
        if isinstance(images, np.ndarray):
            return self._read_numpy(_plain(images))
        if isinstance(images, list | tuple):
            return self._read_pil_sequence(images)
        if (torch := _module_of("torch", "Tensor", images)) is not None:
            return self._read_torch(torch, images)
        if (pil := _module_of("PIL.Image", "Image", images)) is not None:
            array = self._pil_array(images, "the image")
            return Batch(self._check(array), True, lambda purified: _pil_image(pil, purified[0]), _as_is)
        if (cupy := _module_of("cupy", "ndarray", images)) is not None:
            return self._read_cupy(cupy, images)
        kind = type(images)  # protocols are looked up on the type: the class ndarray itself is no array
        if hasattr(kind, "__dlpack_device__"):
            on_host = _dlpack_device_type(images) in _DLPACK_HOST
            return self._read_dlpack(images) if on_host else self._read_device_array(images)
        if hasattr(kind, "__cuda_array_interface__"):
            return self._read_device_array(images)
        if hasattr(kind, "__dlpack__"):
            raise TypeError(
                f"images: expected an object with __dlpack__ and __dlpack_device__, got {_type_name(images)}, which "
                "has no __dlpack_device__ to say where its memory is; add it, or convert it with numpy.asarray"
            )
        raise TypeError(f"images: expected {_KINDS}, got {_type_name(images)}; convert it with numpy.asarray first")

    def _read_numpy(self, images: Array) -> Batch:
        shape, dtype = images.shape, images.dtype
        if dtype is _UINT8 and shape == self._hwc:
            # The shortest way for a frame of a stream: beside an engine that empties the caches every step costs more.
            return Batch(np.ascontiguousarray(images[None]), True, lambda purified: purified.reshape(shape), _as_is)
        array = self._check(images)
        if dtype == array.dtype:
            return Batch(array, len(shape) < 4, lambda purified: purified.reshape(shape), _as_is)
        return Batch(array, len(shape) < 4, lambda purified: purified.reshape(shape).astype(dtype), _as_is)

    def _check(self, images: Array) -> Array:
        """``images`` as C-contiguous, aligned, native uint8 (N, H, W, C) or float32 (N, C, H, W)."""
        dtype, shape = images.dtype, images.shape
        if dtype != _UINT8 and (dtype.kind != "f" or dtype.itemsize > 8):
            raise _dtype_error(str(dtype))
        tail = self._check_shape(shape, dtype == _UINT8)
        if len(shape) < 4:
            images = images.reshape(1, *tail)
        if dtype == _UINT8:
            return np.ascontiguousarray(images)
        if not dtype.isnative:
            images = images.astype(dtype.newbyteorder("="))
        _check_values(images)
        images = np.ascontiguousarray(images, dtype=_FLOAT32)
        return images if images.flags.aligned else images.copy()

    def _check_shape(self, shape: tuple[int, ...], is_uint8: bool) -> tuple[int, int, int]:
        """The shape of one image in a batch of this shape."""
        tail = self._hwc if is_uint8 else self._chw
        if shape[-3:] != tail or len(shape) > 4:
            if not (is_uint8 and shape == self._hw and self._channels == 1):
                raise self._shape_error(shape, is_uint8=is_uint8)
        elif not shape[0]:
            raise ValueError(f"images: expected at least one image, got the shape {shape}; skip empty batches")
        return tail

    def _read_pil_sequence(self, images: list[Any] | tuple[Any, ...]) -> Batch:
        if not images:
            raise ValueError(f"images: expected at least one image, got an empty {_type_name(images)}; skip it")
        for index, image in enumerate(images):
            pil = _module_of("PIL.Image", "Image", image)
            if pil is None:
                raise TypeError(
                    f"images[{index}]: expected a list or tuple of PIL images, got {_type_name(image)} in it; "
                    "make one array of the images, with numpy.stack for instance"
                )
        make: type = tuple if isinstance(images, tuple) else list
        array = np.stack([self._pil_array(image, f"images[{index}]") for index, image in enumerate(images)])
        return Batch(self._check(array), False, lambda purified: make(_pil_image(pil, one) for one in purified), _as_is)

    def _pil_array(self, image: Any, name: str) -> Array:
        """(H, W, C) pixels of a PIL image that has the network's mode and size."""
        mode = _PIL_MODES.get(self._channels)
        if mode is None:
            raise TypeError(
                f"{name}: expected an array, got a PIL image, which has no mode for {self._channels} plain channels; "
                "pass a uint8 array of the shape (N, H, W, C)"
            )
        if image.mode != mode:
            raise ValueError(
                f'{name}: expected a PIL image of mode {mode}, got mode {image.mode}; use .convert("{mode}")'
            )
        if image.size != self._hw:
            got = f"{image.size[0]}x{image.size[1]}"
            raise ValueError(f"{name}: expected {self._size()} pixels, got {got}; resize or crop it first")
        try:
            image.load()  # of an opened file PIL reads the pixels only now, and damage shows in many ways
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(f"{name}: expected a readable image, got the error {error}; replace the file") from error
        return np.asarray(image).reshape(self._hwc)

    def _read_torch(self, torch: Any, images: Any) -> Batch:
        _check_tensor(torch, images)
        dtype, shape, device = images.dtype, tuple(images.shape), images.device
        single = images.ndim < 4
        # With one channel both layouts are "channels_last"; then the plain one is meant.
        channels_last = not (single or images.is_contiguous()) and images.is_contiguous(
            memory_format=torch.channels_last
        )
        layout = torch.channels_last if channels_last else torch.preserve_format

        def restore(purified: Any) -> Any:
            return purified.reshape(shape).to(device=device, dtype=dtype, memory_format=layout)

        if str(device) == self._tensor_device:
            is_uint8 = dtype == torch.uint8
            tail = self._check_shape(shape, is_uint8)
            images = images.detach().reshape(-1, *tail)
            if not is_uint8:
                _check_tensor_values(torch, images)
                images = images.float()
            return Batch(images.contiguous(), single, restore, _as_is, on_device=True)
        host = images.detach().cpu().resolve_neg()
        # NumPy has no bfloat16; every one of its values is a float32.
        array = self._check((host.float() if dtype == torch.bfloat16 else host).numpy())
        return Batch(
            array,
            single,
            lambda purified: restore(torch.from_numpy(purified)),
            lambda scores: torch.from_numpy(scores).to(device),
        )

    def _read_cupy(self, cupy: Any, images: Any) -> Batch:
        if images.device.id == self._cupy_device:
            return self._read_cupy_here(cupy, images)
        batch = self._read_numpy(cupy.asnumpy(images))
        device = images.device

        def send(values: Array) -> Any:
            with device:
                return cupy.asarray(values)

        return batch._replace(images=lambda purified: send(batch.images(purified)), scores=send)

    def _read_cupy_here(self, cupy: Any, images: Any) -> Batch:
        dtype, shape = images.dtype, images.shape
        if dtype != _UINT8 and (dtype.kind != "f" or dtype.itemsize > 8):
            raise _dtype_error(str(dtype))
        tail = self._check_shape(shape, dtype == _UINT8)
        if dtype != _UINT8:
            low, high = float(images.min()), float(images.max())  # NaN passes through both; this waits for two numbers
            if not (low >= 0.0 and high <= 1.0):
                raise _value_error(low, high)
        array = cupy.ascontiguousarray(images.reshape(-1, *tail), dtype=_UINT8 if dtype == _UINT8 else _FLOAT32)

        def restore(purified: Any) -> Any:
            return purified.reshape(shape).astype(dtype, copy=False)

        return Batch(array, len(shape) < 4, restore, _as_is, on_device=True)

    def _read_dlpack(self, images: Any) -> Batch:
        """An array of any library in host memory; its own ``from_dlpack`` makes the result, NumPy where it has none."""
        try:
            array = np.from_dlpack(images)
        except Exception as error:  # a foreign object may raise anything, and NumPy adds its own
            raise TypeError(
                f"images: expected a {_type_name(images)} that NumPy can read through DLPack, got the error {error!s}; "
                "pass a plain dense uint8 or float32 array"
            ) from error
        batch = self._read_numpy(array)
        from_dlpack = getattr(_namespace(images), "from_dlpack", _as_is)
        return batch._replace(images=lambda purified: from_dlpack(batch.images(purified)), scores=from_dlpack)

    def _read_device_array(self, images: Any) -> Batch:
        """An array of any library in GPU memory, reached by CuPy or torch, whichever the caller has imported."""
        dlpack = hasattr(images, "__dlpack_device__")
        cupy, torch = _imported("cupy", "ndarray"), _imported("torch", "from_dlpack")
        try:
            if cupy is not None:
                images = cupy.from_dlpack(images) if dlpack else cupy.asarray(images)
            elif torch is not None:
                images = torch.from_dlpack(images) if dlpack else torch.as_tensor(images, device="cuda")
        except Exception as error:  # a foreign object and a driver may raise anything
            raise TypeError(
                f"images: expected a {_type_name(images)} in memory that {'cupy' if cupy else 'torch'} can read, "
                f"got the error {error!s}; copy it to the host first"
            ) from error
        if cupy is not None:
            return self._read_cupy(cupy, images)
        if torch is not None:
            return self._read_torch(torch, images)
        raise TypeError(
            f"images: expected an array in host memory, got {_type_name(images)} in device memory; "
            "import cupy or torch, through which it can be copied, or copy it to the host"
        )

    def _size(self) -> str:
        return f"{self._hw[1]}x{self._hw[0]}"

    def _shape_error(self, shape: tuple[int, ...], *, is_uint8: bool) -> ValueError:
        here, there = (self._hwc, self._chw) if is_uint8 else (self._chw, self._hwc)
        kind, layout = ("uint8", "channels last") if is_uint8 else ("float", "channels first")
        tail = ", ".join(map(str, here))
        gray = f"{self._hw}, " if is_uint8 and self._channels == 1 else ""
        if shape[-3:] == there and len(shape) in (3, 4):
            axes: tuple[int, ...] = (1, 2, 0) if is_uint8 else (2, 0, 1)
            if len(shape) == 4:
                axes = (0, *(axis + 1 for axis in axes))
            advice = f"move the channel axis with numpy.transpose(images, {axes}) or tensor.permute{axes}"
        elif self._channels == 1 and shape[-2:] == self._hw and len(shape) in (2, 3):
            advice = f"add the channel axis with images[{'..., None' if is_uint8 else '..., None, :, :'}]"
        else:
            advice = f"resize, crop, convert or reshape them to {self._size()} pixels with {self._channels} channel(s)"
        return ValueError(
            f"images: expected {kind} images, {layout}, of the shape {gray}({tail}) or (N, {tail}), "
            f"got {shape}; {advice}"
        )


def _imported(module: str, attribute: str) -> Any:
    """A module that the program has imported, or None; not one that another thread is still importing."""
    found = sys.modules.get(module)
    return found if hasattr(found, attribute) else None


def _module_of(module: str, name: str, value: Any) -> Any:
    """The module when ``value`` is of its class ``name``, else None: objects exist only of what was imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return sys.modules[module] if kind is not None and isinstance(value, kind) else None


def _dlpack_device_type(images: Any) -> int:
    """DLPack's number of the kind of memory that an object lies in."""
    expected = f"images: expected {_type_name(images)}.__dlpack_device__() to give (device type, device id), two ints"
    try:
        device = images.__dlpack_device__()
    except Exception as error:  # a foreign object may raise anything
        raise TypeError(f"{expected}, got the error {error!s}; pass a NumPy array") from error
    try:
        kind, _ = device
        return operator.index(kind)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{expected}, got {device!r}; pass a NumPy array") from error


def _plain(images: Array) -> Array:
    """A memory-mapped array as a plain one; other subclasses carry a meaning that would be lost."""
    if isinstance(images, np.ma.MaskedArray):
        raise TypeError("images: expected a NumPy array, got a masked array; fill it with images.filled(value) first")
    if isinstance(images, np.memmap):
        return images.view(np.ndarray)
    raise TypeError(f"images: expected a plain NumPy array, got {_type_name(images)}; pass numpy.asarray(images)")


def _check_tensor(torch: Any, images: Any) -> None:
    if type(images) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(
            f"images: expected a plain torch.Tensor, got {_type_name(images)}; use images.as_subclass(torch.Tensor)"
        )
    if images.requires_grad:
        raise ValueError(
            "images: expected a tensor without gradient, got one with requires_grad=True, which would lose it here; "
            "use purifier.defend(classifier), which is differentiable, or pass images.detach()"
        )
    if images.layout != torch.strided or images.is_nested:
        raise TypeError("images: expected a dense tensor, got a sparse or nested one; use .to_dense()")
    if images.is_quantized:
        raise TypeError(f"images: expected uint8 or floating dtype, got {images.dtype}; use images.dequantize()")
    if images.is_meta:
        raise TypeError("images: expected a tensor with data, got one on the meta device; create it on a real device")
    if images.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise _dtype_error(str(images.dtype))


def _check_values(images: Array) -> None:
    """Raise unless every value of a native float array lies in [0, 1]."""
    integers, one = _BITS[images.dtype]
    if np.maximum.reduce(images.view(integers), axis=None) <= one:
        return
    with np.errstate(invalid="ignore"):
        low, high = images.min(), images.max()  # NaN passes through both
    if not (low >= 0.0 and high <= 1.0):  # -0.0 has its sign bit set but is a fine zero
        raise _value_error(low, high)


def _check_tensor_values(torch: Any, images: Any) -> None:
    """The same for a tensor where it lies; on a GPU this waits for the result, two numbers."""
    low, high = torch.stack(torch.aminmax(images)).tolist()  # NaN passes through both
    if not (low >= 0.0 and high <= 1.0):
        raise _value_error(low, high)


def _value_error(low: Any, high: Any) -> ValueError:
    if np.isnan(low):
        return ValueError(
            "images: expected finite values in [0, 1], got NaN; find its source, or replace it with numpy.nan_to_num"
        )
    advice = "divide 0..255 images by 255" if low >= 0 and 2 < high <= 255 else "clip or rescale them"
    return ValueError(f"images: expected values in [0, 1], got values from {low!s} to {high!s}; {advice}")


def _dtype_error(dtype: str) -> TypeError:
    return TypeError(
        f"images: expected uint8 in 0..255 or float16, float32 or float64 in [0, 1], got {dtype}; "
        "convert with .astype or .to, and mind the range of values"
    )


def _pil_image(pil: Any, pixels: Array) -> Any:
    return pil.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _namespace(images: Any) -> Any:
    """The array API namespace of an object, or the top module of its type: the two places a ``from_dlpack`` stands."""
    namespace = getattr(images, "__array_namespace__", None)
    return namespace() if namespace is not None else sys.modules.get(type(images).__module__.partition(".")[0])


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
