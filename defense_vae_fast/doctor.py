"""What this machine has for purifying, what is missing, and whether each engine works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from defense_vae_fast import cuda
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines import candidates, label
from defense_vae_fast.engines.base import Engine, EngineUnavailable
from defense_vae_fast.engines.trial import trial_images

SECONDS = 10.0
"""What the self-test of one engine may take once it is loaded."""

# Distributions, of which the first that is installed counts, and what pip is to install.
_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "OpenVINO": (("openvino",), "defense-vae-fast"),
    "PyTorch": (("torch",), "defense-vae-fast[torch]"),
    "Triton": (("triton",), "defense-vae-fast[triton]"),
    "TensorRT": (("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "defense-vae-fast[tensorrt]"),
    "TensorRT-RTX": (("tensorrt-rtx-cu13", "tensorrt-rtx"), "defense-vae-fast[rtx]"),
    "TensorRT lean": (
        ("tensorrt-lean", "tensorrt-lean-cu13", "tensorrt-lean-cu12"),
        "defense-vae-fast[tensorrt-lean]",
    ),
    "PyCUDA": (("pycuda",), "defense-vae-fast[cuda]"),
    "CUDA bindings": (("cuda-bindings",), "defense-vae-fast[cuda]"),
    "NVRTC": (("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"), "defense-vae-fast[nvrtc]"),
}


@dataclass(frozen=True)
class Part:
    """A piece of hardware or software.

    Attributes:
        name: what it is.
        found: version or name, None when it is missing.
        advice: how to get it.
    """

    name: str
    found: str | None
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """The self-test of one engine.

    Attributes:
        engine: its name, with the device where it has several.
        ok: it ran and its numbers agree with float32; None when it cannot work here.
        text: what happened.
    """

    engine: str
    ok: bool | None
    text: str


def parts() -> list[Part]:
    """GPU, driver and packages."""
    found = gpu()
    if found is None:
        hardware = [Part("GPU", None, "no NVIDIA driver with a device answers; without one the CPU's engines are used")]
    else:
        hardware = [Part("GPU", found[0]), Part("CUDA, as the driver supports it", found[1])]
    packages = []
    for name, (distributions, wanted) in _PACKAGES.items():
        version = next(filter(None, map(_version, distributions)), None)
        packages.append(Part(name, version, f"pip install '{wanted}'"))
    return [*hardware, *packages]


def gpu() -> tuple[str, str] | None:
    """Name with compute capability and memory of each GPU, and the CUDA version of the driver; None without."""
    devices = cuda.devices()
    if not devices:
        return None
    names = [f"{d.name} (compute capability {d.compute_capability}, {d.memory / 2**30:.0f} GiB)" for d in devices]
    return "; ".join(names), devices[0].driver_version


def checks(checkpoint: Checkpoint) -> Iterator[Check]:
    """Self-test of every engine that "auto" considers on this machine, one after the other."""
    for engine, device in candidates():
        yield check(engine, device, checkpoint)


def check(engine: type[Engine], device: str, checkpoint: Checkpoint) -> Check:
    """Load an engine, compare it with float32, and run it for a moment at batch 1 and at its largest."""
    name = label(engine, device)
    if reason := engine.available(device):
        return Check(name, None, reason)
    start = time.perf_counter()
    try:
        with engine.load(checkpoint, device=device) as loaded:
            ready = time.perf_counter() - start
            if error := _disagreement(loaded, checkpoint):
                return Check(name, False, error)
            rates = ", ".join(f"{_median(loaded, checkpoint, n) * 1e3:.3g} ms for {n}" for n in (1, loaded.max_batch))
            return Check(name, True, f"works in {loaded.precision}: ready after {ready:.1f} s, {rates}")
    except EngineUnavailable as error:
        return Check(name, False, str(error))
    except Exception as error:  # the doctor's task is to tell, whatever it is
        return Check(name, False, f"{type(error).__name__}: {error}")


def automatic(results: list[Check]) -> Check | None:
    """The check of the engine that "auto" takes, the first that is not missing anything; None when all do."""
    return next((result for result in results if result.ok is not None), None)


def _disagreement(engine: Engine, checkpoint: Checkpoint) -> str | None:
    """By how much an engine differs from float32 on the trial images, if by more than its rounding."""
    from defense_vae_fast.engines.openvino import OpenVINOEngine

    channels, height, width = checkpoint.config.image_shape
    images = trial_images((height, width, channels))
    with OpenVINOEngine.load(checkpoint, "fp32", max_batch=1) as reference:
        expected, _ = reference.run(images)
    got, _ = engine.run(images)
    error = np.abs(got.astype(np.int16) - expected)
    mean, largest = float(error.mean()), int(error.max())
    # bf16 keeps 8 bits and fp16 11; the looser of the two, for a broken engine is far beyond both.
    if mean <= 2.0 and largest <= 32:
        return None
    return f"differs from float32 by {mean:.1f} grey levels on average and {largest} at most"


def _median(engine: Engine, checkpoint: Checkpoint, count: int) -> float:
    channels, height, width = checkpoint.config.image_shape
    images = np.resize(trial_images((height, width, channels)), (count, height, width, channels))
    engine.run(images)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < SECONDS / 10 and len(times) < 1000):
        start = time.perf_counter()
        engine.run(images)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
