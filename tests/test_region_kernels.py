"""Boxes and tiles of frames in GPU memory: the kernels' own source, run on the CPU, against the NumPy functions that
say what they mean; the same source compiled for every GPU generation; and the way from a frame to its result.

On a GPU, when the tests are started with ``-m gpu``, the way is gone with real frames on streams of the caller's.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from cpu_kernels import CAPABILITIES, REGISTERS, compiled, resources

from defense_vae_fast import Purifier, VAEConfig, cuda, regions, regions_on_gpu
from defense_vae_fast.engines import device_arrays
from defense_vae_fast.engines.device_arrays import DeviceArray
from defense_vae_fast.regions import METHODS

BOXES = np.array(
    [
        [0, 0, 28, 28],
        [3, 5, 4, 6],
        [10, 20, 97, 31],
        [40, 1, 47, 60],
        [0, 0, 120, 90],
        [92, 62, 120, 90],
        [60, 30, 88, 58],
    ]
)


def pixels(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """csrc/regions.cu compiled by the C++ compiler, with the face of :class:`cuda.Kernels`."""
    library = compiled(cuda.REGIONS, tmp_path_factory.mktemp("regions"))
    assert library.box_bytes() == regions_on_gpu._BOX_BYTES

    def launch(name: str, grid: tuple[int, int], stream: int, *arguments: Any) -> None:
        getattr(library, f"run_{name}")(*grid, *arguments)

    return SimpleNamespace(launch=launch)


def pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def padded(frame: Any, margin: int = 7) -> Any:
    """The same frame with rows that lie apart."""
    height, width, channels = frame.shape
    buffer = pixels(height, width * channels + margin, seed=9)
    view = buffer[:, : width * channels].reshape(height, width, channels, copy=False)
    view[...] = frame
    return view


def check(ours: Any, image: Any, method: Any) -> None:
    """``ours`` is ``image`` resized, but for ties, where float32 may fall to the other side of half a grey level."""
    right = regions.resize_reference(image, ours.shape[:2], method)
    rows, columns = (regions._weights(*sides, method) for sides in zip(image.shape[:2], ours.shape[:2], strict=True))
    exact = np.einsum("yh,hwc,xw->yxc", rows, image, columns)
    differs = ours != right
    assert np.abs(ours.astype(np.int16) - right).max() <= 1
    assert np.all(np.abs(exact - np.floor(exact) - 0.5)[differs] < 0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (50, 13)], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
def test_crop_boxes(kernels: Any, method: Any, channels: int, size: tuple[int, int], blocks: int) -> None:
    frame = padded(pixels(90, 120, channels))
    images = np.full((len(BOXES), *size, channels), 77, np.uint8)
    table = BOXES.astype(np.int32)
    kernels.launch(
        "crop_boxes", (blocks, len(BOXES)), 0, pointer(frame), frame.strides[0], channels, pointer(table),
        pointer(images), *size, METHODS.index(method),
    )  # fmt: skip
    for image, (left, top, right, bottom) in zip(images, BOXES, strict=True):
        check(image, frame[top:bottom, left:right], method)
    if size == (28, 28):  # not resized: every bit
        assert np.array_equal(images[0], frame[:28, :28])


@pytest.mark.parametrize("shape", [((1, 3000), (1, 7)), ((2999, 2), (1000, 2)), ((1, 1), (64, 64))], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_long_axes_lose_nothing(kernels: Any, method: Any, shape: tuple[tuple[int, int], tuple[int, int]]) -> None:
    (height, width), size = shape
    frame = pixels(height, width, 1)
    images, table = np.zeros((1, *size, 1), np.uint8), np.array([[0, 0, width, height]], np.int32)
    kernels.launch(
        "crop_boxes", (2, 1), 0, pointer(frame), width, 1, pointer(table), pointer(images), *size, METHODS.index(method)
    )  # fmt: skip
    check(images[0], frame, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("boxes", [BOXES, BOXES[::-1], BOXES[:0]], ids=["boxes", "the other way round", "none"])
def test_paste_boxes(kernels: Any, method: Any, channels: int, boxes: Any) -> None:
    frame = padded(pixels(90, 120, channels))
    images, result = pixels(len(boxes), 28, 28, channels, seed=2), np.zeros((90, 120, channels), np.uint8)
    table = np.ascontiguousarray(boxes, np.int32)
    kernels.launch(
        "paste_boxes", (1, 90), 0, pointer(frame), frame.strides[0], channels, pointer(table), len(boxes),
        pointer(images), 28, pointer(result), 120, METHODS.index(method),
    )  # fmt: skip
    covered = np.zeros((90, 120), bool)
    for image, (left, top, right, bottom) in zip(images[::-1], boxes[::-1], strict=True):
        # What later boxes left of this one; beneath them, what it would be.
        seen = result[top:bottom, left:right].copy()
        hidden = covered[top:bottom, left:right]
        seen[hidden] = regions.resize_reference(image, (bottom - top, right - left), method)[hidden]
        check(seen, image, method)
        hidden[...] = True
    assert np.array_equal(result[~covered], frame[~covered])


@pytest.mark.parametrize("overlap", [0, 1, 7, 14])
@pytest.mark.parametrize("shape", [(28, 28), (29, 85), (100, 61), (56, 140)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_blend_tiles_to_the_bit(kernels: Any, channels: int, shape: tuple[int, int], overlap: int) -> None:
    places, _ = regions.tile_boxes(shape, 28, overlap)
    tiles, result = pixels(len(places), 28, 28, channels), np.zeros((*shape, channels), np.uint8)
    kernels.launch(
        "blend_tiles", (1, shape[0]), 0, pointer(tiles), 28, overlap, channels, pointer(result), *shape
    )  # fmt: skip
    assert np.array_equal(result, regions.blend_tiles(tiles, shape, overlap))


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    try:
        return {capability: cuda.compile_kernels(cuda.REGIONS, capability) for capability in CAPABILITIES}
    except cuda.CompileError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_keep_within_their_resources(nvrtc: Any, capability: str) -> None:
    cubin, report = nvrtc[capability]
    assert cubin.startswith(b"\x7fELF")
    for name in cuda.KERNELS[cuda.REGIONS]:
        assert name.encode() in cubin
        used = resources(report, name)
        assert used.registers <= REGISTERS, (name, used)
        assert used.shared == 0
        assert used.stack == [0, 0, 0], (name, used)  # frame, spilled stores and loads: no local memory


# --- from a frame to its result, with the kernels on the CPU ---------------------------------------------------------


@pytest.fixture
def on_cpu(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch tensors in host memory are taken for frames on a GPU."""

    def view(tensor: torch.Tensor) -> DeviceArray:
        assert tensor.is_contiguous()
        return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), np.dtype(str(tensor.dtype)[6:]), 0, 5)

    monkeypatch.setattr(device_arrays, "view", view)
    monkeypatch.setattr(device_arrays, "on_gpu", lambda frame: isinstance(frame, torch.Tensor))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(device_arrays, "_ordinal", lambda device: 0)
    asked: list[tuple[int, Any]] = []
    monkeypatch.setattr(
        regions_on_gpu, "Kernels", SimpleNamespace(get=lambda *what: asked.append(what) or kernels), raising=True
    )


