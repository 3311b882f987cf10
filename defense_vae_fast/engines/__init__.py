"""The table of engines, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from defense_vae_fast.engines.base import Engine, EngineUnavailable
from defense_vae_fast.engines.openvino import OpenVINOEngine
from defense_vae_fast.engines.torch import TorchEngine

__all__ = ["ENGINES", "Engine", "EngineUnavailable", "Selection", "select"]

ENGINES: tuple[type[Engine], ...] = (OpenVINOEngine, TorchEngine)
"""Every engine, in the order in which "auto" tries them."""

_log = logging.getLogger("defense_vae_fast")
_logged: set[str] = set()


@dataclass(frozen=True)
class Selection:
    """The engine chosen, and why those before it in the table were not."""

    engine: type[Engine]
    skipped: Mapping[str, str]


def select(
    name: str = "auto", device: str = "auto", precision: str = "auto", failed: Mapping[str, str] = MappingProxyType({})
) -> Selection:
    """Choose an engine.

    Args:
        name: an engine's name, or "auto" for the first of ``ENGINES`` that can do what is asked on this machine.
        device: a device that it must run on, or "auto".
        precision: a precision that it must offer, or "auto".
        failed: engines that were tried and did not load, with the reason; they are passed over.

    Raises:
        ValueError: there is no such engine, or no engine (or not the named one) lists that device or precision.
        EngineUnavailable: the named engine, or every suitable one, cannot work here.
    """
    candidates = [engine for engine in ENGINES if name in ("auto", engine.name)]
    if not candidates:
        raise ValueError(f"engine: expected 'auto' or one of {', '.join(e.name for e in ENGINES)}, got {name!r}")
    skipped: dict[str, str] = {}
    unable = 0
    for engine in candidates:
        reason = _unsupported(engine, device, precision)
        unable += reason is not None
        reason = reason or failed.get(engine.name) or engine.available(device)
        if reason is None:
            _report(engine, skipped)
            return Selection(engine, MappingProxyType(skipped))
        skipped[engine.name] = reason
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in skipped.items())
    if unable == len(candidates):
        raise ValueError(reasons)
    raise EngineUnavailable(f"no engine can work here: {reasons}" if len(candidates) > 1 else reasons)


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
