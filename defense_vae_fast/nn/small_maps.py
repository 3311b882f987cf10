"""The 4x4 convolutions of stride 2 whose smaller map has a few pixels, as one matrix product each, for a CPU.

oneDNN's convolutions are made for large maps. Forward and backward of 256 -> 512 channels from 4x4 to 2x2 pixels took
five times as long as the product on a CPU that multiplies bf16 natively, and two and a half times in float32; a whole
training step of the 32x32 purifier took 1.4 times as long in bf16 and 1.2 times in float32. From 4x4 pixels on (the
smaller map's) the convolution wins, because the product moves every pixel four times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from defense_vae_fast.architecture import Layer

MAX_SIDE = 2


def fits(layer: Layer) -> bool:
    """Whether a layer is one of those convolutions."""
    halves = layer.kind != "linear" and (layer.kernel, layer.stride, layer.padding) == (4, 2, 1)
    return halves and min(layer.in_size, layer.out_size) <= MAX_SIDE


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight, stride=2, padding=1)``.

    Args:
        x: (N, C, H, W), H and W even; channels_last is not copied.
        weight: (D, C, 4, 4); channels_last is not copied.

    Returns:
        (N, D, H/2, W/2), channels_last.
    """
    count, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(4) for j in range(4)]
    rows = torch.stack(windows, 3).reshape(-1, 16 * channels)
    made = F.linear(rows, weight.permute(0, 2, 3, 1).reshape(len(weight), -1))
    return made.view(count, height // 2, width // 2, -1).permute(0, 3, 1, 2)


def conv_transpose(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv_transpose2d(x, weight, stride=2, padding=1)``.

    Args:
        x: (N, C, H, W); channels_last is not copied.
        weight: (C, D, 4, 4); channels_last is not copied.

    Returns:
        (N, D, 2H, 2W), channels_last.
    """
    count, channels, height, width = x.shape
    made = x.permute(0, 2, 3, 1).reshape(-1, channels) @ weight.permute(0, 2, 3, 1).reshape(channels, -1)
    # Row i of the 4x4 window is the i % 2-th of the pair of rows i // 2 further down; columns alike. So the windows
    # overlap by whole pairs, and four sums of pairs make the image, which has an edge of one pixel too many.
    pairs = made.view(count, height, width, 2, 2, 2, 2, -1)
    parts = [
        F.pad(pairs[:, :, :, down, :, right].transpose(2, 3), (0, 0, 0, 0, right, 1 - right, 0, 0, down, 1 - down))
        for down in (0, 1)
        for right in (0, 1)
    ]
    whole = torch.stack(parts).sum(0).reshape(count, 2 * height + 2, 2 * width + 2, -1)
    return whole[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