COLOUR = VAEConfig(32, 3)


@pytest.fixture(scope="module")
def purifiers() -> Any:
    made = {
        config.channels: Purifier(random_checkpoint(config), engine="torch", precision="fp32", device="cpu")
        for config in (VAEConfig(), COLOUR)
    }
    yield made
    for purifier in made.values():
        purifier.close()


def same(ours: Any, right: Any, share: float = 0.01) -> None:
    assert isinstance(ours, torch.Tensor)
    assert tuple(ours.shape) == right.shape
    if ours.dtype == torch.uint8:
        # Crops may differ by a level at ties, and the purifier may make two of one.
        difference = np.abs(ours.cpu().numpy().astype(np.int16) - right)
        assert difference.max(initial=0) <= 3
        assert (difference > 0).sum() <= share * difference.size
    else:
        np.testing.assert_allclose(ours.cpu().numpy(), right, atol=2e-3)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (20, 50)], ids=str)
@pytest.mark.parametrize("boxes", [BOXES, BOXES[:0], BOXES[2:3] + 0.4], ids=["boxes", "none", "parts of pixels"])
def test_regions_of_a_frame(purifiers: Any, channels: int, size: Any, boxes: Any) -> None:
    frame = padded(pixels(90, 120, channels))
    for given in (frame, frame[..., 0] if channels == 1 else frame[:, 10:]):
        expected = purifiers[channels].regions(np.ascontiguousarray(given), boxes, size=size, paste=True)
        found = purifiers[channels].regions(torch.from_numpy(given), boxes, size=size, paste=True)
        for ours, right in (
            (found.images, expected.images),
            (found.scores, expected.scores),
            (found.frame, expected.frame),
        ):
            same(ours, right)
        assert np.array_equal(found.boxes, expected.boxes)
        assert purifiers[channels].regions(torch.from_numpy(given), boxes).frame is None


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("overlap", [None, 0, 14])
def test_tiles_of_a_frame(purifiers: Any, channels: int, overlap: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions_on_gpu, "_MOST_ROWS", 120)  # fewer than there are tiles: cut out in several launches
    frame = padded(pixels(120, 110, channels))
    expected = purifiers[channels].tiles(np.ascontiguousarray(frame), overlap=overlap)
    found = purifiers[channels].tiles(torch.from_numpy(frame), overlap=overlap)
    same(found.frame, expected.frame)
    same(found.scores, expected.scores)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (torch.zeros(40, 40), TypeError, "frame: expected uint8 in 0..255, got torch.float32"),
        (torch.zeros(40, 40, 3, dtype=torch.uint8), ValueError, r"expected \(H, W\) or \(H, W, 1\), got \(40, 40, 3\)"),
        (torch.zeros(40, 80, dtype=torch.uint8)[:, ::2], ValueError, "expected pixels one after the other"),
        (torch.zeros(20, 40, dtype=torch.uint8), ValueError, "expected at least 28x28 pixels, got 40x20"),
        (torch.zeros(28, 65536, dtype=torch.uint8), ValueError, "expected at most 65535 pixels a side"),
    ],
    ids=["float", "colour", "columns left out", "small", "wide"],
)
def test_wrong_frames_say_what_was_expected(purifiers: Any, frame: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        purifiers[1].tiles(frame)


def test_a_tensor_in_host_memory_is_told_to_be_a_numpy_array(purifiers: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a uint8 NumPy array in 0\.\.255, got Tensor"):
        purifiers[1].regions(torch.zeros(40, 40, dtype=torch.uint8), BOXES[:1])


def test_every_driver_call_of_the_launch_is_in_nvidias_bindings() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    for name in (
        "cuInit",
        "cuDeviceGet",
        "cuCtxPopCurrent",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuLaunchKernel",
    ):
        assert hasattr(driver, name)


def test_the_bindings_take_the_arguments_of_a_launch() -> None:
    """They read the arguments before they look for a driver; without one they say that there is none."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    done = (driver.CUresult.CUDA_SUCCESS,)
    queued: list[Any] = []
    kernels: Any = object.__new__(cuda.Kernels)
    kernels._context, kernels._functions = None, {"crop_boxes": driver.CUfunction(0)}
    kernels._cuda = SimpleNamespace(
        CUstream=driver.CUstream, cuCtxPushCurrent=lambda context: done, cuCtxPopCurrent=lambda: (*done, None),
        cuLaunchKernel=lambda *arguments: queued.append(arguments) or done,
    )  # fmt: skip
    kernels.launch("crop_boxes", (3, 5), 7, ctypes.c_void_p(4096), 5, ctypes.c_void_p(0), -1)
    (arguments,) = queued
    assert arguments[1:8] == (3, 5, 1, cuda.BLOCK, 1, 1, 0)
    assert int(arguments[8]) == 7
    assert arguments[9] == ((4096, 5, 0, -1), (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int))
    if cuda.has_device():
        (result,) = driver.cuLaunchKernel(*arguments)
        assert int(result) != 0  # there is no such function
    else:
        with pytest.raises(Exception, match="NVIDIA driver library"):
            driver.cuLaunchKernel(*arguments)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("channels", [1, 3])
def test_regions_and_tiles_on_a_gpu(channels: int) -> None:
    """Written late on a stream of the caller's, and overwritten at once; against the same on the host."""
    config = COLOUR if channels == 3 else VAEConfig()
    frame = pixels(480, 640, channels)
    boxes = np.concatenate([BOXES * 4, BOXES])
    with Purifier(random_checkpoint(config), engine="torch", device="cuda") as purifier:
        on_host = purifier.regions(frame, boxes, size=(20, 50), paste=True), purifier.tiles(frame)
        stream = torch.cuda.Stream()
        buffer = torch.zeros(480, 700, channels, dtype=torch.uint8, device="cuda")
        late = buffer[:, 30:670]
        purifier.tiles(late)  # kernels are compiled and loaded
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms: a wrong order would read zeros
            late.copy_(torch.from_numpy(frame), non_blocking=True)
            found = purifier.regions(late, boxes, size=(20, 50), paste=True), purifier.tiles(late)
            buffer.zero_()
        stream.synchronize()
        for name in ("images", "scores", "frame"):
            same(getattr(found[0], name), getattr(on_host[0], name))
        # On the host tiles are purified in batches of other sizes, whose kernels may round in another way.
        same(found[1].frame, on_host[1].frame, share=0.2)
        same(found[1].scores, on_host[1].scores)
        assert found[0].frame.is_cuda
