"""The precision in which networks are trained; their weights are float32 in any case."""

from __future__ import annotations

from typing import Literal

import torch

Amp = Literal["bf16", "fp16", "fp32"]
_DTYPES: dict[Amp, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def default_amp(device: torch.device | str) -> Amp:
    """``bf16`` where the device is made for it, else ``fp32``.

    PyTorch hands a CPU's convolutions to oneDNN in bfloat16 from AVX-512 on; below that it has only loops of its own,
    25 times slower than float32 where that was measured.
    """
    slow = torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "fp32" if slow else "bf16"


def autocast(device: torch.device | str, amp: Amp | None = None) -> torch.autocast:
    """Run networks in ``amp``, by default the device's own."""
    dtype = _DTYPES.get(amp or default_amp(device))
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
