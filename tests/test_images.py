"""What goes in comes back in its own kind, or an error says what was expected."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.images import Batch, ImageReader

GRAY, COLOUR = VAEConfig(28, 1), VAEConfig(32, 3)
Array = np.ndarray[Any, Any]


def invert(batch: Batch) -> Any:
    """Stands in for a network whose right answer is known: every image becomes its negative."""
    if batch.on_device:
        return (255 if batch.array.dtype == torch.uint8 else 1) - batch.array
    return np.subtract(255 if batch.array.dtype == np.uint8 else np.float32(1), batch.array)


def negative(images: Any, config: VAEConfig = GRAY, tensor_device: str | None = None) -> Any:
    batch = ImageReader(config, tensor_device).read(images)
    if batch.on_device:
        assert batch.array.is_contiguous()
        return batch.images(invert(batch))
    assert batch.array.flags.c_contiguous
    assert batch.array.flags.aligned
    assert batch.array.dtype.isnative
    return batch.images(invert(batch))


def pixels(shape: tuple[int, ...], dtype: str = "u1", seed: int = 0) -> Array:
    """Values that every floating dtype holds exactly, 0 and 1 among them."""
    values = np.random.default_rng(seed).integers(0, 257, shape)
    return np.minimum(values, 255).astype(dtype) if dtype == "u1" else (values / 256).astype(dtype)


FORMS = [
    pytest.param(GRAY, (28, 28), "u1", True, id="uint8-HW"),
    pytest.param(GRAY, (28, 28, 1), "u1", True, id="uint8-HW1"),
    pytest.param(GRAY, (1, 28, 28, 1), "u1", False, id="uint8-1HW1"),
    pytest.param(GRAY, (7, 28, 28, 1), "u1", False, id="uint8-NHW1"),
    pytest.param(COLOUR, (32, 32, 3), "u1", True, id="uint8-HWC"),
    pytest.param(COLOUR, (7, 32, 32, 3), "u1", False, id="uint8-NHWC"),
    *(
        pytest.param(config, shape, dtype, single, id=f"{dtype}-{name}")
        for dtype in ("f2", "f4", "f8", ">f2", ">f4", ">f8")
        for config, shape, single, name in (
            (GRAY, (1, 28, 28), True, "1HW"),
            (GRAY, (7, 1, 28, 28), False, "N1HW"),
            (COLOUR, (3, 32, 32), True, "CHW"),
            (COLOUR, (7, 3, 32, 32), False, "NCHW"),
        )
    ),
]


@pytest.mark.parametrize(("config", "shape", "dtype", "single"), FORMS)
def test_numpy(config: VAEConfig, shape: tuple[int, ...], dtype: str, single: bool) -> None:
    images = pixels(shape, dtype)
    before = images.copy()
    batch = ImageReader(config).read(images)
    result = batch.images(invert(batch))
    assert type(result) is np.ndarray
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert result.flags.writeable
    assert not np.shares_memory(result, images)
    np.testing.assert_array_equal(result, (255 if dtype == "u1" else 1) - images)
    np.testing.assert_array_equal(images, before)
    assert batch.single is single
    scores = np.arange(len(batch.array), dtype=np.float32)
    assert batch.scores(scores) is scores


def test_plain_arrays_are_not_copied() -> None:
    for images in (pixels((28, 28)), pixels((7, 28, 28, 1)), pixels((1, 28, 28), "f4"), pixels((7, 1, 28, 28), "f4")):
        assert np.shares_memory(ImageReader(GRAY).read(images).array, images)


def unaligned(images: Array) -> Array:
    memory = np.zeros(images.nbytes + 1, np.uint8)
    view = memory[1:].view(images.dtype).reshape(images.shape)
    view[...] = images
    return view


def read_only(images: Array) -> Array:
    images = images.copy()
    images.flags.writeable = False
    return images


VIEWS = {
    "read-only": read_only,
    "bytes": lambda images: np.frombuffer(images.tobytes(), images.dtype).reshape(images.shape),
    "Fortran": np.asfortranarray,
    "negative strides": lambda images: images[..., ::-1, :][..., ::-1, :].copy()[..., ::-1, :],
    "mirrored": lambda images: np.ascontiguousarray(images[::-1])[::-1],
    "every second": lambda images: np.repeat(images, 2, axis=-2)[..., ::2, :],
    "transposed": lambda images: np.moveaxis(np.ascontiguousarray(np.moveaxis(images, -1, 0)), 0, -1),
    "cut out": lambda images: np.pad(images, 3)[(slice(3, -3),) * images.ndim],
    "unaligned": unaligned,
    "zero strides": lambda images: np.broadcast_to(images[..., :1, :], images.shape),
    "pickled": lambda images: pickle.loads(pickle.dumps(images)),
    "big-endian": lambda images: images.astype(images.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize(
    "form", [((28, 28), "u1"), ((5, 28, 28, 1), "u1"), ((5, 1, 28, 28), "f4"), ((1, 28, 28), "f8")], ids=str
)
@pytest.mark.parametrize("view", VIEWS)
def test_memory_does_not_matter(view: str, form: tuple[tuple[int, ...], str]) -> None:
    images = VIEWS[view](pixels(*form))
    before = images.tobytes()
    result = negative(images)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    np.testing.assert_array_equal(result, negative(np.array(images, form[1], order="C", copy=True)))
    assert images.tobytes() == before
    result[...] = 0  # the caller's to write
    assert images.tobytes() == before


def test_memory_map(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels((3, 28, 28, 1)))
    images = np.load(tmp_path / "a.npy", mmap_mode="r")
    result = negative(images)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, 255 - np.asarray(images))


NAN, INFINITY = float("nan"), float("inf")
BAD_VALUES = [
    pytest.param(NAN, "got NaN; find its source", id="NaN"),
    pytest.param(-NAN, "got NaN; find its source", id="-NaN"),
    pytest.param(INFINITY, r"got values from 0\.\d+ to inf; clip", id="inf"),
    pytest.param(-INFINITY, r"got values from -inf to 0\.\d+; clip", id="-inf"),
    pytest.param(-0.001, r"got values from -0\.00\d+ to 0\.\d+; clip", id="below"),
    pytest.param(1.001, r"got values from 0\.\d+ to 1\.00\d+; clip", id="above"),
    pytest.param(255.0, r"got values from 0\.\d+ to 255\.0; divide 0\.\.255 images by 255", id="255"),
]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize(("value", "message"), BAD_VALUES)
def test_bad_values(value: float, message: str, dtype: str) -> None:
    images = np.full((2, 1, 28, 28), 0.25, dtype)
    images[1, 0, 27, 27] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a NaN is an error of ours, not a warning of NumPy's besides
        with pytest.raises(ValueError, match=rf"expected .*values in \[0, 1\], {message}"):
            negative(images)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_the_bounds_themselves(dtype: str) -> None:
    one = np.array(1, dtype)
    images = np.zeros((1, 28, 28), dtype)
    images[0, 0, :3] = [0.0, -0.0, one]
    np.testing.assert_array_equal(negative(images), 1 - images)
    for outside in (np.nextafter(one, 2, dtype=dtype[-2:]), np.nextafter(-one * 0, -1, dtype=dtype[-2:])):
        images[0, 0, 3] = outside
        with pytest.raises(ValueError, match="expected values in"):
            negative(images)


# Every error is "images: expected X, got Y; do Z".
REFUSED = [
    pytest.param(np.zeros((0, 28, 28, 1), "u1"), ValueError, "at least one image, got", id="empty uint8"),
    pytest.param(np.zeros((0, 1, 28, 28), "f4"), ValueError, "at least one image, got", id="empty float"),
    pytest.param(np.zeros((1, 28, 28), "u1"), ValueError, r"last.*got \(1, 28, 28\).*\(1, 2, 0\)", id="u1 CHW"),
    pytest.param(np.zeros((5, 1, 28, 28), "u1"), ValueError, r"channels last.*\(0, 2, 3, 1\)", id="uint8 NCHW"),
    pytest.param(np.zeros((28, 28, 1), "f4"), ValueError, r"channels first.*\(2, 0, 1\)", id="float HWC"),
    pytest.param(np.zeros((5, 28, 28, 1), "f4"), ValueError, r"channels first.*\(0, 3, 1, 2\)", id="float NHWC"),
    pytest.param(np.zeros((28, 28), "f4"), ValueError, r"images\[\.\.\., None, :, :\]", id="float HW"),
    pytest.param(np.zeros((5, 28, 28), "f4"), ValueError, "add the channel axis", id="float NHW"),
    pytest.param(np.zeros((5, 28, 28), "u1"), ValueError, r"images\[\.\.\., None\]", id="uint8 NHW"),
    pytest.param(np.zeros((28, 28, 3), "u1"), ValueError, r"resize.* to 28x28 pixels with 1 channel", id="RGB"),
    pytest.param(np.zeros((32, 32), "u1"), ValueError, r"resize", id="size"),
    pytest.param(np.zeros((28, 27, 1), "u1"), ValueError, r"resize", id="not square"),
    pytest.param(np.zeros((2, 2, 28, 28, 1), "u1"), ValueError, r"reshape", id="five axes uint8"),
    pytest.param(np.zeros((2, 2, 1, 28, 28), "f4"), ValueError, r"reshape", id="five axes float"),
    pytest.param(np.zeros(784, "f4"), ValueError, r"got \(784,\)", id="flat"),
    pytest.param(np.array(0.5, "f4"), ValueError, r"got \(\)", id="0-d"),
    pytest.param(np.array(5, "u1"), ValueError, r"got \(\)", id="0-d uint8"),
    *(
        pytest.param(np.zeros((1, 28, 28), dtype), TypeError, "uint8 in 0..255 or float16, float32", id=dtype)
        for dtype in ("i1", "i2", "i4", "i8", "u2", "u4", "u8", "?", "c8", "c16", "O", "U3", "S3", "M8[s]", "f4,f4")
    ),
    pytest.param(
        np.zeros((1, 28, 28), np.longdouble),
        TypeError,
        "uint8 in 0..255 or float16",
        id="longdouble",
        marks=pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here"),
    ),
    pytest.param(
        np.zeros((28, 28), "u1").view(np.matrix), TypeError, r"got numpy.*matrix; pass numpy.asarray", id="matrix"
    ),
    pytest.param(np.ma.masked_array(np.zeros((28, 28), "u1")), TypeError, "got a masked array; fill it", id="masked"),
    pytest.param(np.zeros((28, 28), "u1").view(np.recarray), TypeError, "plain NumPy array", id="recarray"),
    pytest.param([[0.5] * 28] * 28, TypeError, "list or tuple of PIL images, got list in it", id="nested list"),
    pytest.param([0.5, 0.5], TypeError, "list or tuple of PIL images, got float in it", id="list of numbers"),
    pytest.param([np.zeros((28, 28), "u1")], TypeError, "got numpy.ndarray in it; .*numpy.stack", id="list of arrays"),
    pytest.param([], ValueError, "at least one image, got an empty list", id="empty list"),
    pytest.param((), ValueError, "at least one image, got an empty tuple", id="empty tuple"),
    *(
        pytest.param(value, TypeError, r"a NumPy array, a torch tensor.*numpy\.asarray", id=name)
        for name, value in {
            "None": None,
            "str": "image.png",
            "bytes": bytes(784),
            "bytearray": bytearray(784),
            "int": 3,
            "float": 0.5,
            "NumPy scalar": np.float32(0.5),
            "dict": {},
            "set": set(),
            "generator": (i for i in range(3)),
            "memoryview": memoryview(bytes(784)),
            "path": Path("image.png"),
            "type": np.ndarray,
        }.items()
    ),
]


@pytest.mark.parametrize(("images", "error", "message"), REFUSED)
def test_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^images.*: expected .*; .+") as caught:
        negative(images)
    assert type(caught.value) is error
    caught.match(message)


# torch


# Tensors go to the engine as arrays in host memory, or as they are where it takes them on their device.
TENSOR_DEVICE = pytest.mark.parametrize("tensor_device", [None, "cpu"], ids=["through the host", "in place"])
TORCH_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.uint8, *TORCH_DTYPES], ids=str)
@pytest.mark.parametrize("count", [None, 1, 7], ids=["one", "batch of 1", "batch of 7"])
@pytest.mark.parametrize("config", [GRAY, COLOUR], ids=["gray", "colour"])
@TENSOR_DEVICE
def test_torch(dtype: torch.dtype, count: int | None, config: VAEConfig, tensor_device: str | None) -> None:
    channels, side = config.channels, config.image_size
    shape = (side, side, channels) if dtype == torch.uint8 else (channels, side, side)
    if count is not None:
        shape = (count, *shape)
    top = 255 if dtype == torch.uint8 else 1
    images = torch.randint(0, 129, shape).to(dtype) * (1 if dtype == torch.uint8 else 1 / 128)
    before = images.clone()
    batch = ImageReader(config, tensor_device).read(images)
    assert batch.on_device is (tensor_device is not None)
    result = batch.images(invert(batch))
    assert type(result) is torch.Tensor
    assert (result.dtype, result.shape, result.device) == (dtype, images.shape, images.device)
    assert torch.equal(result, top - images)
    assert torch.equal(images, before)
    assert not result.requires_grad
    assert batch.single is (count is None)
    ones = torch.ones(len(batch.array))
    scores = batch.scores(ones if batch.on_device else ones.numpy())
    assert (type(scores), scores.dtype, scores.shape) == (torch.Tensor, torch.float32, (count or 1,))


TORCH_VIEWS = {
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "permuted": lambda images: images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda images: images[:1].expand(images.shape),
    "every second": lambda images: images.repeat_interleave(2, 3)[..., ::2],
    "offset": lambda images: torch.cat([images.new_zeros(1), images.flatten()])[1:].view(images.shape),
    "negated": lambda images: torch.complex(images * 0, -images).conj().imag,
    "parameter": lambda images: torch.nn.Parameter(images, requires_grad=False),
    "detached": lambda images: images.clone().requires_grad_().detach(),
    "inference": lambda images: torch.inference_mode()(torch.clone)(images),
    "shared": lambda images: images.clone().share_memory_(),
}


@pytest.mark.parametrize("view", TORCH_VIEWS)
@TENSOR_DEVICE
def test_torch_memory_does_not_matter(view: str, tensor_device: str | None) -> None:
    plain = torch.from_numpy(pixels((5, 3, 32, 32), "f4"))
    images = TORCH_VIEWS[view](plain)
    result = negative(images, COLOUR, tensor_device)
    assert type(result) is torch.Tensor
    assert result.shape == images.shape
    assert torch.equal(result, 1 - images)


@TENSOR_DEVICE
def test_channels_last_comes_back(tensor_device: str | None) -> None:
    images = torch.rand(5, 3, 32, 32)
    assert negative(images, COLOUR, tensor_device).is_contiguous()
    result = negative(images.contiguous(memory_format=torch.channels_last), COLOUR, tensor_device)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert not result.is_contiguous()


class OwnTensor(torch.Tensor):
    pass


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch announces changes to some of these kinds
    TORCH_REFUSED = [
        pytest.param(torch.rand(1, 28, 28, requires_grad=True), ValueError, r"defend\(classifier\).*detach", id="leaf"),
        pytest.param(
            torch.rand(1, 28, 28, requires_grad=True) * 1,
            ValueError,
            r"defend\(classifier\).*detach",
            id="requires grad",
        ),
        pytest.param(torch.nn.Parameter(torch.rand(1, 28, 28)), ValueError, "requires_grad=True", id="parameter"),
        pytest.param(torch.rand(28, 28).to_sparse(), TypeError, "dense tensor.*to_dense", id="sparse"),
        pytest.param(torch.rand(28, 28).to_sparse_csr(), TypeError, "dense tensor.*to_dense", id="sparse CSR"),
        pytest.param(
            torch.quantize_per_tensor(torch.rand(1, 28, 28), 0.1, 0, torch.quint8),
            TypeError,
            "dequantize",
            id="quantized",
        ),
        pytest.param(torch.nested.nested_tensor([torch.rand(1, 28, 28)]), TypeError, "dense tensor", id="nested"),
        pytest.param(torch.empty(1, 28, 28, device="meta"), TypeError, "meta device", id="meta"),
        pytest.param(
            torch.rand(1, 28, 28).as_subclass(OwnTensor), TypeError, "plain torch.Tensor.*as_subclass", id="subclass"
        ),
        pytest.param(torch.rand(28, 28, 1), ValueError, r"channels first.*permute\(2, 0, 1\)", id="float HWC"),
        pytest.param(
            torch.zeros(2, 1, 28, 28, dtype=torch.uint8), ValueError, r"permute\(0, 2, 3, 1\)", id="uint8 NCHW"
        ),
        pytest.param(torch.zeros(0, 1, 28, 28), ValueError, "at least one image", id="empty"),
        pytest.param(torch.tensor(0.5), ValueError, r"got \(\)", id="0-d"),
        pytest.param(torch.full((1, 28, 28), NAN), ValueError, "got NaN", id="NaN"),
        pytest.param(
            torch.full((1, 28, 28), 1.5, dtype=torch.bfloat16), ValueError, "from 1.5 to 1.5", id="bfloat16 above"
        ),
        *(
            pytest.param(torch.zeros(1, 28, 28, dtype=dtype), TypeError, f"got {dtype}", id=str(dtype))
            for dtype in (torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
        ),
    ]


@pytest.mark.parametrize(("images", "error", "message"), TORCH_REFUSED)
@TENSOR_DEVICE
def test_torch_refused(images: torch.Tensor, error: type[Exception], message: str, tensor_device: str | None) -> None:
    with pytest.raises(error, match=r"^images: expected .*; .+") as caught:
        negative(images, tensor_device=tensor_device)
    assert type(caught.value) is error
    caught.match(message)


# PIL


@pytest.mark.parametrize(("config", "mode"), [(GRAY, "L"), (COLOUR, "RGB")], ids=["L", "RGB"])
def test_pil(config: VAEConfig, mode: str) -> None:
    side = config.image_size
    arrays = pixels((3, side, side) if mode == "L" else (3, side, side, 3))
    images = [Image.fromarray(array) for array in arrays]
    assert {image.mode for image in images} == {mode}
    batch = ImageReader(config).read(images[0])
    assert batch.single
    result = batch.images(invert(batch))
    assert type(result) is Image.Image
    assert (result.mode, result.size) == (mode, (side, side))
    np.testing.assert_array_equal(np.asarray(result), 255 - arrays[0])
    result.putpixel((0, 0), 7 if mode == "L" else (7, 7, 7))  # the caller's to write
    for kind in (list, tuple):
        batch = ImageReader(config).read(kind(images))
        assert not batch.single
        results = batch.images(invert(batch))
        assert type(results) is kind
        for one, array in zip(results, arrays, strict=True):
            np.testing.assert_array_equal(np.asarray(one), 255 - array)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_pil_file() -> None:
    array = pixels((28, 28))
    image = Image.open(io.BytesIO(encoded(Image.fromarray(array))))
    np.testing.assert_array_equal(np.asarray(negative(image)), 255 - array)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "I", "I;16", "F", "LA", "CMYK", "YCbCr", "HSV"])
def test_pil_modes_refused(mode: str) -> None:
    for images in (Image.new(mode, (28, 28)), [Image.new("L", (28, 28)), Image.new(mode, (28, 28))]):
        with pytest.raises(
            ValueError, match=rf"expected a PIL image of mode L, got mode {mode}; use \.convert\(\"L\"\)"
        ):
            negative(images)
    if mode != "RGB":
        with pytest.raises(ValueError, match=r"use \.convert\(\"RGB\"\)"):
            negative(Image.new(mode, (32, 32)), COLOUR)


def test_pil_refused() -> None:
    with pytest.raises(ValueError, match="the image: expected 28x28 pixels, got 30x20; resize"):
        negative(Image.new("L", (30, 20)))
    with pytest.raises(ValueError, match=r"images\[1\]: expected 28x28 pixels, got 30x20; resize"):
        negative([Image.new("L", (28, 28)), Image.new("L", (30, 20))])
    with pytest.raises(TypeError, match=r"expected an array, got a PIL image.*2 plain channels"):
        negative(Image.new("LA", (28, 28)), VAEConfig(28, 2))


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 400])
def test_pil_truncated_file(kept: int) -> None:
    raw = encoded(Image.fromarray(pixels((28, 28))))
    image = Image.open(io.BytesIO(raw[: raw.index(b"IDAT") + 4 + kept]))  # opens: Pillow reads the pixels later
    with pytest.raises(ValueError, match=r"expected a readable image, got the error .*; replace the file"):
        negative(image)


def test_pil_closed_file() -> None:
    image = Image.open(io.BytesIO(encoded(Image.fromarray(pixels((28, 28))))))
    image.close()
    with pytest.raises(ValueError, match="expected a readable image"):
        negative(image)


# Other libraries, by protocol


class Exporter:
    """An array of an unknown library: DLPack and nothing else."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class StandardArray(Exporter):
    """The same of a library with the array API standard's namespace."""

    @classmethod
    def from_dlpack(cls, exporter: Any) -> StandardArray:
        return cls(np.from_dlpack(exporter))

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=self.from_dlpack)


