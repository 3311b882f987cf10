"""Measure a purifier: accuracy of classifiers with and without it, clean and attacked.

All attacks here are *oblivious*: they are made on the bare classifier, as the paper's "white-box" ones are, and the
purifier comes afterwards. They say nothing about an attacker who knows that it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from defense_vae_fast import Purifier
from defense_vae_fast.nn.model import DefenseVAE
from training.attacked import attacked_images
from training.attacks import FGSM, PGD, Attack, CarliniWagnerL2, DeepFool, predict
from training.data import Split, to_float, to_uint8
from training.paper import paper_value

# What a classifier outside the training pool is tried with, beside the paper's three.
TRANSFER_ATTACKS: dict[str, Attack] = {
    "fgsm_0.1": FGSM(0.1),
    "fgsm_0.3": FGSM(0.3),
    "pgd_0.1": PGD(0.1, steps=20),
    "pgd_0.3": PGD(0.3, steps=20),
    "cw": CarliniWagnerL2(10.0),
    "cw_small": CarliniWagnerL2(0.01),
    "deepfool": DeepFool(),
}


@dataclass(frozen=True)
class Cell:
    """One measurement; accuracies in percent.

    ``labels`` says what the attack ran away from: ``true`` labels (the paper) or the classifier's ``predicted`` ones.
    ``bare`` and ``purified`` are the classifier's accuracy without and with the purifier on the same images;
    ``engines`` holds the latter with engines in the place of the float32 module, by their names.
    """

    classifier: str
    attack: str
    labels: str
    images: int
    bare: float
    purified: float
    paper: float | None = None
    engines: Mapping[str, float] = field(default_factory=dict)


def paper_accuracy(dataset: str, attack: str, classifier: str) -> float | None:
    """The column "Defense-VAE" of the paper's Table 1, or 7 for colour, in percent; None where it has no such cell."""
    row = {"dataset": dataset or "none", "attack": attack, "classifier": classifier}
    found = [paper_value(table, "defense_vae", **row) for table in ("1", "7")]
    return next((value for value in found if value is not None), None)


def evaluate(
    model: DefenseVAE,
    classifiers: Mapping[str, nn.Module],
    split: Split,
    attacks: Mapping[str, Attack],
    *,
    engines: Mapping[str, Purifier] | None = None,
    dataset: str = "",
    predicted_labels: bool = False,
    seed: int = 0,
    keep: Path | None = None,
) -> list[Cell]:
    """Accuracy of every classifier on clean images and under every attack, bare and behind the purifier.

    Attacked images are rounded to 8 bits before anybody looks at them, and purified ones after.

    Args:
        model: the purifier, in eval mode.
        classifiers: by name, in eval mode.
        split: images and labels, on the device of the models.
        attacks: by the name used in the report.
        engines: purifiers that are measured beside the model on the very same images, by the name used in the report.
        dataset: names the paper's cells to put beside ours.
        predicted_labels: attack away from the classifier's own predictions.
        seed: seeds the attacks' noise.
        keep: folder in which attacked images are kept, and from which they are taken the next time.
    """
    cells = []
    for name, classifier in classifiers.items():
        made = {"clean": split.images}
        for attack_name, attack in attacks.items():
            made[attack_name] = attacked_images(
                attack, classifier, split, seed=seed, predicted_labels=predicted_labels,
                title=f"{attack_name} on {name}", folder=keep,
            )  # fmt: skip
        for attack_name, images in made.items():
            labels = "predicted" if predicted_labels and attack_name != "clean" else "true"
            cells.append(
                Cell(
                    name, attack_name, labels, len(split),
                    bare=_accuracy(classifier, images, split.labels),
                    purified=_accuracy(classifier, purify_all(model, images), split.labels),
                    paper=paper_accuracy(dataset, attack_name, name),
                    engines={
                        engine: _accuracy(classifier, purify_with(purifier, images), split.labels)
                        for engine, purifier in (engines or {}).items()
                    },
                )
            )  # fmt: skip
    return cells


@torch.no_grad()
def purify_all(model: DefenseVAE, images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> purified uint8 (N, C, H, W)."""
    return torch.cat([to_uint8(model.purify(to_float(part))) for part in torch.split(images, 250)])


def purify_with(purifier: Purifier, images: Tensor) -> Tensor:
    """:func:`purify_all` by an engine."""
    return purifier(images.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def _accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    correct = 0
    for part, wanted in zip(torch.split(images, 250), torch.split(labels, 250), strict=True):
        correct += int((predict(classifier, to_float(part)) == wanted).sum())
    return round(100 * correct / len(images), 2)


def summary(cells: list[Cell]) -> dict[str, float]:
    """Mean accuracy behind the purifier over the attacked cells, and mean points that clean images lose."""
    attacked = [cell.purified for cell in cells if cell.attack != "clean"]
    lost = [cell.bare - cell.purified for cell in cells if cell.attack == "clean"]
    return {
        "attacked_mean": round(sum(attacked) / len(attacked), 2) if attacked else float("nan"),
        "clean_loss": round(sum(lost) / len(lost), 2) if lost else float("nan"),
    }


def render(cells: list[Cell], title: str) -> Table:
    """The cells as a table for a terminal."""
    table = Table(title=title)
    engines = list(cells[0].engines) if cells else []
    for column in ("classifier", "attack", "labels", "bare", "purified", *engines, "paper", "difference"):
        table.add_column(column, justify="left" if column in ("classifier", "attack", "labels") else "right")
    for cell in cells:
        paper = "" if cell.paper is None else f"{cell.paper:.2f}"
        difference = "" if cell.paper is None else f"{cell.purified - cell.paper:+.2f}"
        measured = (f"{value:.2f}" for value in (cell.bare, cell.purified, *cell.engines.values()))
        table.add_row(cell.classifier, cell.attack, cell.labels, *measured, paper, difference)
    return table


def records(cells: list[Cell]) -> list[dict[str, object]]:
    """The cells as plain dictionaries, for JSON."""
    return [asdict(cell) for cell in cells]


def for_header(cells: list[Cell]) -> dict[str, dict[str, list[float]]]:
    """What a checkpoint's header keeps: classifier -> attack -> [bare, purified, each engine]."""
    kept: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        kept.setdefault(cell.classifier, {})[cell.attack] = [cell.bare, cell.purified, *cell.engines.values()]
    return kept
