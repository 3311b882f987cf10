"""The score as a detector: its ROC, and an attack that fools classifier and detector together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from defense_vae_fast.nn.defended import PurifiedClassifier
from training.data import to_float

FALSE_ALARMS = 0.05


class Roc(NamedTuple):
    """A receiver operating characteristic, from the strictest threshold to the loosest."""

    false_alarms: list[float]
    """Share of clean images above the threshold."""
    caught: list[float]
    """Share of attacked images above it."""
    area: float
    """Under the curve: 1 tells all apart, 0.5 none."""


def roc(clean: Tensor, attacked: Tensor) -> Roc:
    """The ROC of scores that should be higher for attacked images; equal scores count half.

    Args:
        clean: (N,) scores of clean images.
        attacked: (M,) scores of attacked ones.
    """
    if not len(clean) or not len(attacked):
        raise ValueError(f"roc: expected scores of both kinds, got {len(clean)} clean and {len(attacked)} attacked")
    limits = torch.unique(torch.cat([clean, attacked])).flip(0)
    false = torch.stack([(clean >= limit).double().mean() for limit in limits])
    true = torch.stack([(attacked >= limit).double().mean() for limit in limits])
    false, true = (torch.cat([torch.zeros(1, dtype=torch.float64), line.cpu()]) for line in (false, true))
    area = float(torch.trapezoid(true, false))
    return Roc([round(float(x), 5) for x in false], [round(float(x), 5) for x in true], round(area, 4))


@torch.no_grad()
def scores(pipeline: PurifiedClassifier, images: Tensor) -> Tensor:
    """(N,) mean |x - x_hat| of uint8 (N, C, H, W) images."""
    return torch.cat([_score(pipeline, to_float(part)) for part in torch.split(images, 250)])


def _score(pipeline: PurifiedClassifier, pixels: Tensor) -> Tensor:
    return (pixels - pipeline.purify(pixels)).abs().flatten(1).mean(1)


def threshold(clean: Tensor, false_alarms: float = FALSE_ALARMS) -> float:
    """The score above which this share of clean images lies."""
    return float(clean.sort().values[len(clean) - 1 - int(len(clean) * false_alarms)])


class Fooled(NamedTuple):
    """Percent of the images."""

    classifier: float
    """On which some step of the attack fooled the classifier, whatever the detector said."""
    both: float
    """On which some step fooled the classifier with a score below the detector's threshold."""


def fool_both(
    pipeline: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    limit: float,
    epsilon: float,
    *,
    steps: int = 100,
    seed: int = 0,
) -> Fooled:
    """PGD along one gradient at a time (Bryniarski et al. 2021): the loss until the class is wrong, then the score.

    Args:
        pipeline: purifier and classifier.
        images: float (N, C, H, W) in [0, 1].
        labels: (N,) int64 true labels.
        limit: the detector's threshold.
        epsilon: L-infinity bound.
        steps: of the attack.
        seed: of its start.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator, device=images.device) * 2 - 1
    attacked = (images + epsilon * noise).clamp(0, 1)
    wrong_once = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    both_once = wrong_once.clone()
    for step in range(steps + 1):
        with torch.enable_grad():
            leaf = attacked.detach().requires_grad_()
            logits = pipeline(leaf)
            score = _score(pipeline, leaf)
            wrong = logits.argmax(1) != labels
            loss = F.cross_entropy(logits.float(), labels, reduction="none")
            goal = torch.where(wrong, -score, loss)
            gradient = torch.autograd.grad(goal.sum(), leaf)[0]
        wrong_once |= wrong
        both_once |= wrong & (score.detach() <= limit)
        size = epsilon * (0.1 if step < steps / 2 else 0.02)
        attacked = torch.clamp(attacked + size * gradient.sign(), images - epsilon, images + epsilon).clamp(0, 1)
    return Fooled(*(round(100 * float(mask.float().mean()), 2) for mask in (wrong_once, both_once)))
