"""A classifier behind the purifier, as one torch module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defense_vae_fast.nn.model import DefenseVAE


class PurifiedClassifier(nn.Module):
    """logits = classifier(normalize(purify(x))), differentiable from end to end.

    Nothing hides the gradient: an attack on this module is an attack on the whole defence. The purifier's parameters
    are frozen and it stays in eval mode whatever :meth:`train` says; the classifier keeps the mode it came in and
    follows :meth:`train`. Both modules are held, not copied, so the freezing reaches the caller's purifier.

    Args:
        vae: the purifier.
        classifier: takes (N, C, H, W), normalised if ``mean`` and ``std`` are given, and returns logits.
        mean: per-channel mean that the classifier's images are normalised with, after purification; C numbers.
        std: per-channel standard deviation, C positive numbers; given with ``mean`` or not at all.

    Raises:
        TypeError: ``classifier`` is no module, or ``mean`` or ``std`` no sequence of numbers.
        ValueError: ``mean`` and ``std`` are not both given, not C finite numbers, or ``std`` is not positive.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        vae: DefenseVAE,
        classifier: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_module(classifier)
        if (mean is None) != (std is None):
            raise ValueError("mean and std: expected both or neither, got one of them")
        self.vae = vae.eval().requires_grad_(False)
        self.classifier = classifier
        channels = vae.config.channels
        device = device_of(vae)
        for name, values in (("mean", mean), ("std", std)):
            numbers = None if values is None else _per_channel(name, values, channels).to(device)
            self.register_buffer(name, numbers, persistent=False)
        # The module's own flag follows the classifier: freshly wrapped, nothing changes mode.
        self.training = classifier.training

    def train(self, mode: bool = True) -> PurifiedClassifier:
        """Set the classifier's mode; the purifier's BatchNorm keeps using its running statistics."""
        super().train(mode)
        self.vae.eval()
        return self

    def purify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> purified images of the same shape and range, differentiable in ``x``."""
        shape = self.vae.config.image_shape
        if x.ndim != 4 or tuple(x.shape[1:]) != shape or not x.is_floating_point():
            expected = f"floating (N, {', '.join(map(str, shape))}) images in [0, 1]"
            raise ValueError(f"x: expected {expected}, got {x.dtype} {tuple(x.shape)}")
        return self.vae.purify(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> the classifier's logits of the purified images."""
        purified = self.purify(x)
        if self.mean is not None and self.std is not None:
            purified = (purified - self.mean) / self.std
        logits: Tensor = self.classifier(purified)
        return logits


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter lies; the CPU for one without parameters.

    Raises:
        TypeError: it is no module.
    """
    _check_module(module)
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _check_module(classifier: object) -> None:
    if not isinstance(classifier, nn.Module):
        raise TypeError(
            f"classifier: expected a torch.nn.Module, got {_described(classifier)}; "
            "wrap a function in a module whose forward calls it"
        )


def _per_channel(name: str, values: Sequence[float], channels: int) -> Tensor:
    """(1, C, 1, 1) float32 numbers, finite, and positive for ``std``."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected a sequence of {channels} number(s), one a channel, got {_described(values)}; "
            "pass a list of numbers, for one channel too"
        ) from error
    positive = name == "std"
    if len(numbers) != channels or not all(math.isfinite(value) and (value > 0 or not positive) for value in numbers):
        kind = "positive " if positive else ""
        raise ValueError(f"{name}: expected {channels} {kind}finite numbers, one a channel, got {numbers}")
    return torch.tensor(numbers).view(1, channels, 1, 1)


def _described(value: object) -> str:
    return f"{value!r} of the type {type(value).__name__}"
