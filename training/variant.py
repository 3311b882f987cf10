"""Release a purifier with the classifier that learnt together with it, as a variant of a shipped purifier."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defense_vae_fast.atomic import replacing
from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from defense_vae_fast.nn.model import DefenseVAE
from training.attacked import attacked_images
from training.attacks import PAPER_TEST_ATTACKS
from training.data import Dataset, Split
from training.defences import Defence, bare, defense_vae, measure
from training.demo_data import classifier_graph
from training.device import place
from training.fit import CHECKPOINT_FILE
from training.retrain import CLASSIFIER_FILE
from training.train_classifier import load_weights

Accuracies = Mapping[str, Sequence[float]]


class Released(NamedTuple):
    """What was written, and what was measured before."""

    name: str
    """Under which the library finds it."""
    classifier: nn.Module
    """The pair's own, with the rounded weights of its file."""
    columns: tuple[str, ...]
    """The attacked classifier alone and behind the shipped purifier; the pair, attacked through that classifier and
    through its own."""
    validation: Accuracies
    """Attack -> accuracy in percent of each column on validation images, attacks away from the prediction."""
    test: Mapping[str, Accuracies]
    """The same on test images, by what the attacks ran away from: ``true`` or ``predicted`` labels."""


def release(
    data: Dataset,
    name: str,
    attacked: nn.Module,
    shipped: Checkpoint,
    run: Path,
    weights: Path,
    *,
    variant: str = "e2e",
    images: int | None = None,
    device: torch.device | str = "cpu",
    keep: Path | None = None,
) -> Released:
    """Write ``DATASET-VARIANT.safetensors`` and ``DATASET-VARIANT_classifier.onnx``, if the pair is better.

    Better means: on clean validation images and attacked ones it is right more often in the mean than the attacked
    classifier behind the shipped purifier, whether the attacker knows that classifier, as in the paper, or the pair's
    own. Attacks run away from the prediction: a single step away from the true label carries that label, which a pair
    can learn to read. What is measured on the test set decides nothing, and goes into the header.

    Args:
        data: the data set.
        name: of the attacked classifier.
        attacked: the classifier that the attacker knows, a plain stack (Table 5), in eval mode.
        shipped: the purifier that the pair is compared with.
        run: folder of a finished ``finetune``.
        weights: where both files go.
        variant: its name.
        images: of validation and test split each; None takes all.
        device: where to measure.
        keep: folder of attacked images.

    Raises:
        ValueError: the run is not a finished ``finetune`` of this classifier and data set, the pair is no better, or
            the classifier is no plain stack. Nothing is written.
        FileNotFoundError: the run's files are not there.
    """
    device = torch.device(device)
    bundle = load_checkpoint(run / CHECKPOINT_FILE)
    found = {key: bundle.recipe.get(key) for key in ("kind", "classifier", "data_digest", "steps_made")}
    wanted = {
        "kind": "finetune", "classifier": name, "data_digest": data.digest,
        "steps_made": bundle.recipe.get("steps", 0),
    }  # fmt: skip
    if found != wanted:
        raise ValueError(f"{run}: expected a finished run of 'finetune' with {wanted}, got {found}")
    student = _rounded(load_weights(run / CLASSIFIER_FILE, attacked, device))
    _, channels, size, _ = data.train.images.shape
    with torch.no_grad():
        graph = classifier_graph(student, channels, size)

    before, after = (place(DefenseVAE.from_checkpoint(one), device) for one in (shipped, bundle))
    released = f"{data.name}-{variant}"
    defences = {
        "bare": bare(attacked),
        data.name: defense_vae(attacked, before),
        released: defense_vae(attacked, after, student),
        f"{released}, its own classifier attacked": defense_vae(student, after, student),
    }
    columns = tuple(defences)

    def accuracies(split: Split, predicted: bool) -> dict[str, list[float]]:
        return _accuracies(tuple(defences.values()), split.first(images).to(device), predicted, keep)

    validation = accuracies(data.validation, True)
    means = [statistics.fmean(column) for column in zip(*validation.values(), strict=True)]
    if min(means[2:]) <= means[1]:
        figures = ", ".join(f"{column} {mean:.2f} %" for column, mean in zip(columns, means, strict=True))
        raise ValueError(
            f"{run}: expected a pair that is better on validation images than {name} behind {data.name}, "
            f"got these means: {figures}; nothing was written"
        )
    test = {labels: accuracies(data.test, labels == "predicted") for labels in ("true", "predicted")}
    count = len(data.test.first(images))
    header = {
        f"{count} test images, attacks on the bare classifier {name} away from {labels} labels": {
            "images": count, "columns": list(columns), **rows,
        }
        for labels, rows in test.items()
    }  # fmt: skip
    with replacing(weights / f"{released}_classifier.onnx") as file:
        file.write(graph.SerializeToString())
    save_checkpoint(weights / f"{released}.safetensors", replace(bundle, accuracies={**bundle.accuracies, **header}))
    return Released(released, student, columns, validation, test)


def _accuracies(
    defences: Sequence[Defence], split: Split, predicted: bool, keep: Path | None
) -> dict[str, list[float]]:  # fmt: skip
    """Attack -> accuracy of each defence, attacked through the classifier that its attacker knows."""
    rows = {"clean": [measure(defence, split.images, split.labels).accuracy for defence in defences]}
    for title, attack in PAPER_TEST_ATTACKS.items():
        made: dict[nn.Module, Tensor] = {}
        for defence in defences:
            if defence.attacked not in made:
                made[defence.attacked] = attacked_images(
                    attack, defence.attacked, split, predicted_labels=predicted, title=title, folder=keep
                )
        rows[title] = [measure(one, made[one.attacked], split.labels).accuracy for one in defences]
    return rows


@torch.no_grad()
def _rounded(classifier: nn.Module) -> nn.Module:
    """A copy with the weights that a file of fp16 has, so that what is measured is what is written."""
    copied = copy.deepcopy(classifier)
    for parameter in copied.parameters():
        parameter.copy_(parameter.half().float())
    return copied
