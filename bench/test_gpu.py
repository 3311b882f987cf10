"""GPU engines: by CUDA events where the images are in GPU memory already, and host to host by the clock.

Latency at batch 1, throughput by batch and by streams, a timeline of copies and computing, time to ready, what the
torch engine's fused layers bring, and whole frames. What they are compared with is in test_gpu_baselines.py; host to
host through ``Purifier`` is in test_engines.py.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest

from bench.conftest import Measure, Record
from bench.inputs import batches
from bench.timeline import STAGES, overlap
from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines import ENGINES, Engine

torch = pytest.importorskip("torch", reason="the benchmarks on a GPU are timed through torch, which is not installed")
from bench.gpu_timeline import trace  # noqa: E402
from bench.gpu_timing import WARMUP, counts, device_batches, float32, timed  # noqa: E402 - it imports torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

ON_GPU = {engine.name: engine for engine in ENGINES if "cuda" in engine.devices}
ROUNDS = {1: 1000, 64: 300, 256: 200, 4096: 30}
STREAMS = (1, 2, 4)
TRACED_STREAMS = (1, 3)
HOST_BATCH, HOST_PIECE = 4096, 256
FORMS_ROUNDS = {1: 500, 64: 200, 256: 200, 4096: 30}


def load(name: str, checkpoint: Checkpoint, **options: Any) -> Engine:
    if reason := ON_GPU[name].available("cuda"):
        pytest.skip(f"{name}: {reason}")
    return ON_GPU[name].load(checkpoint, device="cuda", **options)


@pytest.mark.parametrize("batch", ROUNDS)
@pytest.mark.parametrize("name", ON_GPU)
def test_engine_on_device(
    name: str, batch: int, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record
) -> None:
    # Two sets of batch sizes in all, for TensorRT builds engines for each.
    with load(name, checkpoint, max_batch=max(batch, 256), streams=1) as engine:
        turns, seconds = device_batches(batch, checkpoint.config.image_shape), []
        call = timed(lambda: engine.run_tensor(next(turns)), seconds)  # type: ignore[attr-defined]
        rounds = 5 if quick else ROUNDS[batch]
        measure(f"device, batch {batch}", call, rounds=rounds, warmup_rounds=WARMUP)
        given = next(turns)
        purified, _ = engine.run_tensor(given)  # type: ignore[attr-defined]
        expected = float32(checkpoint, given[:64])
        worst = (purified[:64].float() - expected).abs().max()
        assert worst <= 8.5, "the timed engine's numbers are wrong"
        record(
            "device", f"{name}, device memory", batch, seconds=seconds[WARMUP:], device="cuda",
            precision=engine.precision, largest_error_in_levels=float(worst), **counts(checkpoint, batch, 2),
        )  # fmt: skip


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_streams_host_to_host(
    name: str, streams: int, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record
) -> None:
    """With one stream copies and computing take turns; with more the copies of one piece hide behind another's."""
    inputs = itertools.cycle(batches(HOST_BATCH, checkpoint.config.image_shape, count=2))
    with load(name, checkpoint, max_batch=HOST_PIECE, streams=streams) as engine:
        purified = np.empty_like(next(inputs))
        rounds = 3 if quick else 30
        measure(
            f"{HOST_BATCH} images by streams", lambda: engine.run(next(inputs), out=purified),
            rounds=rounds, warmup_rounds=5,
        )  # fmt: skip
        record("engine", f"{name}, {streams} streams of {HOST_PIECE}", HOST_BATCH, device="cuda",
               precision=engine.precision, streams=streams, **counts(checkpoint, HOST_PIECE, 2))  # fmt: skip


@pytest.mark.parametrize("name", ON_GPU)
def test_latency_host_to_host(name: str, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record) -> None:
    """The engine alone, without the checks of ``Purifier``."""
    inputs = itertools.cycle(batches(1, checkpoint.config.image_shape))
    with load(name, checkpoint, max_batch=1) as engine:
        measure("engine, batch 1", lambda: engine.run(next(inputs)), rounds=20 if quick else 3000, warmup_rounds=50)
        record("engine", f"{name}, engine alone", device="cuda", precision=engine.precision)


@pytest.mark.parametrize("name", ON_GPU)
def test_time_to_ready(name: str, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record) -> None:
    """From a checkpoint in memory to the first result; engines that are built have been built before."""
    image = batches(1, checkpoint.config.image_shape)[0]
    load(name, checkpoint).close()
    seconds: list[float] = []

    def start() -> None:
        began = time.perf_counter()
        with load(name, checkpoint) as engine:
            engine.run(image)
            seconds.append(time.perf_counter() - began)

    measure("time to ready", start, rounds=1 if quick else 3)
    record("startup", f"{name} on the GPU: load to first result", seconds=seconds)


