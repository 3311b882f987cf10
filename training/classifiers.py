"""Classifiers: Table 5's A to E, and modern networks that stand for the ones a user brings.

Every network takes (N, C, H, W) images in [0, 1] and returns (N, classes) logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _features(net: nn.Module, channels: int, size: int) -> int:
    """Values a convolutional stack gives for one image."""
    with torch.no_grad():
        return int(net.eval()(torch.zeros(1, channels, size, size)).numel())


def _with_head(stack: list[nn.Module], head: Callable[[int], list[nn.Module]], channels: int, size: int) -> nn.Module:
    flat = _features(nn.Sequential(*stack), channels, size)
    return nn.Sequential(*stack, nn.Flatten(), *head(flat))


class Centred(nn.Module):
    """Colour values about 0 and of about unit spread; without it D hardly learns from them."""

    def forward(self, x: Tensor) -> Tensor:
        """(x - 0.5) / 0.25, for images in [0, 1]."""
        return (x - 0.5) / 0.25


def classifier_a(channels: int, size: int, classes: int) -> nn.Module:
    """Table 5, A."""
    stack = [
        nn.Conv2d(channels, 64, 5, 1, 2), nn.ReLU(), nn.Conv2d(64, 64, 5, 2, 0), nn.ReLU(), nn.Dropout(0.25),
    ]  # fmt: skip
    return _with_head(stack, lambda n: _dense_head(n, classes), channels, size)


def classifier_b(channels: int, size: int, classes: int) -> nn.Module:
    """Table 5, B."""
    stack = [
        nn.Dropout(0.2), nn.Conv2d(channels, 64, 8, 2, 5), nn.ReLU(), nn.Conv2d(64, 128, 6, 2, 0), nn.ReLU(),
        nn.Conv2d(128, 128, 5, 1, 0), nn.ReLU(), nn.Dropout(0.5),
    ]  # fmt: skip
    return _with_head(stack, lambda n: [nn.Linear(n, classes)], channels, size)


def classifier_c(channels: int, size: int, classes: int) -> nn.Module:
    """Table 5, C."""
    stack = [
        nn.Conv2d(channels, 128, 3, 1, 1), nn.ReLU(), nn.Conv2d(128, 64, 5, 2, 0), nn.ReLU(), nn.Dropout(0.25),
    ]  # fmt: skip
    return _with_head(stack, lambda n: _dense_head(n, classes), channels, size)


def classifier_d(channels: int, size: int, classes: int) -> nn.Module:
    """Table 5, D."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * size**2, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, 200), nn.ReLU(),
        nn.Dropout(0.25), nn.Linear(200, classes),
    )  # fmt: skip


def classifier_e(channels: int, size: int, classes: int) -> nn.Module:
    """Table 5, E: the substitute without dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * size**2, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(),
        nn.Linear(200, classes),
    )  # fmt: skip


def _dense_head(features: int, classes: int) -> list[nn.Module]:
    return [nn.Linear(features, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes)]


class _Residual(nn.Module):
    """Pre-activation residual block; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        residual: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(y))))
        return residual + shortcut


def residual(channels: int, size: int, classes: int) -> nn.Module:
    """Pre-activation residual network: full resolution, three stages of one block (16, 32, 64 channels)."""
    stack = [
        nn.Conv2d(channels, 16, 3, 1, 1, bias=False), _Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2),
        nn.BatchNorm2d(64), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*stack, *_pooled_head(64, classes))


def residual_stem(channels: int, size: int, classes: int) -> nn.Module:
    """Pre-activation residual network behind a 5x5 stride-2 stem, two stages of two blocks (32, 64 channels)."""
    stack = [
        nn.Conv2d(channels, 32, 5, 2, 2, bias=False), _Residual(32, 32, 1), _Residual(32, 32, 1), _Residual(32, 64, 2),
        _Residual(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*stack, *_pooled_head(64, classes))


class _PostResidual(nn.Module):
    """The original residual block: ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def residual_held_out(channels: int, size: int, classes: int) -> nn.Module:
    """Post-activation residual network (20, 40, 80 channels): no purifier trains against it, it is for validation."""
    stack = [
        nn.Conv2d(channels, 20, 3, 1, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU(), _PostResidual(20, 20, 1),
        _PostResidual(20, 40, 2), _PostResidual(40, 40, 1), _PostResidual(40, 80, 2),
    ]  # fmt: skip
    return nn.Sequential(*stack, *_pooled_head(80, classes))


def vgg_bn(channels: int, size: int, classes: int) -> nn.Module:
    """VGG-like: pairs of 3x3 convolutions with BatchNorm, max pooling between (24, 48, 96 channels)."""
    layers: list[nn.Module] = []
    inputs = channels
    for width in (24, 48, 96):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_pooled_head(96, classes, dropout=0.3))


def _pooled_head(channels: int, classes: int, dropout: float = 0.0) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes)]


CLASSIFIERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "A": classifier_a,
    "B": classifier_b,
    "C": classifier_c,
    "D": classifier_d,
    "E": classifier_e,
    "residual": residual,
    "residual_stem": residual_stem,
    "vgg_bn": vgg_bn,
    "residual_held_out": residual_held_out,
}
PAPER_CLASSIFIERS = ("A", "B", "C", "D")
TABLE_5 = (*PAPER_CLASSIFIERS, "E")
_OF_A_DATASET = {"cifar10_jpeg": ("A", "C", "D")}
MODERN_CLASSIFIERS = ("residual", "residual_stem", "vgg_bn")
HELD_OUT = "residual_held_out"


def paper_classifiers(dataset: str) -> tuple[str, ...]:
    """The classifiers of Table 5 that the paper attacks on a data set."""
    return _OF_A_DATASET.get(dataset, PAPER_CLASSIFIERS)


def build(name: str, channels: int = 1, size: int = 28, classes: int = 10) -> nn.Module:
    """An untrained classifier by its name in :data:`CLASSIFIERS`; for colour, Table 5's stand behind :class:`Centred`.

    Raises:
        ValueError: no such name.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"classifier: expected one of {', '.join(CLASSIFIERS)}, got {name!r}")
    network = CLASSIFIERS[name](channels, size, classes)
    # Those with BatchNorm scale for themselves.
    return nn.Sequential(Centred(), network) if channels == 3 and name in TABLE_5 else network
