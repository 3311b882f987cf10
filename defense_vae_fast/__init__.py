"""Defense-VAE: removes known adversarial perturbations from images before a classifier sees them.

from defense_vae_fast import Purifier

purifier = Purifier.from_pretrained("fashion_mnist")
clean = purifier(images)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from defense_vae_fast.architecture import VAEConfig
    from defense_vae_fast.checkpoint import CheckpointError, list_pretrained, pretrained_classifier
    from defense_vae_fast.engines.base import EngineUnavailable
    from defense_vae_fast.purifier import Purifier

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "EngineUnavailable",
    "Purifier",
    "VAEConfig",
    "__version__",
    "list_pretrained",
    "pretrained_classifier",
]

# Importing the package costs nothing; NumPy and the rest come with the first name used (PEP 562).
_HOMES = {
    "CheckpointError": "checkpoint",
    "EngineUnavailable": "engines.base",
    "Purifier": "purifier",
    "VAEConfig": "architecture",
    "list_pretrained": "checkpoint",
    "pretrained_classifier": "checkpoint",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
