"""For the Adversarial Robustness Toolbox: ``pip install 'defense-vae-fast[art]'``.

::

    from art.estimators.classification import PyTorchClassifier
    from defense_vae_fast.integrations.art import DefenseVAEPreprocessor

    classifier = PyTorchClassifier(model, loss, (1, 28, 28), 10, clip_values=(0, 1),
                                   preprocessing_defences=DefenseVAEPreprocessor(purifier))
"""

from __future__ import annotations

from typing import Any

import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from torch import Tensor, nn

from defense_vae_fast.purifier import Purifier

_ROUNDING = 1e-6  # an attack's clipping may leave the bounds by so much


class DefenseVAEPreprocessor(PreprocessorPyTorch):  # type: ignore[misc]
    """The purifier as a preprocessing defence, in front of any normalisation.

    Differentiable from end to end: ``estimate_gradient`` is the exact gradient of the purifier, not an estimate, so the
    toolbox's white-box attacks are adaptive ones that see it. It runs the plain float32 network in torch, whatever
    engine the Purifier has.

    Args:
        purifier: whose weights are used; it may be closed afterwards.
        device_type: "cpu", or "gpu" for the current CUDA device if there is one, as everywhere in the toolbox.
        apply_fit: whether it is applied when a classifier is fitted.
        apply_predict: whether it is applied at prediction.
    """

    params: list[str] = []  # noqa: RUF012 - the toolbox's own way of saying that there is nothing to set

    def __init__(
        self, purifier: Purifier, *, device_type: str = "gpu", apply_fit: bool = False, apply_predict: bool = True
    ) -> None:
        super().__init__(device_type=device_type, is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self._network = purifier.defend(nn.Identity()).to(self.device)

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """Floating (N, C, H, W) images in [0, 1] -> the purified ones, differentiable in ``x``; ``y`` as it is.

        Raises:
            ValueError: a wrong shape or dtype, or values outside [0, 1].
        """
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(
                f"x: expected values in [0, 1], got {low} to {high}; make the classifier with clip_values=(0, 1), "
                "and let it normalise after this defence"
            )
        purified: Tensor = self._network(x.float())
        return purified.to(x.dtype), y
