"""The plain eager torch module as the paper's authors released it: the baseline of every engine.

fp32, contiguous NCHW, BatchNorm unfolded, transposed convolutions as such, both heads, mean latent, sigmoid at the end.
On the CPU it is timed twice: with the C library's allocator keeping freed memory (warm, the fair comparison) and as a
program normally starts (cold), when fresh activations are page-faulted in at every call.
"""

from __future__ import annotations

import pytest

from bench.conftest import Measure, Record
from bench.worker import Worker
from defense_vae_fast.checkpoint import Checkpoint

ROUNDS = {1: 500, 64: 40, 256: 12}
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-3}  # torch lets convolutions on CUDA round their inputs to TF32


@pytest.mark.parametrize("batch", ROUNDS)
@pytest.mark.parametrize(
    ("device", "warm"),
    [("cpu", True), ("cpu", False), pytest.param("cuda", True, marks=pytest.mark.gpu)],
    indirect=["device"],
    ids=["cpu-warm", "cpu-cold", "cuda"],
)
def test_released(
    request: pytest.FixtureRequest,
    device: str,
    warm: bool,
    batch: int,
    quick: bool,
    checkpoint: Checkpoint,
    measure: Measure,
    record: Record,
) -> None:
    worker: Worker = request.getfixturevalue("warm_worker" if warm else "cold_worker")
    seconds: list[float] = []

    def purify() -> dict[str, list[list[int]]]:
        answer = worker.ask("released", batch=batch, device=device)
        seconds.append(answer["seconds"])
        return answer

    rounds = max(3, ROUNDS[batch] // 10) if quick else ROUNDS[batch]
    warmup = max(3, rounds // 10)
    answer = measure(f"purify, batch {batch}", purify, rounds=rounds, warmup_rounds=warmup)
    latent = checkpoint.config.latent_dim
    assert answer["shapes"] == [[batch, *checkpoint.config.image_shape], [batch, latent], [batch, latent]]
    check = worker.ask("released_check")
    assert check["error"] < TOLERANCE[device]
    assert check["spread"] > 0.01  # constant images would make every comparison with them an empty one
    name = f"released {device} fp32, {'warm allocator' if warm else 'as started'}"
    record(
        "released", name, batch, seconds=seconds[warmup:],
        precision="fp32", device=device, warm_allocator=warm, rms_error=check["error"],
    )  # fmt: skip
