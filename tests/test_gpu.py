"""Engines and kernels on a GPU: ``pytest -m gpu``. Each engine that can work is held to the same promises."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import random_checkpoint

from defense_vae_fast import Purifier, cuda, frames
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import load_checkpoint
from defense_vae_fast.engines import ENGINES
from defense_vae_fast.engines.base import DeviceMemoryError
from defense_vae_fast.engines.tensorrt import TensorRTEngine
from defense_vae_fast.engines.torch import TorchEngine
from defense_vae_fast.frames import FILTERS, ORDERS, Frame
from defense_vae_fast.nn.model import DefenseVAE

pytestmark = pytest.mark.gpu

ON_GPU = {engine.name: engine for engine in ENGINES if "cuda" in engine.devices}
COUNTS = [1, 2, 7, 8, 9, 33, 64, 100, 257]


def pixels(count, shape=(28, 28, 1), seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return levels, np.ascontiguousarray(levels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint("fashion_mnist")


def load(name, checkpoint, **options):
    if reason := ON_GPU[name].available("cuda"):
        pytest.skip(reason)
    return ON_GPU[name].load(checkpoint, device="cuda", **options)


@pytest.fixture(scope="module", params=list(ON_GPU))
def engine(request, shipped):
    with load(request.param, shipped, max_batch=64, streams=3) as loaded:
        yield loaded


def float32(checkpoint, images):
    """Purified images and scores by the plain module in float32 on the CPU."""
    given = torch.from_numpy(images)
    with torch.no_grad():
        purified = DefenseVAE.from_checkpoint(checkpoint).purify(given)
    return purified.numpy(), (given - purified).abs().mean((1, 2, 3)).numpy()


@pytest.fixture(scope="module")
def reference(shipped):
    return lambda images: float32(shipped, images)


def test_fp16_is_within_two_levels_of_fp32_at_every_pixel(engine, reference, demo_images):
    images = np.ascontiguousarray(demo_images[0].numpy(), np.float32) / np.float32(255)
    expected, expected_scores = reference(images)
    purified, scores = engine.run(images)
    assert np.abs(purified - expected).max() <= 2 / 255
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1 / 255)
    levels = np.ascontiguousarray(demo_images[0].numpy().transpose(0, 2, 3, 1))
    as_bytes, byte_scores = engine.run(levels)
    assert np.abs(as_bytes - 255 * expected.transpose(0, 2, 3, 1)).max() <= 2.5
    np.testing.assert_allclose(byte_scores, expected_scores, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("count", COUNTS)
def test_every_batch_size(engine, reference, count):
    levels, images = pixels(count)
    expected, _ = reference(images)
    assert np.abs(engine.run(images)[0] - expected).max() <= 8 / 255
    assert np.abs(engine.run(levels)[0] - 255 * expected.transpose(0, 2, 3, 1)).max() <= 8.5


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("name", ON_GPU)
def test_threads_and_streams_get_the_bytes_of_one(name, shipped, streams):
    levels, images = pixels(300)
    batches = [levels[:1], images[1:2], levels[:9], images[5:70], levels, images]
    with load(name, shipped, max_batch=64, streams=streams) as loaded:
        alone = [loaded.run(batch) for batch in batches]
        ready = threading.Barrier(8)

        def work(index):
            ready.wait()
            order = np.random.default_rng(index).permutation(len(batches) * 5) % len(batches)
            for i in order:
                for got, expected in zip(loaded.run(batches[i]), alone[i], strict=True):
                    assert got.tobytes() == expected.tobytes()
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("name", ON_GPU)
def test_one_stream_and_four_give_the_same_bytes_for_the_same_bucket(name, shipped):
    """A batch is cut by the number of streams, so an image is compared in the same bucket."""
    levels, _ = pixels(8)
    results = []
    for streams in (1, 4):
        with load(name, shipped, max_batch=8, streams=streams) as loaded:
            results.append([loaded.run(levels)[0] for _ in range(2 * streams)])  # every worker takes a turn
    assert len({purified.tobytes() for purified in [*results[0], *results[1]]}) == 1


@pytest.mark.parametrize("name", ON_GPU)
def test_results_belong_to_the_caller_and_futures_to_their_frames(name, shipped):
    """Frames of one buffer, submitted while others are computed; batches are as the stream makes them."""
    if reason := ON_GPU[name].available("cuda"):
        pytest.skip(reason)
    levels, _ = pixels(200)
    with Purifier(shipped, engine=name, device="cuda") as purifier:
        expected = purifier(levels)
        kept = expected.copy()
        buffer = np.empty_like(levels[0])
        futures = []
        for image in levels:
            buffer[:] = image
            futures.append(purifier.submit(buffer))
        results = np.stack([future.result(60) for future in futures])
        # Another bucket may round in another way.
        assert np.abs(results.astype(np.int16) - expected).max() <= 2
        assert np.array_equal(expected, kept)


@pytest.mark.parametrize("count", COUNTS)
def test_torch_tensors_stay_on_the_gpu_in_the_order_of_their_stream(engine, count):
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    levels, images = pixels(count)
    for batch in (levels, images):
        expected, expected_scores = engine.run(batch)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros(batch.shape, dtype=torch.from_numpy(batch).dtype, device="cuda")
            torch.cuda._sleep(20_000_000)  # some 10 ms: a wrong order would purify zeros
            late.copy_(torch.from_numpy(batch), non_blocking=True)
            purified, scores = engine.run_tensor(late)
            late.zero_()  # reused at once: the engine must have read it by then
            total = purified.double().sum()
        stream.synchronize()
        assert np.array_equal(purified.cpu().numpy(), expected)
        assert np.array_equal(scores.cpu().numpy(), expected_scores)
        assert float(total) == pytest.approx(expected.astype(np.float64).sum())
        assert purified.is_cuda
        assert scores.is_cuda


@pytest.mark.parametrize("name", [name for name, engine in ON_GPU.items() if issubclass(engine, TensorRTEngine)])
def test_cupy_arrays_stay_on_the_gpu(name, shipped):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    levels, images = pixels(20)
    if reason := ON_GPU[name].available("cuda"):
        pytest.skip(reason)
    with Purifier(shipped, engine=name) as purifier:
        for batch in (levels, images, images.astype(np.float16)):
            expected, expected_scores = purifier(batch, return_score=True)
            purified, scores = purifier(cupy.asarray(batch), return_score=True)
            assert isinstance(purified, cupy.ndarray)
            assert isinstance(scores, cupy.ndarray)
            np.testing.assert_array_equal(cupy.asnumpy(purified), expected)
            np.testing.assert_array_equal(cupy.asnumpy(scores), expected_scores)
        with pytest.raises(ValueError, match="NaN"):
            purifier(cupy.full((1, 1, 28, 28), cupy.nan, cupy.float32))


@pytest.mark.parametrize("name", ON_GPU)
def test_what_does_not_fit_is_one_typed_error(name, shipped):
    if reason := ON_GPU[name].available("cuda"):
        pytest.skip(reason)
    if name == "torch":
        torch.cuda.set_per_process_memory_fraction(0.001)
        try:
            with pytest.raises(DeviceMemoryError, match="does not fit"):
                load(name, shipped, max_batch=4096)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        device = cuda.Device.get(cuda.current_ordinal())
        free, _ = device.free_memory()
        with device:
            hog = device.driver.mem_alloc(free - (64 << 20))
        try:
            with pytest.raises(DeviceMemoryError, match=r"wants \d+ bytes of the memory of .* and \d+ of \d+ are free"):
                load(name, shipped, max_batch=256, streams=16)
        finally:
            with device:
                hog.free()
    with load(name, shipped) as loaded:  # and the next one works
        loaded.run(pixels(1)[0])


@pytest.mark.parametrize("name", ON_GPU)
def test_closing_gives_the_memory_back(name, shipped):
    load(name, shipped).close()  # what libraries keep for good is there from now on
    free = [_free_memory(name)]
    for _ in range(3):
        load(name, shipped).close()
        free.append(_free_memory(name))
    assert min(free[1:]) >= free[0] - (32 << 20)


def _free_memory(name):
    if name == "torch":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return cuda.Device.get(cuda.current_ordinal()).free_memory()[0]


@pytest.mark.parametrize("name", ON_GPU)
def test_a_colour_network(name):
    config = VAEConfig(64, 3)
    checkpoint = random_checkpoint(config)
    _, images = pixels(9, (64, 64, 3))
    with load(name, checkpoint, max_batch=8) as loaded:
        assert np.abs(loaded.run(images)[0] - float32(checkpoint, images)[0]).max() <= 8 / 255


def test_torch_finds_the_same_kernels_for_every_stream(shipped):
    with load("torch", shipped, streams=4, max_batch=64) as loaded:
        assert isinstance(loaded, TorchEngine)
        levels, _ = pixels(64)
        results = {loaded._lane.free.get() for _ in range(4)}
        bytes_ = set()
        for slot in results:
            purified, scores = np.empty_like(levels), np.empty(64, np.float32)
            slot.start(levels)
            slot.finish(purified, scores)
            bytes_.add(purified.tobytes() + scores.tobytes())
            loaded._lane.free.put(slot)
        assert len(bytes_) == 1


# --- frames ----------------------------------------------------------------------------------------------------------


class OnGPU:
    """A frame with margins in device memory."""

    def __init__(self, device, height, width, order, seed):
        self.device = device
        channels = 1 if order == "grey" else 3
        self.host = np.random.default_rng(seed).integers(0, 256, (height, width * channels + 13), dtype=np.uint8)
        with device:
            self.memory = device.driver.mem_alloc(self.host.nbytes)
            device.driver.memcpy_htod(self.memory, self.host)
        self.frame = Frame(int(self.memory), height, width, self.host.shape[1], order)
        self.order = order

    def image(self, raw=None):
        raw = self.host if raw is None else raw
        inside = raw[:, : self.frame.width * self.frame.bytes_per_pixel]
        return inside if self.order == "grey" else inside.reshape(self.frame.height, self.frame.width, 3)

    def read(self):
        raw = np.empty_like(self.host)
        with self.device:
            self.device.driver.memcpy_dtoh(raw, self.memory)
        assert np.array_equal(raw[:, -13:], self.host[:, -13:])  # nothing beside the frame was written
        return self.image(raw)


SHAPES = [(28, 28), (480, 640), (31, 17), (1080, 1920)]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("name", [name for name, engine in ON_GPU.items() if issubclass(engine, TensorRTEngine)])
def test_frames_are_purified_where_they_lie(name, shipped, filter):
    with load(name, shipped, max_batch=8, streams=2) as loaded:
        loaded.prepare_frames(filter)
        device = loaded._gpu
        for turn in range(2):  # the second time through the captured graphs with other addresses
            given = [
                OnGPU(device, *shape, order, seed + turn)
                for seed, (shape, order) in enumerate((s, o) for s in SHAPES for o in ORDERS)
            ]
            results = [OnGPU(device, 60, 40, "rgb", 99) for _ in given]
            scores = loaded.run_frames([f.frame for f in given], [r.frame for r in results])
            batch = frames.gather_frames([(f.image(), f.order) for f in given], 1, 28, filter)
            purified, expected_scores = loaded.run(batch.astype(np.float32))
            np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-3)
            expected = [(np.zeros((60, 40, 3), np.uint8), "rgb") for _ in given]
            frames.scatter_frames(purified.astype(np.float16), expected, filter)
            for result, (wanted, _) in zip(results, expected, strict=True):
                assert np.abs(result.read().astype(int) - wanted).max() <= 2
            assert all(np.array_equal(f.read(), f.image()) for f in given)  # only read


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_kernels_agree_with_their_twins(filter, channels):
    if reason := cuda.missing():
        pytest.skip(reason)
    device = cuda.Device.get(cuda.current_ordinal())
    given = [OnGPU(device, *shape, order, 3) for shape in SHAPES for order in ORDERS]
    table = frames.pack([f.frame for f in given])
    count, values = len(given), channels * 28 * 28
    batch, scores = np.empty((count, channels, 28, 28), np.float16), np.empty(count, np.float32)
    gather, error = device.kernel("gather_frames", "PPiii"), device.kernel("reconstruction_error", "PPPi")
    scatter = device.kernel("scatter_frames", "PPiii")
    with device:
        stream = cuda.Stream(device)
        memory = cuda.Memory(device, stream)
        rows, images, sums = (memory.allocate(size) for size in (table.nbytes, batch.nbytes, scores.nbytes))
        driver, block = device.driver, (cuda.BLOCK, 1, 1)
        stream.synchronize()
        driver.memcpy_htod(rows, table)
        chosen = FILTERS.index(filter)
        gather.prepared_async_call((4, count, 1), block, stream.pycuda, rows, images, channels, 28, chosen)
        error.prepared_async_call((count, 1, 1), block, stream.pycuda, images, images, sums, values)
        stream.synchronize()
        driver.memcpy_dtoh(batch, images)
        driver.memcpy_dtoh(scores, sums)
        expected = frames.gather_frames([(f.image(), f.order) for f in given], channels, 28, filter)
        np.testing.assert_allclose(batch.astype(float), expected.astype(float), rtol=0, atol=2**-11)
        assert (scores == 0).all()
        scatter.prepared_async_call((64, count, 1), block, stream.pycuda, rows, images, channels, 28, chosen)
        stream.synchronize()
        wanted = [(np.zeros_like(f.image()), f.order) for f in given]
        frames.scatter_frames(batch, wanted, filter)
        for target, (image, _) in zip(given, wanted, strict=True):
            assert np.abs(target.read().astype(int) - image).max() <= 1
        memory.free()
        stream.free()


# --- a lost context --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, engine in ON_GPU.items() if issubclass(engine, TensorRTEngine)])
def test_a_sticky_error_poisons_the_engine_and_says_so(name):
    """In a process of its own, whose context is lost by it."""
    if reason := ON_GPU[name].available("cuda"):
        pytest.skip(reason)
    code = f"""
        import numpy as np
        from defense_vae_fast.checkpoint import load_checkpoint
        from defense_vae_fast.engines.tensorrt import PoisonedError
        from defense_vae_fast.engines import select
        from defense_vae_fast.frames import Frame
        engine = select("{name}").engine.load(load_checkpoint("fashion_mnist"), max_batch=1, streams=1)
        wrong = Frame(1 << 20, 100, 100, 300, "rgb")  # no memory is there
        told = 0
        for call in (lambda: engine.run_frames([wrong]), lambda: engine.run(np.zeros((1, 28, 28, 1), np.uint8))):
            try:
                call()
            except PoisonedError as error:
                told += "start a new process" in str(error)
        engine.close()
        print("told", told)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert "told 2" in done.stdout, done.stderr
