"""What the machine can do: the rate of a large matrix product, against which the engines' share is reported."""

from __future__ import annotations

import pytest

from bench.conftest import Measure, Record
from bench.worker import MATMUL_SIZE, Worker

# Relative error of a sum of MATMUL_SIZE positive products: inputs and result are rounded to this many bits.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        *(pytest.param("cuda", precision, marks=pytest.mark.gpu) for precision in ("fp32", "fp16", "bf16")),
    ],
    indirect=["device"],
)
def test_matmul(
    device: str, precision: str, quick: bool, measure: Measure, record: Record, warm_worker: Worker
) -> None:
    seconds: list[float] = []

    def multiply() -> dict[str, float]:
        answer = warm_worker.ask("matmul", precision=precision, device=device)
        seconds.append(answer["seconds"])
        return answer

    rounds, warmup = (1, 0) if quick else (5, 1)
    answer = measure("matrix product", multiply, rounds=rounds, warmup_rounds=warmup)
    assert answer["relative_error"] < TOLERANCE[precision]
    side = MATMUL_SIZE * (1 if device == "cpu" else 4)
    record(
        "matmul", f"matrix product {side} x {side}, {precision}, {device}", seconds=seconds[warmup:],
        precision=precision, device=device, flop=answer["flop"],
    )  # fmt: skip
