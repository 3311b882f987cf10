"""Defense-GAN (Samangouei, Kabkab and Chellappa, ICLR 2018): a generator of clean images and the search of its latent.

For every image x the search looks for z* = argmin_z mean((G(z) - x)^2) with L steps of gradient descent with momentum
from each of R random starts; G(z*) of the best start is what the classifier gets to see. Its cost is L x R forward and
backward passes an image, where a Defense-VAE needs one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

LATENT_DIM = 128
LEARNING_RATE = 10.0
MOMENTUM = 0.7
DECAY = 0.1  # of the learning rate, from this share of the steps on:
DECAY_AFTER = 0.8


class Generator(nn.Module):
    """The paper's generator: (N, latent_dim) latents -> (N, C, H, W) images in [0, 1].

    Linear to 4 x 4, then transposed 5x5 convolutions of stride 2 with ReLU between and a sigmoid at the end. For 28x28
    images (256 -> 128 -> 64 -> C channels) the first one's 8x8 map is cropped to 7x7; 32x32 needs no crop, and every
    doubling has one layer of twice the channels more in front. A trained network's BatchNorm, where it
    has any, is constant during the search and can be folded into these layers. TensorFlow's "SAME" padding, which the
    authors used, lies one pixel beside this one: train a generator here instead of carrying weights over.

    Args:
        latent_dim: size of z, at least 1.
        seed: of the random initial weights (He et al. 2015, so that the images of an untrained generator differ).
        channels: of the images, at least 1.
        size: side of the images: 28, 32, 64 or 128.
    """

    def __init__(self, latent_dim: int = LATENT_DIM, seed: int = 0, channels: int = 1, size: int = 28) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim: expected at least 1, got {latent_dim}; the paper uses {LATENT_DIM}")
        widths = stage_widths(channels, size)[::-1]
        self.latent_dim, self._widest = latent_dim, widths[0]
        self.project = nn.Linear(latent_dim, widths[0] * 4 * 4)
        # Without output padding, the row and column that the crop from 8x8 to 7x7 drops are never computed.
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=int(size != 28 or index > 0))
            for index, (inputs, outputs) in enumerate(pairwise(widths))
        )
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw He weights for every layer and clear the biases."""
        rng = torch.Generator().manual_seed(seed)
        for layer in (self.project, *self.up):
            assert isinstance(layer, nn.Linear | nn.ConvTranspose2d)
            # An output pixel of a stride-2 transposed convolution is reached by a quarter of the kernel's taps.
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels * 25 / 4
            layer.weight.normal_(0.0, math.sqrt(2 / inputs), generator=rng)
            assert layer.bias is not None
            layer.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """(N, latent_dim) latents -> (N, C, H, W) images in [0, 1]."""
        x = self.project(z).view(-1, self._widest, 4, 4)
        for layer in self.up:
            x = layer(torch.relu(x))
        return torch.sigmoid(x)


def stage_widths(channels: int, size: int) -> list[int]:
    """Channels of an image and of its maps halved again and again down to 4x4; the generator has them in reverse.

    Raises:
        ValueError: there is no network for such images.
    """
    depths = {28: 3, 32: 3, 64: 4, 128: 5}
    if channels < 1 or size not in depths:
        sizes = ", ".join(map(str, depths))
        raise ValueError(f"Defense-GAN: expected 1 or more channels and a side of {sizes}, got {channels} and {size}")
    return [channels, *(64 << stage for stage in range(depths[size]))]


class Reconstruction(NamedTuple):
    """What the search found."""

    images: Tensor
    """(N, C, H, W) float32: G(z*) of each image's best start."""
    errors: Tensor
    """(N,) float32: their mean squared errors."""


def reconstruct(
    generator: Callable[[Tensor], Tensor],
    images: Tensor,
    steps: int = 200,
    restarts: int = 10,
    *,
    latent_dim: int = LATENT_DIM,
    learning_rate: float = LEARNING_RATE,
    momentum: float = MOMENTUM,
    seed: int = 0,
) -> Reconstruction:
    """Search the generator's latent space for each image (section 3 of the Defense-GAN paper).

    All ``N x restarts`` candidates travel in one batch. The loss is the sum of their mean squared errors, so no
    candidate's gradient depends on another. The learning rate falls tenfold after 80 % of the steps.

    Args:
        generator: (M, latent_dim) float latents -> (M, C, H, W) images, in eval mode, on the images' device.
        images: (N, C, H, W) float images in [0, 1].
        steps: L, gradient steps a start; 0 or more.
        restarts: R, random starts an image; 1 or more.
        latent_dim: size of the generator's latent.
        learning_rate: of the first 80 % of the steps, above 0.
        momentum: share of the last update that is kept, in [0, 1).
        seed: of the starts, drawn from N(0, 1 / latent_dim) on the CPU, so that they are the same on every device.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range.
    """
    _check(images, steps, restarts, latent_dim, learning_rate, momentum)
    rng = torch.Generator().manual_seed(seed)
    starts = torch.randn(len(images) * restarts, latent_dim, generator=rng) * latent_dim**-0.5
    z = starts.to(images)
    targets = images.repeat_interleave(restarts, 0)
    velocity = torch.zeros_like(z)
    decay_from = math.ceil(DECAY_AFTER * steps)
    for step in range(steps):
        rate = learning_rate * (DECAY if step >= decay_from else 1.0)
        with torch.enable_grad():
            z.requires_grad_()
            # Of z alone: autograd then skips the gradients of the generator's weights.
            (gradient,) = torch.autograd.grad(_errors(generator(z), targets).sum(), z)
        velocity.mul_(momentum).add_(gradient)
        z = z.detach().sub_(velocity, alpha=rate)
    with torch.no_grad():
        candidates = generator(z)
        errors, best = _errors(candidates, targets).view(-1, restarts).min(1)
        chosen = torch.arange(len(images), device=z.device) * restarts + best
        return Reconstruction(candidates[chosen], errors)


def _errors(reconstructions: Tensor, targets: Tensor) -> Tensor:
    """(M,) mean squared error of each candidate."""
    return (reconstructions - targets).square().flatten(1).mean(1)


def _check(images: Tensor, steps: int, restarts: int, latent_dim: int, learning_rate: float, momentum: float) -> None:
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(
            f"images: expected floating (N, C, H, W) with N >= 1, got {images.dtype} {tuple(images.shape)}; "
            "convert with images.float() / 255 and add the missing axes"
        )
    bounds = {
        "steps": (steps, steps >= 0, "0 or more"),
        "restarts": (restarts, restarts >= 1, "1 or more"),
        "latent_dim": (latent_dim, latent_dim >= 1, "1 or more"),
        "learning_rate": (learning_rate, 0 < learning_rate < math.inf, "a finite value above 0"),
        "momentum": (momentum, 0 <= momentum < 1, "a value in [0, 1)"),
    }
    for name, (value, good, expected) in bounds.items():
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {value}; leave it out for the paper's value")