@pytest.mark.parametrize(
    "form", [((28, 28), "u1"), ((5, 28, 28, 1), "u1"), ((5, 1, 28, 28), "f4"), ((1, 28, 28), "f8")], ids=str
)
def test_dlpack(form: tuple[tuple[int, ...], str]) -> None:
    images = pixels(*form)
    result = negative(Exporter(images))
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, negative(images))
    standard = negative(StandardArray(images))
    assert type(standard) is StandardArray
    np.testing.assert_array_equal(np.from_dlpack(standard), negative(images))
    scores = ImageReader(GRAY).read(StandardArray(images)).scores(np.ones(5, np.float32))
    assert type(scores) is StandardArray


class OnlyDLPack:
    """Half of the protocol."""

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("nobody knows where the memory is")


class Device(Exporter):
    """An array that says that it lies where it is told."""

    def __init__(self, device: Any) -> None:
        super().__init__(np.zeros((28, 28), "u1"))
        self._device = device

    def __dlpack_device__(self) -> Any:
        if isinstance(self._device, Exception):
            raise self._device
        return self._device


class Capsule(Exporter):
    """An array whose capsule is what it is told."""

    def __init__(self, capsule: Any) -> None:
        super().__init__(np.zeros((28, 28), "u1"))
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        if isinstance(self._capsule, Exception):
            raise self._capsule
        return self._capsule


