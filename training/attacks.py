"""Attacks on a classifier, batched in torch: FGSM, RAND-FGSM, PGD, CW-L2 and DeepFool.

Every attack is a frozen dataclass called as ``attack(classifier, images, labels)``; images are float (N, C, H, W) in
[0, 1], the classifier returns logits, and the result has the images' shape and stays in [0, 1]. ``labels`` is what the
attack runs away from: the true labels as in the paper, or the classifier's own predictions (:func:`predict`). A single
step away from the *true* label carries that label in its sign pattern, and a purifier can learn to read it ("label
leaking"), so results against both kinds are reported.

The classifier is used as it stands: put it in eval mode first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Classifier = Callable[[Tensor], Tensor]


class Attack(Protocol):
    """What every attack looks like."""

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Attacked images; ``generator`` feeds whatever the attack draws at random.

        An attack that draws has a method ``noise(images, generator)`` that draws the same and does nothing else, so
        that a process that leaves images to another one can stay in step.
        """


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor) -> Tensor:
    """(N,) int64 classes that the classifier sees in float (N, C, H, W) images."""
    return classifier(images).argmax(1)


def _check(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floating (N, C, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(images)},), got {tuple(labels.shape)}")


def _check_epsilon(epsilon: float | Tensor, lowest: float = 0.0) -> None:
    """A tensor is taken as it is: looking into it would wait for its device."""
    if not isinstance(epsilon, Tensor) and not lowest <= epsilon <= 1:
        raise ValueError(f"epsilon: expected {lowest} to 1, in pixel units of [0, 1], got {epsilon}")


