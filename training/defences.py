"""One face for every defence, so that one harness measures them all.

Attacks are *oblivious* unless somebody says otherwise: made on :attr:`Defence.attacked`, the bare classifier, without
knowledge of what stands in front of it. For adversarial training, which has nothing in front, it is the classifier
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defense_vae_fast.nn.model import DefenseVAE
from training.attacks import predict
from training.data import to_float
from training.evaluate import purify_all
from training.progress import bar

BATCH = 250


class Answer(NamedTuple):
    """What a defended classifier says of a batch."""

    classes: Tensor
    """(N,) int64."""
    rejected: Tensor
    """(N,) bool: a detector turned the image away."""


@dataclass(frozen=True)
class Defence:
    """A defended classifier.

    Attributes:
        name: for reports.
        attacked: the classifier that an oblivious attacker knows, in eval mode.
        answer: uint8 (N, C, H, W) images to an :class:`Answer`.
        batch: images handed over at once.
    """

    name: str
    attacked: nn.Module
    answer: Callable[[Tensor], Answer]
    batch: int = BATCH


class Score(NamedTuple):
    """Percent of a split's images."""

    accuracy: float
    """Classified right, whatever a detector says: the paper's figure."""
    rejected: float
    """Turned away by a detector."""
    handled: float
    """Classified right or turned away: how a defence with detectors counts attacked images."""


@torch.no_grad()
def measure(defence: Defence, images: Tensor, labels: Tensor, *, title: str | None = None) -> Score:
    """Score a defence.

    Args:
        defence: the defence.
        images: uint8 (N, C, H, W), clean or attacked.
        labels: (N,) int64 true labels.
        title: shows a progress bar of this name.

    Raises:
        ValueError: there is no image, or not one label an image.
    """
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected one for each of one or more images, got {len(labels)} and {len(images)}")
    right = rejected = handled = 0
    parts = zip(torch.split(images, defence.batch), torch.split(labels, defence.batch), strict=True)
    with bar(title or "measure", len(images), quiet=title is None) as progress:
        for part, wanted in parts:
            answer = defence.answer(part)
            correct = answer.classes == wanted
            right += int(correct.sum())
            rejected += int(answer.rejected.sum())
            handled += int((correct | answer.rejected).sum())
            progress.update(len(part), images=len(part))
    return Score(*(round(100 * count / len(images), 2) for count in (right, rejected, handled)))


def bare(classifier: nn.Module, name: str = "no_defense") -> Defence:
    """A classifier with nothing in front: no defence at all, or one that lies in its weights."""
    return purifying(name, classifier, lambda images: images, classifier)


def purifying(
    name: str,
    attacked: nn.Module,
    purify: Callable[[Tensor], Tensor],
    classifier: nn.Module | None = None,
    batch: int = BATCH,
) -> Defence:
    """A classifier behind something that changes images.

    Args:
        name: for reports.
        attacked: the classifier that is attacked.
        purify: uint8 images to uint8 images.
        classifier: what sees the purified images; the attacked classifier where left out.
        batch: images purified at once.
    """
    seeing = attacked if classifier is None else classifier

    def answer(images: Tensor) -> Answer:
        classes = predict(seeing, to_float(purify(images)))
        return Answer(classes, torch.zeros_like(classes, dtype=torch.bool))

    return Defence(name, attacked, answer, batch)


def defense_vae(
    attacked: nn.Module, purifier: DefenseVAE, classifier: nn.Module | None = None, name: str = "defense_vae"
) -> Defence:
    """A purifier and the classifier behind it: the attacked one, or another that was trained for purified images.

    ``classifier`` None is the paper's Defense-VAE; a retrained one its -REC; one trained together with its purifier
    its -E2E.
    """
    return purifying(name, attacked, lambda images: purify_all(purifier, images), classifier)
