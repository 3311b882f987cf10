"""Black-box attacks through a substitute (Papernot et al. 2017), as in Defense-GAN's experiments and the paper's 4.3.

The attacker sees neither the classifier's weights nor its training images, but may ask for the class of any image. With
150 images of their own, labelled so, they train a substitute; between two rounds of training every image gets a copy
moved a step along the sign of the substitute's Jacobian for its label, labelled by asking again, so that the images
double. What fools the substitute is then tried on the classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.classifiers import build
from training.data import Split, to_float
from training.device import place
from training.progress import bar

SUBSTITUTES = ("B", "E")


@dataclass(frozen=True)
class SubstituteSettings:
    """How a substitute is trained; defaults are Papernot's et al., with the sizes of Defense-GAN's experiments.

    Args:
        images: the attacker's own images: the first so many of the test set, which are not measured on afterwards.
        rounds: rounds of training; the images double between two of them, to 4,800 in the end.
        epochs: passes over the images in each round.
        batch_size: images a step.
        learning_rate: Adam's.
        step: lambda, the length of a Jacobian step in pixel units of [0, 1].
        period: tau: the step changes its sign every so many rounds, so that images do not run away; 0: never.
        kept: take the substitute's dropout rates for the share that is kept, as Defense-GAN's code hands the figures of
            Table 5 to a function that expects that: B then learns from a fifth of each image, and is a weaker attacker.
        seed: seeds weights, order and dropout.
    """

    images: int = 150
    rounds: int = 6
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    step: float = 0.1
    period: int = 3
    kept: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "rounds", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"substitute {name}: expected at least 1, got {getattr(self, name)}")
        if self.period < 0:
            raise ValueError(f"substitute period: expected at least 0, got {self.period}")
        if not 0 < self.learning_rate < float("inf") or not 0 < self.step <= 1:
            raise ValueError(
                "substitute: expected learning_rate above 0 and step above 0 and at most 1, "
                f"got {self.learning_rate} and {self.step}"
            )


# As in the code of Defense-GAN's experiments, which the paper follows. On validation images of Fashion-MNIST, through
# B, this leaves the bare classifier A 38.7 %, the defaults 17.6 %; the paper's table has 37.92 %.
DEFENSE_GAN = SubstituteSettings(period=0, kept=True)


def split_off(test: Split, settings: SubstituteSettings) -> tuple[Split, Split]:
    """The attacker's images, and the test images that are left to measure on.

    Raises:
        ValueError: nothing would be left.
    """
    if len(test) <= settings.images:
        raise ValueError(f"substitute images: expected fewer than the {len(test)} test images, got {settings.images}")
    return test.first(settings.images), Split(test.images[settings.images :], test.labels[settings.images :])


def train_substitute(
    name: str,
    oracle: Callable[[Tensor], Tensor],
    images: Tensor,
    classes: int,
    settings: SubstituteSettings | None = None,
    *,
    quiet: bool = False,
) -> nn.Module:
    """Train a built-in classifier to answer as ``oracle`` does.

    Args:
        name: the substitute's architecture: B or E in the paper.
        oracle: float (N, C, H, W) images in [0, 1] to (N,) int64 classes; all that is known of the classifier.
        images: uint8 (N, C, H, W), the attacker's own.
        classes: number of classes.
        settings: how to train.
        quiet: show no progress.

    Returns:
        The substitute in eval mode, gradients of its weights off.
    """
    settings = settings or SubstituteSettings()
    torch.manual_seed(settings.seed)
    _, channels, size, _ = images.shape
    substitute = place(build(name, channels, size, classes), images.device).train()
    if settings.kept:
        for dropout in (part for part in substitute.modules() if isinstance(part, nn.Dropout)):
            dropout.p = 1 - dropout.p
    known = to_float(images)
    labels = oracle(known)
    with bar(f"substitute {name}", settings.rounds * settings.epochs, quiet=quiet) as progress:
        for round_ in range(settings.rounds):
            optimizer = torch.optim.Adam(substitute.parameters(), settings.learning_rate)
            for _ in range(settings.epochs):
                for index in torch.split(torch.randperm(len(known), device=known.device), settings.batch_size):
                    loss = F.cross_entropy(substitute(known[index]), labels[index])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                progress.update(1, images=len(known))
            if round_ < settings.rounds - 1:
                sign = -1 if settings.period and (round_ // settings.period) % 2 else 1
                substitute.eval()
                fresh = jacobian_augmentation(substitute, known, labels, sign * settings.step)
                substitute.train()
                known, labels = torch.cat([known, fresh]), torch.cat([labels, oracle(fresh)])
    return substitute.eval().requires_grad_(False)


def jacobian_augmentation(substitute: nn.Module, images: Tensor, labels: Tensor, step: float) -> Tensor:
    """A copy of every image, moved by ``step`` along the sign of its label's row of the substitute's Jacobian.

    Args:
        substitute: in eval mode.
        images: float (N, C, H, W) in [0, 1].
        labels: (N,) int64, the oracle's.
        step: length, positive towards the label and negative away from it.
    """
    moved = []
    for part, wanted in zip(torch.split(images, 500), torch.split(labels, 500), strict=True):
        leaf = part.detach().requires_grad_()
        # The logarithm's gradient has the probability's sign, and does not vanish where the network is sure.
        own = -F.cross_entropy(substitute(leaf), wanted, reduction="sum")
        moved.append((part + step * torch.autograd.grad(own, leaf)[0].sign()).clamp(0, 1))
    return torch.cat(moved)
