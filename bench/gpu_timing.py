"""What the GPU benchmarks share: inputs in GPU memory, times by CUDA events, and the work of an image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.inputs import as_float, batches
from defense_vae_fast.checkpoint import Checkpoint

WARMUP = 20
"""Calls before those that count."""


def device_batches(batch: int, shape: tuple[int, int, int]) -> Iterator[Any]:
    """uint8 batches on the GPU that take turns for ever."""
    return itertools.cycle([torch.from_numpy(images).cuda() for images in batches(batch, shape)])


def timed(work: Callable[[], Any], seconds: list[float]) -> Callable[[], Any]:
    """``work`` between two events on the current stream; the time between them goes to ``seconds``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def call() -> Any:
        start.record()
        result = work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
        return result

    return call


def counts(checkpoint: Checkpoint, batch: int, value_bytes: int) -> dict[str, float]:
    """Work of one image by the layer table: FLOP, and bytes when every activation and weight moves once."""
    config = checkpoint.config
    moved = config.activation_bytes(value_bytes) + config.weight_bytes(value_bytes) / batch
    return {"flop_per_image": 2 * config.multiply_adds(), "bytes_per_image": moved}


def float32(checkpoint: Checkpoint, images: Any) -> Any:
    """uint8 (N, H, W, C) -> what float32 on the CPU makes of them, 0..255, on the images' device."""
    from defense_vae_fast.nn.model import DefenseVAE

    pixels = torch.from_numpy(as_float(images.cpu().numpy()))
    with torch.no_grad():
        purified = DefenseVAE.from_checkpoint(checkpoint).purify(pixels)
    return 255 * purified.permute(0, 2, 3, 1).to(images.device)
