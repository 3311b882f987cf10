"""GPU engines: by CUDA events where the images are in GPU memory already, and host to host by the clock.

Latency at batch 1, throughput by batch and by streams, the share of the copies that is hidden, time to ready. What they
are compared with is in test_gpu_baselines.py; host to host through ``Purifier`` is in test_engines.py.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest

from bench.conftest import Measure, Record
from bench.inputs import batches
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines import ENGINES, Engine

torch = pytest.importorskip("torch", reason="the benchmarks on a GPU are timed through torch, which is not installed")
from bench.gpu_timing import WARMUP, counts, device_batches, float32, timed  # noqa: E402 - it imports torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

ON_GPU = {engine.name: engine for engine in ENGINES if "cuda" in engine.devices}
ROUNDS = {1: 1000, 64: 300, 256: 200, 4096: 30}
STREAMS = (1, 2, 4)
HOST_BATCH, HOST_PIECE = 4096, 256


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


@pytest.mark.parametrize("name", ON_GPU)
def test_copies_are_hidden(name: str, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record) -> None:
    """How much of the shorter of copying and computing runs beside the longer, with three streams and with one.

    With both alone known, a run that took ``total`` hid ``copy + compute - total``. Copies alone are those of the same
    pieces between pinned memory and the GPU; computing alone is the same batch in GPU memory.
    """
    shape = checkpoint.config.image_shape
    inputs = itertools.cycle(batches(HOST_BATCH, shape, count=2))
    here = next(device_batches(HOST_BATCH, shape))
    pinned = torch.empty_like(here, device="cpu").pin_memory()
    rounds = 3 if quick else 20

    def copies() -> None:
        for piece, other in zip(here.split(HOST_PIECE), pinned.split(HOST_PIECE), strict=True):
            piece.copy_(other, non_blocking=True)
            other.copy_(piece, non_blocking=True)

    def median(work: Any) -> float:
        seconds: list[float] = []
        call = timed(work, seconds)
        for _ in range(rounds + 3):
            call()
        return float(np.median(seconds[3:]))

    copying, totals = median(copies), {}
    for streams in (1, 3):
        with load(name, checkpoint, max_batch=HOST_PIECE, streams=streams) as engine:
            computing = median(lambda: engine.run_tensor(here))  # type: ignore[attr-defined]
            seconds: list[float] = []
            for _ in range(rounds + 3):
                start = time.perf_counter()
                engine.run(next(inputs))
                seconds.append(time.perf_counter() - start)
            totals[streams] = float(np.median(seconds[3:]))
            hidden = (copying + computing - totals[streams]) / min(copying, computing)
            totals[f"hidden share, {streams} streams"] = hidden
    measure("copies", copies, rounds=1)
    record("copy", f"{name}: copies of {HOST_BATCH} images alone", seconds=[copying], device="cuda",
           bytes=2 * here.numel(), compute_alone=computing,
           **{str(key): value for key, value in totals.items()})  # fmt: skip
