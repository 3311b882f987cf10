"""Kernels for camera frames: the numpy twins against independent ones, the kernels' own source, run on the CPU, against
the twins, and the same source compiled for every GPU generation. The run on a GPU is in test_gpu.py.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cpu_kernels import CAPABILITIES, REGISTERS, compiled, resources
from PIL import Image
from torch.nn import functional as F

from defense_vae_fast import cuda, frames
from defense_vae_fast.frames import FILTERS, ORDERS, Frame, gather_frames, pack, reconstruction_error, scatter_frames


def frame(height, width, order, seed=0):
    shape = (height, width) if order == "grey" else (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_tensor(image):
    return torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1)[None].astype(np.float64))


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (37, 61), (480, 640), (13, 28)], ids=str)
def test_bilinear_is_torchs(shape):
    image = frame(*shape, "rgb")
    expected = F.interpolate(as_tensor(image), (28, 28), mode="bilinear", align_corners=False)[0] / 255
    ours = gather_frames([(image, "rgb")], 3, 28, "bilinear")[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2**-11)


@pytest.mark.parametrize("shape", [(28, 28), (56, 84), (280, 28)], ids=str)
def test_area_is_torchs_where_it_divides(shape):
    image = frame(*shape, "grey")
    expected = F.interpolate(as_tensor(image), (28, 28), mode="area")[0] / 255
    np.testing.assert_allclose(gather_frames([(image, "grey")], 1, 28, "area")[0], expected, rtol=0, atol=2**-11)


def test_area_is_pils_box_where_it_does_not():
    image = frame(53, 97, "grey")
    box = np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BOX, reducing_gap=None), np.float64)
    ours = 255 * gather_frames([(image, "grey")], 1, 28, "area")[0, 0].astype(np.float64)
    # PIL's box takes whole pixels, by where their centres are; ours takes parts of them. They agree on average.
    assert abs(ours.mean() - image.mean()) < 0.2
    assert np.corrcoef(ours.ravel(), box.ravel())[0, 1] > 0.8


def test_grey_of_colours_is_pils():
    image = frame(28, 28, "rgb")
    expected = np.asarray(Image.fromarray(image).convert("L"), np.float64)
    ours = gather_frames([(image, "rgb"), (image[..., ::-1], "bgr")], 1, 28, "area").astype(np.float64) * 255
    np.testing.assert_allclose(ours[:, 0], np.broadcast_to(expected, (2, 28, 28)), rtol=0, atol=0.7)


def test_colours_of_grey_are_three_times_the_same():
    image = frame(28, 28, "grey")
    gathered = gather_frames([(image, "grey")], 3, 28, "bilinear")
    assert np.array_equal(gathered[0, 0], gathered[0, 1])
    assert np.array_equal(gathered[0, 0], gathered[0, 2])


@pytest.mark.parametrize("order", ORDERS)
def test_a_frame_of_the_networks_size_survives_the_round_trip(order):
    image = frame(32, 32, order)
    back = np.zeros_like(image)
    scatter_frames(gather_frames([(image, order)], 1 if order == "grey" else 3, 32, "area"), [(back, order)], "area")
    assert np.array_equal(back, image)


# --- the kernels' own source, on the CPU -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """csrc/frames.cu compiled by the C++ compiler, as functions on numpy arrays."""
    return compiled(cuda.FRAMES, tmp_path_factory.mktemp("frames"))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


class Framed:
    """A frame inside a larger buffer, so that a wrong pitch or a write beside it shows."""

    def __init__(self, height, width, order, seed=0, margin=7):
        channels = 1 if order == "grey" else 3
        row = width * channels
        self.buffer = np.random.default_rng(seed).integers(0, 256, (height + 2, row + margin), dtype=np.uint8)
        self.before = self.buffer.copy()
        inside = self.buffer[1:-1, 3 : 3 + row]
        self.array = inside if order == "grey" else inside.reshape(height, width, 3, copy=False)
        self.order = order
        self.frame = Frame(self.array.ctypes.data, height, width, row + margin, order)

    def beside_is_untouched(self):
        mask = np.ones(self.buffer.shape, bool)
        mask[1:-1, 3 : 3 + self.frame.width * self.frame.bytes_per_pixel] = False
        return np.array_equal(self.buffer[mask], self.before[mask])


SHAPES = [(28, 28), (1, 1), (31, 17), (97, 61), (5, 200)]


def framed(orders=ORDERS):
    return [Framed(*shape, order, seed) for seed, (shape, order) in enumerate((s, o) for s in SHAPES for o in orders)]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("blocks", [1, 4])
def test_gather(kernels, filter, channels, blocks):
    given = framed()
    table = np.concatenate([pack([f.frame for f in given]), np.zeros(1, frames.TABLE)])  # an empty row pads
    batch = np.full((len(table), channels, 28, 28), np.nan, np.float16)
    kernels.run_gather_frames(len(table), blocks, pointer(table), pointer(batch), channels, 28, FILTERS.index(filter))
    expected = gather_frames([(f.array, f.order) for f in given], channels, 28, filter)
    # A step of float16 in [0.5, 1), for float32 sums that fall to the other side of a tie.
    np.testing.assert_allclose(batch[:-1].astype(np.float64), expected.astype(np.float64), rtol=0, atol=2**-11)
    assert (batch[-1] == 0).all()
    assert all(f.beside_is_untouched() and np.array_equal(f.buffer, f.before) for f in given)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("blocks", [1, 3])
def test_scatter(kernels, filter, channels, blocks):
    targets = framed()
    purified = np.random.default_rng(1).random((len(targets) + 1, channels, 28, 28)).astype(np.float16)
    table = np.concatenate([pack([f.frame for f in targets]), np.zeros(1, frames.TABLE)])
    kernels.run_scatter_frames(
        len(table), blocks, pointer(table), pointer(purified), channels, 28, FILTERS.index(filter)
    )
    expected = [(np.zeros_like(f.array), f.order) for f in targets]
    scatter_frames(purified[:-1], expected, filter)
    for target, (wanted, _) in zip(targets, expected, strict=True):
        difference = np.abs(target.array.astype(int) - wanted)
        assert difference.max() <= 1  # a tie of the rounding
        assert (difference > 0).mean() <= 0.01
        assert target.beside_is_untouched()


@pytest.mark.parametrize("values", [1, 7, 256, 784, 3 * 32 * 32])
def test_reconstruction_error(kernels, values):
    random = np.random.default_rng(values)
    images, purified = (random.random((3, values)).astype(np.float16) for _ in range(2))
    scores = np.full(3, np.nan, np.float32)
    kernels.run_reconstruction_error(3, pointer(images), pointer(purified), pointer(scores), values)
    np.testing.assert_allclose(scores, reconstruction_error(images, purified), rtol=1e-5)


def test_the_table_has_the_kernels_layout(kernels):
    assert kernels.frame_bytes() == frames.TABLE.itemsize == 24


# --- compiled for GPUs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvrtc():
    try:
        return {capability: cuda.compile_kernels(cuda.FRAMES, capability) for capability in CAPABILITIES}
    except cuda.CompileError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_keep_within_their_resources(nvrtc, capability):
    cubin, report = nvrtc[capability]
    assert cubin.startswith(b"\x7fELF")
    for name in cuda.KERNELS[cuda.FRAMES]:
        assert name.encode() in cubin
        used = resources(report, name)
        assert used.registers <= REGISTERS
        assert used.shared == (4 * cuda.BLOCK if name == "reconstruction_error" else 0)
        assert used.stack == [0, 0, 0]  # frame, spilled stores and loads: no local memory


def test_the_second_compilation_comes_from_the_cache(nvrtc, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    monkeypatch.setattr(
        cuda, "compile_kernels", lambda source, capability: made.append(capability) or nvrtc[capability]
    )
    assert cuda.kernels(cuda.FRAMES, "9.0") == cuda.kernels(cuda.FRAMES, "9.0") == nvrtc["9.0"][0]
    assert made == ["9.0"]
    assert cuda.kernels(cuda.FRAMES, "8.0") == nvrtc["8.0"][0]
    (cubin,) = [path for path in tmp_path.rglob("*.cubin") if path.read_bytes() == nvrtc["9.0"][0]]
    for damage in (lambda: cubin.write_bytes(b"\x7fELF"), lambda: cubin.with_suffix(".json").write_text("[]")):
        damage()
        assert cuda.kernels(cuda.FRAMES, "9.0") == nvrtc["9.0"][0]
    assert made == ["9.0", "8.0", "9.0", "9.0"]


def test_a_mistake_in_a_kernel_is_told(nvrtc, tmp_path):
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("extern C __global__ void gather_frames() {}")
    with pytest.raises(cuda.CompileError, match=r"(?s)wrong\.cu for sm_90: .*explicit type is missing"):
        cuda.compile_kernels(wrong, "9.0")


# --- Frame -----------------------------------------------------------------------------------------------------------


def on_device(array):
    """What an array in device memory shows of itself; nothing is read through it."""
    return SimpleNamespace(
        __cuda_array_interface__={
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (4096, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
        }
    )


def test_frames_of_device_arrays():
    colours, grey = frame(48, 64, "rgb"), frame(48, 64, "grey")
    assert Frame.of(on_device(colours), "bgr") == Frame(4096, 48, 64, 192, "bgr")
    assert Frame.of(on_device(grey)) == Frame(4096, 48, 64, 64, "grey")
    assert Frame.of(on_device(grey[..., None])) == Frame(4096, 48, 64, 64, "grey")
    assert Frame.of(on_device(colours[:20, 10:30]), "rgb") == Frame(4096, 20, 20, 192, "rgb")


@pytest.mark.parametrize(
    ("array", "order", "message"),
    [
        (frame(4, 4, "rgb"), None, "expected order 'rgb' or 'bgr'"),
        (frame(4, 4, "grey"), "rgb", "expected order 'rgb' or 'bgr'"),
        (frame(4, 4, "rgb")[:, ::2], "rgb", "pixels one after the other"),
        (frame(4, 4, "rgb")[::-1], "rgb", "pixels one after the other"),
        (frame(4, 4, "rgb")[..., :2], "rgb", "expected uint8"),
        (frame(4, 4, "rgb").astype(np.int8), "rgb", "expected uint8"),
        (frame(4, 4, "rgb")[None], "rgb", "expected uint8"),
    ],
    ids=["no order", "order of grey", "columns left out", "upside down", "two channels", "int8", "a batch"],
)
def test_wrong_frames_say_what_was_expected(array, order, message):
    with pytest.raises(ValueError, match=message):
        Frame.of(on_device(array), order)


@pytest.mark.parametrize(
    "values",
    [
        {"order": "rgba"},
        {"height": 0},
        {"width": -1},
        {"width": 1 << 20},
        {"pitch": 11},
        {"pitch": -12},
        {"address": 0},
    ],
    ids=str,
)
def test_impossible_frames_are_refused(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"Frame.{name}: expected"):
        Frame(**{"address": 4096, "height": 4, "width": 4, "pitch": 12, "order": "rgb", **values})
