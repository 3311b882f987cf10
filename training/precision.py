"""The precision in which networks are trained; their weights are float32 in any case."""

from __future__ import annotations

from typing import Literal

import torch

from defense_vae_fast.engines.torch import cpu_has_bf16

Amp = Literal["bf16", "fp16", "fp32"]
_DTYPES: dict[Amp, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def default_amp(device: torch.device | str) -> Amp:
    """``bf16`` where the device multiplies it natively, else ``fp32``.

    On a CPU with AVX2 alone, convolutions in bfloat16 were 25 times slower than in float32.
    """
    return "fp32" if torch.device(device).type == "cpu" and not cpu_has_bf16() else "bf16"


def autocast(device: torch.device | str, amp: Amp | None = None) -> torch.autocast:
    """Run networks in ``amp``, by default the device's own."""
    dtype = _DTYPES.get(amp or default_amp(device))
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
