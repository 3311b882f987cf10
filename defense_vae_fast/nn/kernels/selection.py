"""Which form of an operation runs: Triton's kernel or its plain-torch twin."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, get_args

import torch

Kernels = Literal["auto", "triton", "torch"]
"""``triton`` and ``torch`` are taken at their word; ``auto`` is Triton on CUDA where it works, else torch."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_log = logging.getLogger(__name__)


def check(kernels: str) -> Kernels:
    """``kernels`` itself.

    Raises:
        ValueError: it is none of :data:`Kernels`.
    """
    for known in get_args(Kernels):
        if kernels == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"kernels: expected one of {', '.join(get_args(Kernels))}, got {kernels!r}")


def use_triton(kernels: Kernels, device_type: str, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel runs, given what was asked for and where the operands are.

    Raises:
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    if kernels == "torch" or (kernels == "auto" and (device_type != "cuda" or dtype not in DTYPES)):
        return False
    reason = unavailable(device_type) if dtype in DTYPES else f"expected float32, float16 or bfloat16, got {dtype}"
    if reason is None:
        # Interpreted kernels are for tests, which ask for them; on CUDA tensors they would be slow beyond use.
        return kernels == "triton" or not _interpreted()
    if kernels == "triton":
        raise RuntimeError(f"kernels='triton' cannot run: {reason}; or take kernels='torch'")
    return False


# torch.compile takes the answer for a constant. This is all that torch.compiler.assume_constant_result does, but that
# imports the compiler, and the compiler imports Triton.
use_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Why Triton's kernels do not run on a kind of device here; None where they do."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install it with: pip install 'defense-vae-fast[triton]'"
    if device_type == "cpu" and _interpreted():
        return None
    if device_type != "cuda":
        return (
            f"expected tensors on a CUDA device, got {device_type}; "
            "on the CPU Triton only interprets, with TRITON_INTERPRET=1 set before it is imported"
        )
    from defense_vae_fast.nn.kernels.bn_relu import batch_statistics

    try:
        # Triton compiles on the spot and wants a C compiler and a driver: the way to know is to try.
        batch_statistics(torch.zeros(2, 1, 1, 1, device=device_type), None, None, None, 0.1)
    except Exception as error:
        reason = f"Triton fails on this machine: {type(error).__name__}: {error}"
        _log.warning("fused kernels are off, plain torch is used instead: %s", reason)
        return reason
    return None


def _interpreted() -> bool:
    """Whether kernels are interpreted: Triton decides it when they are defined, from ``TRITON_INTERPRET``."""
    from triton.runtime.interpreter import InterpretedFunction

    from defense_vae_fast.nn.kernels.bn_relu import normalize_kernel

    return isinstance(normalize_kernel, InterpretedFunction)
