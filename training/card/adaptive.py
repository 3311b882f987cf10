"""Attacks on the whole pipeline, by an attacker who knows all of it, as the worst case image by image.

An image counts as withstood when *none* of the attacks fools the pipeline on it. What an attack finds at one epsilon it
would find at every larger one, so an image that has fallen stays fallen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defense_vae_fast.nn.defended import PurifiedClassifier
from training.attacks import PGD, predict
from training.progress import bar

BATCH = 100


class SampledPipeline(nn.Module):
    """A pipeline whose latent is sampled, for expectation over transformation (Athalye et al. 2018).

    It gives the logarithm of the mean probability over several draws.

    Args:
        pipeline: purifier and classifier.
        draws: latents an image; 1 is the pipeline itself as it would answer.
    """

    def __init__(self, pipeline: PurifiedClassifier, draws: int) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        self.pipeline, self.draws = pipeline, draws

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> (N, classes) log-probabilities."""
        mu, logvar = self.pipeline.vae.encode(x)
        noise = torch.randn(self.draws, *mu.shape, device=mu.device, dtype=mu.dtype)
        z = (mu + noise * (0.5 * logvar).exp()).flatten(0, 1)
        purified = torch.sigmoid(self.pipeline.vae.decode(z))
        logits: Tensor = self.pipeline.classifier(purified)
        each = torch.log_softmax(logits.float(), 1).view(self.draws, len(x), -1)
        return torch.logsumexp(each, 0) - float(np.log(self.draws))


@dataclass(frozen=True)
class Effort:
    """How hard the attacker tries.

    Args:
        epsilons: L-infinity bounds in pixel units of [0, 1], rising.
        steps: of PGD and APGD.
        restarts: of PGD.
        queries: of Square, which takes no gradient; 0 leaves it out.
        library: run APGD and Square of the Adversarial Robustness Toolbox.
        seed: of everything random.
    """

    epsilons: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
    steps: int = 100
    restarts: int = 5
    queries: int = 1000
    library: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.epsilons or list(self.epsilons) != sorted(set(self.epsilons)) or self.epsilons[0] <= 0:
            raise ValueError(f"epsilons: expected one or more rising values above 0, got {self.epsilons}")
        if self.epsilons[-1] > 1:
            raise ValueError(f"epsilons: expected at most 1, in pixel units of [0, 1], got {self.epsilons[-1]}")
        if min(self.steps, self.restarts) < 1 or self.queries < 0:
            raise ValueError(
                "effort: expected steps and restarts of at least 1 and queries of at least 0, "
                f"got {self.steps}, {self.restarts} and {self.queries}"
            )


@dataclass(frozen=True)
class Sweep:
    """What is withstood at each epsilon.

    Attributes:
        clean: percent right on clean images.
        worst: by epsilon, percent withstood under all attacks together.
        after: by epsilon, percent still withstood after each attack, in the order in which they were run: each only on
            the images that were left.
        attacked: by epsilon, float (N, C, H, W): the image that fooled the pipeline, or the last try.
    """

    clean: float
    worst: dict[float, float]
    after: dict[float, dict[str, float]]
    attacked: dict[float, Tensor]


def sweep(
    pipeline: nn.Module,
    images: Tensor,
    labels: Tensor,
    effort: Effort,
    *,
    attacked_pipeline: nn.Module | None = None,
    title: str | None = None,
) -> Sweep:
    """Attack a pipeline at every epsilon.

    Args:
        pipeline: float (N, C, H, W) images to logits, in eval mode: what answers.
        images: float (N, C, H, W) in [0, 1].
        labels: (N,) int64 true labels.
        effort: how hard.
        attacked_pipeline: what the gradients are taken of, if another: expectation over transformation.
        title: shows a progress bar of this name.
    """
    aim = pipeline if attacked_pipeline is None else attacked_pipeline
    standing = _right(pipeline, images, labels)
    clean = _percent(standing)
    attacked = images.clone()
    worst: dict[float, float] = {}
    after: dict[float, dict[str, float]] = {}
    snapshots: dict[float, Tensor] = {}
    attacks = _attacks(aim, tuple(images.shape[1:]), effort)
    with bar(title or "sweep", len(effort.epsilons) * len(attacks), quiet=title is None) as progress:
        for epsilon in effort.epsilons:
            after[epsilon] = {}
            for name, attack in attacks:
                left = standing.nonzero().squeeze(1)
                if len(left):
                    tried = _within(attack(images[left], labels[left], epsilon), images[left], epsilon)
                    attacked[left] = tried
                    standing[left] = _right(pipeline, tried, labels[left])
                after[epsilon][name] = _percent(standing)
                progress.update(1, images=len(left))
            worst[epsilon] = _percent(standing)
            snapshots[epsilon] = attacked.clone()
    return Sweep(clean, worst, after, snapshots)