@pytest.mark.parametrize("streams", TRACED_STREAMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_timeline(
    name: str, streams: int, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record
) -> None:
    """CUDA events around every copy and computation, and the share of the shorter of the two that ran beside the other.

    With one stream everything is in a row, which shows that the events tell the truth; with three, copies hide.
    """
    images = batches(HOST_BATCH, checkpoint.config.image_shape, count=1)[0]
    with load(name, checkpoint, max_batch=HOST_PIECE, streams=streams) as engine:
        expected = engine.run(images)[0]
        trace(engine, images)
        spans = measure(f"timeline, {streams} streams", lambda: trace(engine, images), rounds=1)
        assert np.array_equal(engine.run(images)[0], expected), "the engine is not what it was before"
    assert len(spans) == len(STAGES) * HOST_BATCH // HOST_PIECE
    found = overlap(spans)
    record(
        "timeline", f"{name}, {streams} streams of {HOST_PIECE}", HOST_BATCH, seconds=[found.elapsed], device="cuda",
        engine=name, streams=streams, overlap=found._asdict(), spans=[list(span) for span in spans],
    )  # fmt: skip
    if streams == 1:
        assert found.both == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch", FORMS_ROUNDS)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "chosen"])
def test_forms_of_the_torch_engine(
    plain: bool, batch: int, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record
) -> None:
    """Convolution, bias and ReLU apart, against each layer's fastest form; in a CUDA graph, as the engine runs them."""
    from defense_vae_fast.engines.torch import _CUDASlot, _cudnn_choice
    from defense_vae_fast.nn.folded import FoldedNetwork

    device = torch.device("cuda", torch.cuda.current_device())
    turns, seconds = device_batches(batch, checkpoint.config.image_shape), []
    given = next(turns)
    purified, scores = torch.empty_like(given), torch.empty(batch, device=device)
    with torch.no_grad(), _cudnn_choice:
        network = FoldedNetwork(checkpoint, torch.float16, device, plain=plain)
        slot = _CUDASlot(device)
        slot.prepare(network, torch.zeros_like(given))
        call = timed(lambda: slot.run_tensor(next(turns), purified, scores), seconds)
        rounds = 5 if quick else FORMS_ROUNDS[batch]
        measure(f"forms, batch {batch}", call, rounds=rounds, warmup_rounds=WARMUP)
        slot.run_tensor(given, purified, scores)
    worst = (purified[:64].float() - float32(checkpoint, given[:64])).abs().max()
    assert worst <= 8.5, "the timed network's numbers are wrong"
    record(
        "forms", f"torch, {'plain' if plain else 'chosen'} forms", batch, seconds=seconds[WARMUP:], device="cuda",
        precision="fp16", forms=network.chosen().get(batch, {}), largest_error_in_levels=float(worst),
        **counts(checkpoint, batch, 2),
    )  # fmt: skip


@pytest.mark.parametrize("work", ["100 boxes, pasted back", "tiles"])
def test_whole_frames(work: str, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record) -> None:
    """A frame of 1920x1080 in GPU memory: cut out, resized, purified and put together again by csrc/regions.cu."""
    channels = checkpoint.config.channels
    random = np.random.default_rng(0)
    frames = itertools.cycle(
        [torch.from_numpy(random.integers(0, 256, (1080, 1920, channels), np.uint8)).cuda() for _ in range(4)]
    )
    corners, sides = random.integers(0, (1700, 860), (100, 2)), random.integers(16, 220, (100, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1)
    seconds: list[float] = []
    with Purifier(checkpoint, engine="torch", device="cuda", max_batch=4096) as purifier:

        def run(frame: Any) -> Any:
            return purifier.tiles(frame) if work == "tiles" else purifier.regions(frame, boxes, paste=True)

        call = timed(lambda: run(next(frames)), seconds)
        measure("1920x1080 in GPU memory", call, rounds=5 if quick else 50, warmup_rounds=5)
        given = next(frames)
        ours, right = run(given).frame.cpu().numpy(), run(given.cpu().numpy()).frame
    difference = np.abs(ours.astype(np.int16) - right)
    assert difference.max() <= 4, "the timed frames are wrong"
    record("frames", f"torch, 1920x1080, {work}", seconds=seconds[5:], device="cuda", precision="fp16",
           largest_difference_from_host=int(difference.max()))  # fmt: skip
