"""BatchNorm with ReLU on a GPU: share of the copy bandwidth, against eager torch in both layouts and torch.compile."""

from __future__ import annotations

import pytest

from bench.conftest import Measure, Record

BATCHES = (16, 64, 256, 1024)
LAYERS = {"encoder1": (64, 28), "encoder2": (64, 16), "encoder3": (128, 8), "encoder4": (256, 4)}
FORMS = ("torch contiguous", "torch channels_last", "compiled channels_last", "triton channels_last")
cuda = pytest.mark.parametrize("device", ["cuda"], indirect=True)
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bandwidth() -> float:
    """Bytes a second of a copy, the yardstick of everything here."""
    import torch

    if not torch.cuda.is_available():  # asked for before "device", which says the same
        pytest.skip("torch sees no CUDA device")
    from bench import timing

    return timing.copy_bandwidth("cuda")


@cuda
def test_copy(device: str, measure: Measure, record: Record) -> None:
    from bench import timing

    bandwidth = measure("bandwidth", timing.copy_bandwidth, args=(device,), rounds=1)
    assert bandwidth > 1e9
    record("bandwidth", "copy of 1 GiB", seconds=[2**31 / bandwidth], device=device, bytes_per_second=bandwidth)


@pytest.mark.parametrize("graph", [False, True], ids=["calls", "graph"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", LAYERS)
@cuda
def test_batch_norm_relu(
    device: str, layer: str, batch: int, form: str, backward: bool, graph: bool, quick: bool, bandwidth: float,
    measure: Measure, record: Record,
) -> None:  # fmt: skip
    from bench import kernels

    assert kernels.shapes() == LAYERS
    assert kernels.FORMS == FORMS
    channels, side = LAYERS[layer]
    found = measure(
        f"{layer}, batch {batch}", kernels.measure, args=(form, (batch, channels, side, side)),
        kwargs={"backward": backward, "graph": graph, "device": device, "rounds": 3 if quick else 20}, rounds=1,
    )  # fmt: skip
    assert found.error <= 2 * found.error_of_plain_torch + 1e-6
    middle = sorted(found.seconds)[len(found.seconds) // 2]
    record(
        "kernel", f"{form}, {layer}", batch, seconds=found.seconds,
        layer=layer, form=form, backward=backward, graph=graph, device=device, precision="fp16",
        bytes_of_two_passes=found.bytes_moved, bytes_per_second=found.bytes_moved / middle,
        share_of_copy=found.bytes_moved / middle / bandwidth,
        rms_error=found.error, rms_error_of_plain_torch=found.error_of_plain_torch,
    )  # fmt: skip