_Attack = Callable[[Tensor, Tensor, float], Tensor]


def _attacks(aim: nn.Module, shape: tuple[int, ...], effort: Effort) -> list[tuple[str, _Attack]]:
    def pgd(restart: int) -> _Attack:
        def run(images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
            generator = torch.Generator(images.device).manual_seed(effort.seed * 1_000_003 + restart)
            attack = PGD(epsilon, effort.steps, min(1.0, max(0.1, 2.5 / effort.steps)))
            parts = zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)
            return torch.cat([attack(aim, part, wanted, generator) for part, wanted in parts])

        return run

    attacks = [(f"PGD-{effort.steps}, start {number + 1}", pgd(number)) for number in range(effort.restarts)]
    if effort.library:
        attacks += _library_attacks(aim, shape, effort)
    return attacks


def _library_attacks(aim: nn.Module, shape: tuple[int, ...], effort: Effort) -> list[tuple[str, _Attack]]:
    """APGD on two losses, and Square, from the Adversarial Robustness Toolbox.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise RuntimeError(
            "card: APGD and Square need the Adversarial Robustness Toolbox; install it with: pip install '.[card]', or "
            "leave them out with --no-library"
        ) from error
    device = next(aim.parameters()).device
    with torch.no_grad():
        classes = aim(torch.zeros(1, *shape, device=device)).shape[1]

    def estimator() -> Any:
        return PyTorchClassifier(
            aim, nn.CrossEntropyLoss(), shape, classes, clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )  # fmt: skip

    def run(make: Callable[[float], Any]) -> _Attack:
        def attack(images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
            np.random.seed(effort.seed)  # noqa: NPY002  its generator is numpy's global one
            targets = torch.nn.functional.one_hot(labels, classes).cpu().numpy()
            found = make(epsilon).generate(images.cpu().numpy(), targets)
            return torch.from_numpy(found).to(images)

        return attack

    def apgd(loss: str) -> Callable[[float], Any]:
        return lambda epsilon: AutoProjectedGradientDescent(
            estimator(), eps=epsilon, eps_step=2 * epsilon, max_iter=effort.steps, nb_random_init=1, batch_size=BATCH,
            loss_type=loss, verbose=False,
        )  # fmt: skip

    attacks = [("APGD, cross-entropy", run(apgd("cross_entropy")))]
    if classes > 2:  # the ratio's denominator takes the third class
        attacks.append(("APGD, difference of logits", run(apgd("difference_logits_ratio"))))
    if effort.queries:
        square = run(
            lambda epsilon: SquareAttack(
                estimator(), eps=epsilon, max_iter=effort.queries, batch_size=BATCH, verbose=False
            )
        )
        attacks.append((f"Square, {effort.queries:,} queries", square))
    return attacks


def _within(tried: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """What an attack gave, held to its bounds whatever it did."""
    return torch.clamp(tried, images - epsilon, images + epsilon).clamp(0, 1)


def _right(pipeline: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    parts: Sequence[Tensor] = torch.split(images, BATCH)
    return torch.cat([predict(pipeline, part) for part in parts]) == labels


def _percent(mask: Tensor) -> float:
    return round(100 * float(mask.float().mean()), 2)
