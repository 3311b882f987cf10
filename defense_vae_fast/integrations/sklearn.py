"""A step for scikit-learn's pipelines: ``pip install 'defense-vae-fast[sklearn]'``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

from defense_vae_fast.integrations.lazy import LazyPurifier


class PurifyTransformer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Purifies rows of pixels; there is nothing to fit.

    It can be cloned and pickled; in each process a Purifier is made at its first use.

    Args:
        checkpoint: a shipped name or a path.
        engine: an engine's name, or "auto".
    """

    _purifier: LazyPurifier | None = None

    def __init__(self, checkpoint: str | os.PathLike[str] = "fashion_mnist", engine: str = "auto") -> None:
        self.checkpoint = checkpoint
        self.engine = engine

    def fit(self, X: Any, y: Any = None) -> PurifyTransformer:
        """Nothing to do."""
        return self

    def transform(self, X: Any) -> npt.NDArray[Any]:
        """Purify floating (N, C * H * W) pixels in [0, 1], or (N, C, H, W) ones; the same shape and dtype come back.

        Raises:
            TypeError, ValueError: as calling a Purifier.
        """
        lazy = self._purifier
        if lazy is None or (lazy.checkpoint, lazy.options["engine"]) != (self.checkpoint, self.engine):
            lazy = self._purifier = LazyPurifier(self.checkpoint, engine=self.engine)
        purifier = lazy.get()
        pixels = np.asarray(X)
        if pixels.ndim != 2:
            return np.asarray(purifier(pixels))
        if pixels.shape[1] != np.prod(purifier.config.image_shape):
            shape = " x ".join(map(str, purifier.config.image_shape))
            raise ValueError(f"X: expected (N, {shape}) pixels in a row, got {pixels.shape}; resize the images")
        return np.asarray(purifier(pixels.reshape(-1, *purifier.config.image_shape)).reshape(pixels.shape))

    def __sklearn_is_fitted__(self) -> bool:
        return True
