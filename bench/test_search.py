"""Defense-GAN's search over L x R, eager fp32, with the allocator warm.

Its generator has random weights: time does not depend on them. Some eighty candidates travel in one batch, whatever R
is, where the cost of a candidate has stopped falling; a single image with one start would pay more.
"""

from __future__ import annotations

from itertools import product

import pytest

from bench.conftest import Measure, Record
from bench.worker import Worker

IMAGES = {1: 64, 5: 16, 10: 8, 20: 4}  # by R
GPU_FACTOR = 32  # a GPU needs more candidates at once to be busy
ROUNDS = {25: 3, 50: 2}  # by L; a long search is its own average
# The grid that the fit is made over, and the rest of the paper's Table 4.
SEARCHES = [*product((25, 50, 100, 200), (1, 5, 10)), (400, 10), (200, 20), (400, 20)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize(("steps", "restarts"), SEARCHES)
def test_search(
    device: str, steps: int, restarts: int, quick: bool, measure: Measure, record: Record, warm_worker: Worker
) -> None:
    images = 2 if quick else IMAGES[restarts] * (1 if device == "cpu" else GPU_FACTOR)
    seconds: list[float] = []

    def search() -> dict[str, list[float]]:
        answer = warm_worker.ask("search", steps=steps, restarts=restarts, images=images, device=device)
        seconds.append(answer["seconds"])
        return answer

    # The library's warm-up is a whole search; a few steps in the same batch do.
    warm_worker.ask("search", steps=3, restarts=restarts, images=images, device=device)
    answer = measure("Defense-GAN's search", search, rounds=1 if quick else ROUNDS.get(steps, 1))
    assert len(answer["after"]) == images
    assert all(after < before for after, before in zip(answer["after"], answer["before"], strict=True))
    record(
        "search", f"Defense-GAN {device}, L={steps} R={restarts}", images, seconds=seconds,
        precision="fp32", device=device, steps=steps, restarts=restarts,
    )  # fmt: skip
