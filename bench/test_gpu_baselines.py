"""What GPU engines are compared with, on the same GPU: eager torch, torch.compile, Defense-GAN's search, copies."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bench.conftest import Measure, Record
from bench.inputs import as_float, batches
from defense_vae_fast.checkpoint import Checkpoint

torch = pytest.importorskip("torch", reason="the baselines are torch's, which is not installed")
from bench.gpu_timing import WARMUP, counts, timed  # noqa: E402 - it imports torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

ROUNDS = {1: 1000, 256: 200, 4096: 30}
COPY_BYTES = 1 << 30


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *((name, batch) for name in ("eager fp32", "eager fp16 channels_last") for batch in (1, 256, 4096)),
        *(("torch.compile max-autotune fp16", batch) for batch in (1, 4096)),  # a minute or more each
    ],
)
def test_plain_torch_on_device(
    name: str, batch: int, quick: bool, checkpoint: Checkpoint, measure: Measure, record: Record
) -> None:
    from defense_vae_fast.nn.model import DefenseVAE

    half = "fp16" in name
    dtype = torch.float16 if half else torch.float32
    memory_format = torch.channels_last if half else torch.contiguous_format
    model = DefenseVAE.from_checkpoint(checkpoint).eval().to("cuda", dtype, memory_format=memory_format)

    def purify(images: Any) -> Any:
        return model.purify(images)

    if "compile" in name:
        if _no_compiler():
            pytest.skip("torch.compile needs Triton and a C compiler")
        purify = torch.compile(purify, mode="max-autotune")  # with CUDA graphs
    given = [
        torch.from_numpy(as_float(images)).to("cuda", dtype).contiguous(memory_format=memory_format)
        for images in batches(batch, checkpoint.config.image_shape, count=2)
    ]
    turns, seconds = itertools.cycle(given), []
    with torch.inference_mode():
        call = timed(lambda: purify(next(turns)), seconds)
        rounds = 5 if quick else ROUNDS[batch]
        purified = measure(f"device, batch {batch}", call, rounds=rounds, warmup_rounds=WARMUP)
    assert torch.isfinite(purified).all()
    assert float(purified.float().std()) > 0.01
    record(
        "device", f"{name}, device memory", batch, seconds=seconds[WARMUP:], device="cuda",
        precision="fp16" if half else "fp32", **counts(checkpoint, batch, 2 if half else 4),
    )  # fmt: skip


def _no_compiler() -> bool:
    from torch.utils._triton import has_triton

    return not has_triton()


@pytest.mark.parametrize("images", [1, 64, 256])
def test_search_one_image_at_a_time_and_in_batches(images: int, quick: bool, measure: Measure, record: Record) -> None:
    """Defense-GAN at L=200, R=10; test_search.py has the rest of the grid at its own batch."""
    from training.baselines.defense_gan import LATENT_DIM, Generator, reconstruct

    generator = Generator(seed=0).eval().requires_grad_(False).cuda()
    with torch.no_grad():
        targets = generator(torch.randn(images, LATENT_DIM, generator=torch.Generator().manual_seed(1)).cuda())
    reconstruct(generator, targets, 3, 10)
    steps, seconds = 20 if quick else 200, []
    found = measure(
        "Defense-GAN's search", timed(lambda: reconstruct(generator, targets, steps, 10), seconds),
        rounds=1 if quick else 3,
    )  # fmt: skip
    assert (found.errors < reconstruct(generator, targets, 0, 10).errors).all()
    record("device", f"Defense-GAN L={steps} R=10, {images} at a time", images, seconds=seconds, device="cuda",
           precision="fp32", steps=steps, restarts=10)  # fmt: skip


@pytest.mark.parametrize("way", ["within the GPU", "to the GPU", "from the GPU"])
def test_copy_bandwidth(way: str, quick: bool, measure: Measure, record: Record) -> None:
    size = COPY_BYTES // (16 if quick else 1)
    here = torch.ones(size, dtype=torch.uint8, device="cuda")
    there = (
        torch.zeros(size, dtype=torch.uint8, device="cuda")
        if "within" in way
        else torch.ones(size, dtype=torch.uint8).pin_memory()
    )
    source, target = (there, here) if "to" in way.split() else (here, there)
    seconds: list[float] = []
    measure(
        "copies",
        timed(lambda: target.copy_(source, non_blocking=True), seconds),
        rounds=3 if quick else 20,
        warmup_rounds=3,
    )
    assert int(target[-1]) == 1
    record("copy", f"copy {way}", seconds=seconds[3:], device="cuda", bytes=size * (2 if "within" in way else 1))
