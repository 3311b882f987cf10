"""Every engine, device and precision: latency at batch 1, throughput at 64 and 256, through ``Purifier``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from bench.conftest import Measure, Record
from bench.inputs import Kind, batches
from bench.worker import Worker
from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines import ENGINES, EngineUnavailable, select

ROUNDS = {1: 1000, 64: 60, 256: 20}
# RMS error that rounding to the nearest of 256 levels adds at the most, and float32's own resolution at 1.
UINT8_ERROR, FLOAT32_ERROR = 0.5 / 255, float(np.finfo(np.float32).eps)
# int8 promises accuracy, not pixels; on random images, which it was not calibrated for, more than this is a fault.
INT8_ERROR = 5 / 255


class Case(NamedTuple):
    engine: str
    device: str
    precision: str


CASES = [
    Case(engine.name, device, precision)
    for engine in ENGINES
    for device in engine.devices
    for precision in engine.precisions
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, marks=pytest.mark.gpu if c.device == "cuda" else (), id="-".join(c)) for c in CASES],
)
def purifier(request: pytest.FixtureRequest, checkpoint_name: str) -> Iterator[Purifier]:
    """One engine at a time: two that keep threads slow each other."""
    case: Case = request.param
    try:
        select(case.engine, case.device, case.precision)
        made = Purifier.from_pretrained(
            checkpoint_name, engine=case.engine, device=case.device, precision=case.precision
        )
    except (EngineUnavailable, ValueError) as reason:  # a ValueError: the device does not do this precision
        pytest.skip(f"{' '.join(case)}: {reason}")
    with made:
        made.warmup()
        yield made


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("batch", ROUNDS)
def test_engine(
    request: pytest.FixtureRequest,
    purifier: Purifier,
    batch: int,
    kind: Kind,
    quick: bool,
    checkpoint: Checkpoint,
    measure: Measure,
    record: Record,
    warm_worker: Worker,
    tmp_path: Path,
) -> None:
    case: Case = request.node.callspec.params["purifier"]
    inputs = batches(batch, checkpoint.config.image_shape, kind)
    turns = itertools.count()
    given = 0

    def rotate() -> tuple[tuple[npt.NDArray[Any]], dict[str, Any]]:
        nonlocal given
        given = next(turns) % len(inputs)
        return (inputs[given],), {}

    rounds = max(3, ROUNDS[batch] // 20) if quick else ROUNDS[batch]
    warmup = max(3, rounds // 10)
    result = measure(f"purify, batch {batch}", purifier, setup=rotate, rounds=rounds, warmup_rounds=warmup)
    torch_imported = "torch" in sys.modules

    reference = tmp_path / "reference.npy"
    plain_precision = "bf16" if case.precision == "int8" else case.precision
    told = warm_worker.ask("reference", batch=batch, index=given, precision=plain_precision, path=str(reference))
    error, plain = _rms_error(result, np.load(reference)), told["error"]
    limit = INT8_ERROR if case.precision == "int8" else 2 * plain
    assert error <= limit + (UINT8_ERROR if kind == "uint8" else FLOAT32_ERROR)
    record(
        "engine", f"{' '.join(case)}, {kind}", batch,
        precision=case.precision, device=case.device, image_kind=kind, torch_imported=torch_imported,
        rms_error=error, rms_error_of_plain_torch=plain, plain_torch_precision=plain_precision,
        flop_per_image=2 * checkpoint.config.multiply_adds(),
    )  # fmt: skip


def _rms_error(result: npt.NDArray[Any], exact: npt.NDArray[np.float64]) -> float:
    as_float = result.transpose(0, 3, 1, 2) / 255 if result.dtype == np.uint8 else result
    assert as_float.shape == exact.shape
    return float(np.sqrt(np.mean((as_float - exact) ** 2)))
