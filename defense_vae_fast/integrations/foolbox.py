"""For Foolbox: ``pip install 'defense-vae-fast[foolbox]'``."""

from __future__ import annotations

from collections.abc import Sequence

from foolbox.models.pytorch import PyTorchModel
from torch import nn

from defense_vae_fast.purifier import Purifier


def foolbox_model(
    purifier: Purifier,
    classifier: nn.Module,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> PyTorchModel:
    """``classifier`` behind the purifier as a Foolbox model with bounds (0, 1), differentiable from end to end.

    Foolbox's attacks on it are adaptive: they see the purifier.

    Args:
        purifier, classifier, mean, std: as in :meth:`Purifier.defend`. The classifier should be in eval mode.

    Raises:
        TypeError, ValueError: as :meth:`Purifier.defend`.
    """
    defended = purifier.defend(classifier, mean, std)
    return PyTorchModel(defended, bounds=purifier.bounds)
