"""Networks are trained in bfloat16 where the device is made for it, and nowhere else unless asked for."""

from __future__ import annotations

import pytest
import torch

from training.precision import Amp, autocast, default_amp


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_has_bf16_only_where_it_is_native(
    supported: bool, expected: Amp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.precision.cpu_has_bf16", lambda: supported)
    assert default_amp("cpu") == expected
    assert default_amp("cuda") == "bf16"
    with autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") is supported


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_what_is_asked_for_is_taken(amp: Amp, dtype: torch.dtype) -> None:
    with autocast("cpu", amp):
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype is dtype