class BrainFloats(Exporter):
    """NumPy has no bfloat16."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, 28, 28, dtype=torch.bfloat16))  # type: ignore[arg-type]


class CUDAArray:
    """GPU memory of an unknown library."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.interface = interface

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface


class OnDevice(Exporter):
    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)  # kDLCUDA


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        pytest.param(BrainFloats(), TypeError, "that NumPy can read through DLPack, got the error", id="bfloat16"),
        pytest.param(Exporter(np.zeros((28, 28, 1), "f4")), ValueError, "channels first", id="layout"),
        pytest.param(Exporter(np.zeros((28, 28), "i4")), TypeError, "got int32", id="dtype"),
        pytest.param(Exporter(np.full((1, 28, 28), 2.0)), ValueError, r"values in \[0, 1\]", id="values"),
        pytest.param(OnlyDLPack(), TypeError, "__dlpack__ and __dlpack_device__, got .*OnlyDLPack", id="no device"),
        pytest.param(Device(None), TypeError, r"\(device type, device id\), two ints, got None", id="device None"),
        pytest.param(Device((1,)), TypeError, r"two ints, got \(1,\)", id="short device"),
        pytest.param(Device(("cpu", 0)), TypeError, r"two ints, got \('cpu', 0\)", id="named device"),
        pytest.param(Device(ValueError("lost")), TypeError, "got the error lost", id="device raises"),
        pytest.param(Capsule(None), TypeError, "read through DLPack, got the error", id="no capsule"),
        pytest.param(Capsule(b"bytes"), TypeError, "read through DLPack, got the error", id="bytes for a capsule"),
        pytest.param(Capsule(KeyError("gone")), TypeError, "got the error 'gone'", id="capsule raises"),
        pytest.param(OnDevice(pixels((28, 28))), TypeError, "memory that torch can read, got the error", id="lying"),
    ],
)
def test_dlpack_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^images: expected .*; .+") as caught:
        negative(images)
    caught.match(message)


