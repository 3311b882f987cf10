"""Training recipes: what decides a purifier's weights; the checkpoint's header holds it with the pairs' attacks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from training.classifiers import MODERN_CLASSIFIERS, PAPER_CLASSIFIERS

Optimizer = Literal["adam", "muon"]


@dataclass(frozen=True)
class Recipe:
    """How a purifier is trained.

    Args:
        name: for the header.
        pairs: ``table`` makes the paper's twelve attacks on every image beforehand; ``fly`` attacks each batch afresh.
        classifiers: the attacked classifiers, pooled; ``fly`` attacks them one a step in this order, and one that is
            named more than once gets more turns.
        steps: optimizer steps; 0 means ``epochs`` passes over the pairs.
        epochs: passes over the pairs where ``steps`` is 0.
        attacked: attacked images a batch (``table``: pairs a batch, clean ones among them).
        clean: clean images a batch beside them (``fly`` alone).
        images: training images that are attacked (``table`` alone); 0 means all.
        cw_images: training images that are attacked by CW (``table`` alone); 0 means all.
        noise: share of the pairs of FGSM and RAND-FGSM that get random signs instead of the gradient's (``table``
            alone); 0 in the paper.
        mirrored: attack mirror images of the training images too; ``images`` and ``cw_images`` count both.
        optimizer: ``adam``, or ``muon`` for the matrices and Adam for the rest (:mod:`training.muon`).
        learning_rate: Adam's.
        warmup: steps of linear warm-up.
        decay: share of the steps, at the end, over which the rate falls linearly to 0.
        kl_weight: weight of the KL term of equation 4: 1 in the paper's text, 0 in its released code.
        agreement_weight: weight of the classifiers' agreement between purified and clean images; 0 in the paper.
        own_agreement_weight: the same for the attacked classifier's word on its own attacked images (``fly`` alone).
        averaging: decay of the exponential average of the weights that is shipped; 0 ships the last weights.
        latent_dim: size of the latent.
        seed: seeds weights, order, noise.
    """

    name: str
    pairs: Literal["table", "fly"]
    classifiers: tuple[str, ...]
    steps: int = 0
    epochs: int = 0
    attacked: int = 64
    clean: int = 0
    images: int = 0
    cw_images: int = 0
    noise: float = 0.0
    mirrored: bool = False
    optimizer: Optimizer = "adam"
    learning_rate: float = 5e-4
    warmup: int = 0
    decay: float = 0.0
    kl_weight: float = 0.0
    agreement_weight: float = 0.0
    own_agreement_weight: float = 0.0
    averaging: float = 0.0
    latent_dim: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs not in ("table", "fly"):
            raise ValueError(f"recipe pairs: expected 'table' or 'fly', got {self.pairs!r}")
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(f"recipe optimizer: expected 'adam' or 'muon', got {self.optimizer!r}")
        if not self.classifiers:
            raise ValueError("recipe classifiers: expected at least one, got none")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and type(value) is not int:
                raise ValueError(f"recipe {field.name}: expected an int, got {value!r}")
            if field.type == "float" and not math.isfinite(value):
                raise ValueError(f"recipe {field.name}: expected a finite number, got {value!r}")
        if min(self.steps, self.epochs) != 0 or max(self.steps, self.epochs) < 1:
            raise ValueError(f"recipe: expected either steps or epochs above 0, got {self.steps} and {self.epochs}")
        lowest = {
            "attacked": 1, "clean": 0, "images": 0, "cw_images": 0, "warmup": 0, "kl_weight": 0,
            "agreement_weight": 0, "own_agreement_weight": 0, "latent_dim": 1, "seed": 0,
        }  # fmt: skip
        for name, bound in lowest.items():
            if getattr(self, name) < bound:
                raise ValueError(f"recipe {name}: expected at least {bound}, got {getattr(self, name)}")
        if self.own_agreement_weight and self.pairs != "fly":
            raise ValueError(
                "recipe own_agreement_weight: expected pairs 'fly', whose batches have one attacked classifier"
            )
        if self.noise and self.pairs != "table":
            raise ValueError("recipe noise: expected pairs 'table', which it is a part of")
        if self.learning_rate <= 0:
            raise ValueError(f"recipe learning_rate: expected above 0, got {self.learning_rate}")
        for name in ("decay", "averaging", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"recipe {name}: expected 0 to below 1, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for a header.

        ``mirrored`` and ``optimizer`` are left out where they are as in all runs of before there was a choice.
        """
        values = {**asdict(self), "classifiers": list(self.classifiers)}
        usual = {"mirrored": False, "optimizer": "adam"}
        return {key: value for key, value in values.items() if key not in usual or value != usual[key]}

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) of ``steps``: warm-up, plateau, linear decay."""
        rising = (step + 1) / self.warmup if step < self.warmup else 1.0
        falling = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return self.learning_rate * min(rising, falling, 1.0)


PRESETS: dict[str, Recipe] = {
    # The paper's pairs and loss at the scale of the paper (section 4.1; batch and rate from its released code).
    "paper": Recipe("paper", "table", ("A",), epochs=5, attacked=16),
    # The same on a tenth of the images, with larger batches: minutes on two cores.
    "quick": Recipe(
        "quick", "table", ("A",), epochs=3, attacked=64, images=6000, cw_images=2000, learning_rate=1e-3, decay=0.3
    ),
    # The shipped recipe; beyond the paper: fresh attacks, modern classifiers in the pool, agreement, averaged weights.
    "pooled": Recipe(
        "pooled", "fly", (*PAPER_CLASSIFIERS, *MODERN_CLASSIFIERS), steps=16000, attacked=36, clean=12,
        learning_rate=1e-3, warmup=200, decay=0.5, agreement_weight=30.0, averaging=0.998,
    ),
    # After it, with --init: the attacked classifier judges its own images too, D has more turns, more images are clean.
    "polish": Recipe(
        "polish", "fly", ("A", "D", "residual", "B", "D", "vgg_bn", "C", "D", "residual_stem"), steps=12000,
        attacked=30, clean=18, learning_rate=7e-4, warmup=100, decay=0.7, agreement_weight=30.0,
        own_agreement_weight=30.0, averaging=0.998,
    ),
}  # fmt: skip


def preset(name: str, *, batch_size: int | None = None, **overrides: Any) -> Recipe:
    """A preset with some fields replaced; None leaves a field as it is.

    Args:
        name: of the preset.
        batch_size: images a batch; attacked and clean ones keep their shares.
        overrides: other fields.

    Raises:
        ValueError: no such preset, or a value out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    chosen = PRESETS[name]
    if batch_size is not None:
        clean = round(batch_size * chosen.clean / (chosen.attacked + chosen.clean))
        chosen = replace(chosen, attacked=batch_size - clean, clean=clean)
    return replace(chosen, **{key: value for key, value in overrides.items() if value is not None})
