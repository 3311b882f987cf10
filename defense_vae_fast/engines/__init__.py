"""The table of engines, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from defense_vae_fast import cuda
from defense_vae_fast.engines.base import Engine, EngineUnavailable
from defense_vae_fast.engines.openvino import OpenVINOEngine
from defense_vae_fast.engines.tensorrt import TensorRTEngine, TensorRTLeanEngine, TensorRTRTXEngine
from defense_vae_fast.engines.torch import TorchEngine

__all__ = ["ENGINES", "Engine", "EngineUnavailable", "Selection", "candidates", "select"]

ENGINES: tuple[type[Engine], ...] = (
    TensorRTEngine,
    TensorRTRTXEngine,
    TensorRTLeanEngine,
    OpenVINOEngine,
    TorchEngine,
)
"""Every engine."""

_ON_GPU: tuple[type[Engine], ...] = (TensorRTEngine, TensorRTRTXEngine, TensorRTLeanEngine, TorchEngine)
_ON_CPU: tuple[type[Engine], ...] = (OpenVINOEngine, TorchEngine)

_log = logging.getLogger("defense_vae_fast")
_logged: set[str] = set()


@dataclass(frozen=True)
class Selection:
    """The engine chosen, the device that it was chosen for, and why those before it were not."""

    engine: type[Engine]
    device: str
    skipped: Mapping[str, str]


def candidates(name: str = "auto", device: str = "auto") -> list[tuple[type[Engine], str]]:
    """Engines and the device that each would be taken for, in the order in which they are tried.

    "auto" tries the GPU's engines first where there is a GPU, and the CPU's alone where there is none. A named engine
    chooses its device itself.
    """
    if name != "auto":
        return [(engine, device) for engine in ENGINES if engine.name == name]
    if device != "auto":
        return [(engine, device) for engine in (_ON_GPU if device == "cuda" and cuda.has_device() else _ON_CPU)]
    on_gpu = [(engine, "cuda") for engine in _ON_GPU] if cuda.has_device() else []
    return [*on_gpu, *((engine, "cpu" if on_gpu else "auto") for engine in _ON_CPU)]


def select(
    name: str = "auto", device: str = "auto", precision: str = "auto", failed: Mapping[str, str] = MappingProxyType({})
) -> Selection:
    """Choose an engine.

    Args:
        name: an engine's name, or "auto" for the first of :func:`candidates` that can do what is asked on this machine.
        device: a device that it must run on, or "auto".
        precision: a precision that it must offer, or "auto".
        failed: engines that were tried and did not load, with the reason, by :func:`label`; they are passed over.

    Raises:
        ValueError: there is no such engine, or no engine (or not the named one) lists that device or precision.
        EngineUnavailable: the named engine, or every suitable one, cannot work here.
    """
    tried = candidates(name, device)
    if not tried:
        raise ValueError(f"engine: expected 'auto' or one of {', '.join(e.name for e in ENGINES)}, got {name!r}")
    skipped: dict[str, str] = {}
    unable = 0
    for engine, place in tried:
        reason = _unsupported(engine, place, precision)
        unable += reason is not None
        reason = reason or failed.get(label(engine, place)) or engine.available(place)
        if reason is None:
            _report(engine, skipped)
            return Selection(engine, place, MappingProxyType(skipped))
        skipped[label(engine, place)] = reason
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in skipped.items())
    if unable == len(tried):
        raise ValueError(reasons)
    raise EngineUnavailable(f"no engine can work here: {reasons}" if len(tried) > 1 else reasons)


def label(engine: type[Engine], device: str) -> str:
    """How an engine is named where it failed: with the device, if it may yet be taken on another one."""
    return f"{engine.name} on {device}" if device == "cuda" and len(engine.devices) > 1 else engine.name


def _unsupported(engine: type[Engine], device: str, precision: str) -> str | None:
    for option, value, offered in (("device", device, engine.devices), ("precision", precision, engine.precisions)):
        if value != "auto" and value not in offered:
            return f"{option}: expected 'auto' or one of {', '.join(offered)}, got {value!r}"
    return None


def _report(engine: type[Engine], skipped: Mapping[str, str]) -> None:
    """Log a choice the first time that it is made."""
    message = f"engine: {engine.name}" + "".join(f"; skipped {name} ({reason})" for name, reason in skipped.items())
    if message not in _logged:
        _logged.add(message)
        _log.info(message)