@pytest.mark.parametrize("module", ["torch", "PIL.Image", "cupy"])
def test_a_module_that_another_thread_still_imports(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, ModuleType(module))  # so it looks while it is half imported
    np.testing.assert_array_equal(negative(Exporter(pixels((28, 28)))), negative(pixels((28, 28))))
    for images in (None, "text", [1]):
        with pytest.raises(TypeError, match=r"expected .*, got .*; "):
            negative(images)
    if module == "torch":
        with pytest.raises(TypeError, match="in device memory; import cupy or torch"):
            negative(OnDevice(pixels((28, 28))))


def test_device_memory_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")  # as in a process that never imported it
    for images in (OnDevice(pixels((28, 28))), CUDAArray({})):
        with pytest.raises(
            TypeError, match=r"expected an array in host memory, got .* in device memory; import cupy or torch"
        ):
            negative(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("tensor_device", [None, "cuda:0", "cuda:1"], ids=["host only", "in place", "another device"])
def test_cuda_tensors(dtype: torch.dtype, tensor_device: str | None) -> None:
    images = torch.from_numpy(pixels((5, 3, 32, 32), "f2")).to("cuda:0", dtype)
    batch = ImageReader(COLOUR, tensor_device).read(images)
    assert batch.on_device is (tensor_device == "cuda:0")
    result = batch.images(invert(batch))
    assert result.device == images.device
    assert torch.equal(result, 1 - images)
    assert (
        batch.scores(images[:, 0, 0, 0].float() if batch.on_device else np.ones(5, np.float32)).device == images.device
    )
    if dtype == torch.float32:
        interface = CUDAArray(images.__cuda_array_interface__)
        assert torch.equal(negative(interface, COLOUR), 1 - images)


def test_torch_is_not_imported() -> None:
    code = """
import sys, numpy
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.images import ImageReader
read = ImageReader(VAEConfig()).read
read(numpy.zeros((28, 28), "u1"))
for wrong in (None, [1], numpy.zeros(3)):
    try:
        read(wrong)
    except (TypeError, ValueError):
        pass
    else:
        raise AssertionError(wrong)
print(sorted({"torch", "PIL", "cupy", "openvino", "onnx"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "[]"


# Anything at all


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Arrays near to what is taken and far from it: dtype, shape, strides, byte order, contents, write protection."""
    tail = draw(
        st.sampled_from(
            [(28, 28, 1), (1, 28, 28), (28, 28), (32, 32, 3), (3, 32, 32), (28,), (), (28, 1, 28), (27, 28, 1)]
        )
    )
    lead = draw(st.sampled_from([(), (), (1,), (3,), (0,), (2, 2)]))
    dtype = np.dtype(
        draw(st.sampled_from(["u1", "u1", "f2", "f4", "f4", "f8", ">f2", ">f4", ">f8", "i8", "?", "c8", "O", "U1"]))
    )
    values = np.random.default_rng(draw(st.integers(0, 99))).random((*lead, *tail))
    array = (255 * values if dtype == np.uint8 else values).astype(dtype)
    if dtype.kind == "f" and array.size and draw(st.booleans()):
        places = st.integers(0, array.size - 1)
        special = (
            st.sampled_from([0.0, -0.0, 1.0, NAN, INFINITY, -INFINITY, -1e-7, 1.01, 255.0])
            | st.floats(0, 1)
            | st.floats()
        )
        with np.errstate(all="ignore"):
            array.flat[draw(places)] = draw(special)
    for axis in range(array.ndim):
        if draw(st.booleans()):
            array = np.flip(np.flip(array, axis).copy(), axis)
    if array.ndim and array.shape[0] and draw(st.booleans()):
        array = np.broadcast_to(array[:1], array.shape)
    array = np.array(array, order=draw(st.sampled_from("KFC")), copy=draw(st.booleans()) or None)
    if draw(st.booleans()):
        array = array.view()
        array.flags.writeable = False
    return array


@settings(deadline=None, max_examples=600)
@given(array=arrays(), config=st.sampled_from([GRAY, COLOUR]))
def test_any_array(array: Array, config: VAEConfig) -> None:
    before = array.tobytes()
    uint8 = array.dtype == np.uint8
    channels, side = config.channels, config.image_size
    shapes = [(side, side, channels)] if uint8 else [(channels, side, side)]
    right = (
        (uint8 or array.dtype.kind == "f")
        and (array.shape[-3:] in shapes or (uint8 and channels == 1 and array.shape == (side, side)))
        and array.ndim <= 4
        and array.size > 0
        and (uint8 or bool(((array >= 0) & (array <= 1)).all()))
    )
    if right:
        result = negative(array, config)
        assert type(result) is np.ndarray
        assert (result.shape, result.dtype) == (array.shape, array.dtype)
        plain = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
        np.testing.assert_array_equal(result, negative(plain, config))
    else:
        with pytest.raises((TypeError, ValueError), match=r"^images: expected .*, got .*; .+"):
            negative(array, config)
    assert array.tobytes() == before


@settings(deadline=None, max_examples=200)
@given(
    array=arrays().filter(lambda array: array.dtype.char in "Befd" and array.dtype.isnative),
    config=st.sampled_from([GRAY, COLOUR]),
)
def test_torch_agrees_with_numpy(array: Array, config: VAEConfig) -> None:
    tensor = torch.from_numpy(np.array(array, order="C", copy=True))
    try:
        expected = negative(array, config)
    except ValueError:
        for tensor_device in (None, "cpu"):
            with pytest.raises(ValueError, match=r"^images: expected .*, got .*; "):
                negative(tensor, config, tensor_device)
    else:
        for tensor_device in (None, "cpu"):
            result = negative(tensor, config, tensor_device)
            assert result.dtype == tensor.dtype
            np.testing.assert_array_equal(result.numpy(), expected)
