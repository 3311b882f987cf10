"""Changes that nobody makes on purpose: noise, blur, light, compression."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from training.data import to_float, to_uint8

Corruption = Callable[[Tensor], Tensor]


def corruptions(seed: int = 0) -> dict[str, Corruption]:
    """By name: functions from uint8 (N, C, H, W) images to changed ones of the same shape."""
    return {
        **{f"Gaussian noise {sigma}": _noise(sigma, seed) for sigma in (0.05, 0.1, 0.2)},
        "salt and pepper 5 %": _salt_and_pepper(0.05, seed),
        "blur 1 pixel": _blur(1.0),
        "brighter by 0.2": lambda images: to_uint8((to_float(images) + 0.2).clamp(0, 1)),
        "half the contrast": _contrast(0.5),
        "half the resolution": _pixelate,
        "JPEG quality 25": _jpeg(25),
    }


def _noise(sigma: float, seed: int) -> Corruption:
    def change(images: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images.device)
        return to_uint8((to_float(images) + sigma * noise).clamp(0, 1))

    return change


def _salt_and_pepper(share: float, seed: int) -> Corruption:
    def change(images: Tensor) -> Tensor:
        draw = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).to(images.device)
        return images.masked_fill(draw < share / 2, 0).masked_fill(draw > 1 - share / 2, 255)

    return change


def _blur(sigma: float) -> Corruption:
    radius = max(1, round(3 * sigma))
    taps = torch.exp(-(torch.arange(-radius, radius + 1).float() ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()

    def change(images: Tensor) -> Tensor:
        channels = images.shape[1]
        kernel = taps.to(images.device).view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        padded = F.pad(to_float(images), (radius,) * 4, mode="replicate")
        down = F.conv2d(padded, kernel, groups=channels)
        return to_uint8(F.conv2d(down, kernel.transpose(2, 3), groups=channels))

    return change


def _contrast(factor: float) -> Corruption:
    def change(images: Tensor) -> Tensor:
        pixels = to_float(images)
        mean = pixels.mean((1, 2, 3), keepdim=True)
        return to_uint8(mean + factor * (pixels - mean))

    return change


def _pixelate(images: Tensor) -> Tensor:
    small = F.avg_pool2d(to_float(images), 2)
    return to_uint8(F.interpolate(small, scale_factor=2, mode="nearest"))


def _jpeg(quality: int) -> Corruption:
    def change(images: Tensor) -> Tensor:
        changed = []
        for image in images.permute(0, 2, 3, 1).cpu().numpy():
            raw = io.BytesIO()
            Image.fromarray(image.squeeze()).save(raw, "JPEG", quality=quality)
            pixels = np.array(Image.open(raw)).reshape(image.shape)
            changed.append(torch.from_numpy(pixels).permute(2, 0, 1))
        return torch.stack(changed).to(images.device)

    return change