def _loss_gradient(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy; summed, so that a batch's images do not touch each other."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        loss = F.cross_entropy(classifier(leaf).float(), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]


def _as_column(epsilon: float | Tensor, images: Tensor) -> float | Tensor:
    """A per-image epsilon of shape (N,) reshaped so that it broadcasts over pixels."""
    return epsilon.view(-1, 1, 1, 1).to(images) if isinstance(epsilon, Tensor) else epsilon


@dataclass(frozen=True)
class FGSM:
    """Fast gradient sign method (Goodfellow et al. 2014), L-infinity.

    Args:
        epsilon: size of the step in pixel units of [0, 1]; a (N,) tensor sets it image by image.
    """

    epsilon: float | Tensor = 0.3

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        _check(images, labels)
        step = _as_column(self.epsilon, images) * _loss_gradient(classifier, images, labels).sign()
        return (images + step).clamp(0, 1)


@dataclass(frozen=True)
class RandFGSM:
    """RAND-FGSM (Tramer et al. 2017): a random sign step of ``alpha``, then FGSM with what is left of ``epsilon``.

    Args:
        epsilon: L-infinity bound of the whole perturbation; a (N,) tensor sets it image by image.
        alpha: size of the random step, at most ``epsilon``.
    """

    epsilon: float | Tensor = 0.3
    alpha: float = 0.05

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon, self.alpha)

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        _check(images, labels)
        start = (images + self.alpha * self.noise(images, generator).to(images)).clamp(0, 1)
        return FGSM(self.epsilon - self.alpha)(classifier, start, labels)

    def noise(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """All that is drawn at random for these images: signs."""
        return torch.randn(images.shape, generator=generator, device=images.device).sign()


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent (Madry et al. 2018), L-infinity, with a random start.

    Args:
        epsilon: L-infinity bound; a (N,) tensor sets it image by image.
        steps: number of gradient steps.
        relative_step: size of a step as a share of ``epsilon``.
    """

    epsilon: float | Tensor = 0.3
    steps: int = 20
    relative_step: float = 0.1

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """``noise`` is what :meth:`noise` would draw."""
        _check(images, labels)
        epsilon = _as_column(self.epsilon, images)
        start = self.noise(images, generator) if noise is None else noise
        attacked = (images + epsilon * (start.to(images) * 2 - 1)).clamp(0, 1)
        for _ in range(self.steps):
            step = epsilon * self.relative_step * _loss_gradient(classifier, attacked, labels).sign()
            attacked = torch.clamp(attacked + step, images - epsilon, images + epsilon).clamp(0, 1)
        return attacked

    def noise(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """All that is drawn at random for these images: uniform in [0, 1)."""
        return torch.rand(images.shape, generator=generator, device=images.device)


@dataclass(frozen=True)
class CarliniWagnerL2:
    """Carlini and Wagner's L2 attack (2017) in tanh space, without the search over the constant.

    The paper's setting is 100 iterations of Adam, one search step, constant 100 and learning rates 6 to 12. The
    smallest successful perturbation of all iterations is kept; an image that was never fooled is returned unchanged.

    Args:
        learning_rate: Adam's, in tanh space.
        iterations: gradient steps.
        constant: weight of the misclassification term against the squared L2 norm.
        confidence: margin between the logits that counts as success.
        abort_early: stop when the batch's loss fell by less than 0.01 % over a tenth of the iterations, as CleverHans
            and Foolbox do by default; and take images out of the batch that no further iteration can change.
    """

    learning_rate: float = 10.0
    iterations: int = 100
    constant: float = 100.0
    confidence: float = 0.0
    abort_early: bool = True

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        _check(images, labels)
        images = images.detach()
        origin = _to_tanh_space(images)
        reference = _from_tanh_space(origin)
        offset = torch.zeros_like(images)
        first, second = torch.zeros_like(images), torch.zeros_like(images)
        best = images.clone()
        best_distance = torch.full((len(images),), torch.inf, device=images.device)
        losses = torch.zeros(len(images), device=images.device)
        moving = torch.arange(len(images), device=images.device)
        previous = float("inf")
        patience = max(1, self.iterations // 10)
        for iteration in range(1, self.iterations + 1):
            with torch.enable_grad():
                offset.requires_grad_()
                attacked = _from_tanh_space(origin + offset)
                logits = classifier(attacked).float()
                margin = _margin(logits, labels) + self.confidence
                distance = (attacked - reference).square().flatten(1).sum(1)
                loss = self.constant * margin.clamp_min(0) + distance
                gradient = torch.autograd.grad(loss.sum(), offset)[0]
            better = (margin.detach() < 0) & (distance.detach() < best_distance[moving])
            best[moving] = torch.where(better.view(-1, 1, 1, 1), attacked.detach(), best[moving])
            best_distance[moving] = torch.where(better, distance.detach(), best_distance[moving])
            losses[moving] = loss.detach()
            if self.abort_early and iteration % patience == 0:
                total = float(losses.sum())
                if total > 0.9999 * previous:
                    break
                previous = total
            # Adam written out: its moments are per pixel, so that without abort_early no image depends on its batch.
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            offset = offset.detach()
            if self.abort_early:
                # At exactly 0 or 1 tanh has no gradient left, and a pixel whose momentum points outwards stays there.
                outwards = ((attacked == 0) | (attacked == 1)) & (first * (origin + offset) < 0)
                stays = (gradient == 0) & ((first == 0) | outwards)
                going = ~stays.flatten(1).all(1)
                if not going.all():
                    moving, labels = moving[going], labels[going]
                    origin, reference, offset = origin[going], reference[going], offset[going]
                    first, second = first[going], second[going]
                    if not len(moving):
                        break
            step = (first / (1 - 0.9**iteration)) / ((second / (1 - 0.999**iteration)).sqrt() + 1e-8)
            offset = offset - self.learning_rate * step
        return best


@dataclass(frozen=True)
class DeepFool:
    """DeepFool (Moosavi-Dezfooli et al. 2016), L2: steps to the nearest face of the linearised decision region.

    It has no bound: an image's perturbation grows until the classifier is fooled, and an image that is misclassified
    already stays as it is.

    Args:
        iterations: linearisations at most.
        overshoot: share by which the perturbation is made longer than the linear model asks for.
        past_face: distance, in the units of the steps, by which every step goes past the face; the authors' code has
            1e-4.
        in_tanh: take the steps in the space of :class:`CarliniWagnerL2` instead of pixels: no step leaves [0, 1] there,
            and pixels that are black or white hardly move.
    """

    iterations: int = 50
    overshoot: float = 0.02
    past_face: float = 1e-4
    in_tanh: bool = False

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        _check(images, labels)
        images = images.detach()
        attacked = images.clone()
        origin = _to_tanh_space(images) if self.in_tanh else images
        place, total = origin.clone(), torch.zeros_like(images)
        holding = torch.arange(len(images), device=images.device)
        for _ in range(self.iterations):
            with torch.enable_grad():
                leaf = place[holding].requires_grad_()
                logits = classifier(_from_tanh_space(leaf) if self.in_tanh else leaf).float()
                holds = logits.argmax(1) == labels[holding]
                if not holds.any():
                    break
                gradients = torch.stack(
                    [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in logits.unbind(1)], 1
                )
            holding = holding[holds]
            logits, gradients = logits.detach()[holds], gradients[holds].flatten(2).float()
            own = labels[holding].unsqueeze(1)
            # Per class: how far its face lies below the label's logit, and the normal of that face.
            heights = (logits - logits.gather(1, own)).abs()
            normals = gradients - gradients.gather(1, own.unsqueeze(2).expand(-1, -1, gradients.shape[2]))
            lengths = normals.norm(dim=2).clamp_min(1e-8)
            nearest = (heights / lengths).scatter(1, own, torch.inf).argmin(1, keepdim=True)
            height, length = heights.gather(1, nearest), lengths.gather(1, nearest)
            normal = normals.gather(1, nearest.unsqueeze(2).expand(-1, -1, normals.shape[2])).squeeze(1)
            step = (height / length + self.past_face) / length * normal
            total[holding] += step.view_as(total[holding]).to(total)
            moved = origin[holding] + (1 + self.overshoot) * total[holding]
            place[holding] = moved if self.in_tanh else moved.clamp(0, 1)
            attacked[holding] = _from_tanh_space(moved) if self.in_tanh else place[holding]
        return attacked


def _to_tanh_space(images: Tensor) -> Tensor:
    # The factor keeps arctanh finite at pixels that are exactly 0 or 1.
    return torch.atanh((images * 2 - 1) * 0.999999)


def _from_tanh_space(place: Tensor) -> Tensor:
    return (torch.tanh(place) + 1) / 2


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) how far the label's logit stands above the best of the others."""
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return own - others.amax(1)


# The paper's twelve training attacks: section 4.1.
PAPER_TRAINING_ATTACKS: tuple[Attack, ...] = (
    *(FGSM(epsilon) for epsilon in (0.25, 0.3, 0.35, 0.4)),
    *(RandFGSM(epsilon, 0.05) for epsilon in (0.25, 0.3, 0.35, 0.4)),
    *(CarliniWagnerL2(rate) for rate in (6.0, 8.0, 10.0, 12.0)),
)
# Table 1's three, by the names used in the reports.
PAPER_TEST_ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(0.3),
    "rand_fgsm": RandFGSM(0.3, 0.05),
    "cw": CarliniWagnerL2(10.0),
}
