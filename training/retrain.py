"""Defense-VAE-REC (section 2.2): the classifier is trained on what the purifier makes of attacked and clean images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense_vae_fast.nn.model import DefenseVAE
from training.data import Dataset, to_float, to_uint8
from training.device import place
from training.loop import Run
from training.pairs import PairSource
from training.precision import autocast
from training.train_classifier import save_classifier, weights_digest

CLASSIFIER_FILE = "classifier.safetensors"


@dataclass(frozen=True)
class RetrainSettings:
    """How the classifier is trained.

    Args:
        steps: optimizer steps; 0 means ``epochs`` passes over the pairs.
        epochs: passes over the pairs where ``steps`` is 0.
        learning_rate: Adam's at the start; it falls linearly to 0.
        seed: seeds dropout.
    """

    steps: int = 0
    epochs: int = 1
    learning_rate: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.epochs < 1:
            raise ValueError(f"retrain: expected steps >= 0 and epochs >= 1, got {self.steps} and {self.epochs}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"retrain learning_rate: expected above 0, got {self.learning_rate}")


def retrain(
    data: Dataset,
    name: str,
    classifier: nn.Module,
    purifier: DefenseVAE,
    pairs: Callable[[], PairSource],
    settings: RetrainSettings,
    out: Path,
    *,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
) -> tuple[nn.Module, bool]:
    """Train a copy of a classifier on purified images; ``classifier.safetensors`` in ``out`` holds its weights.

    Args:
        data: the data set; its training split is used.
        name: the classifier's name, for the header.
        classifier: where its weights start; it is left as it is.
        purifier: in eval mode; it is left as it is.
        pairs: makes the source of attacked and clean images, which may take long; called once the folder is known to
            be good.
        settings: how to train.
        out: folder of the run.
        about: what else decides the result, such as the recipe of the pairs.
        device: where to train.
        resume: go on from ``out``'s state.

    Returns:
        The trained classifier in eval mode, and whether all steps were made.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: the folder is another run's, or there is none to resume.
    """
    device = torch.device(device)
    description = {
        "kind": "retrain", "classifier": name, **asdict(settings), **(about or {}), "data_digest": data.digest,
        "classifier_digest": weights_digest(classifier), "purifier_digest": weights_digest(purifier),
    }  # fmt: skip
    run = Run(out, description, settings.seed, device, resume)
    run.open()
    source = pairs()
    steps = settings.steps or settings.epochs * source.steps_per_epoch
    train = data.train.to(device)
    purifier = purifier.to(device).eval()
    student = place(copy.deepcopy(classifier), device).requires_grad_(True).train()
    optimizer = torch.optim.Adam(student.parameters(), settings.learning_rate)

    def step(number: int) -> Tensor:
        batch = source.batch(number)
        with torch.no_grad(), autocast(device):
            purified = purifier.purify(batch.inputs)
        with autocast(device):
            # Rounded to 8 bits as the purifier's users see them.
            logits = student(to_float(to_uint8(purified.float())))
        loss = F.cross_entropy(logits.float(), train.labels[batch.clean_index])
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (steps - number) / steps
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def finish(made: int) -> None:
        header = {**classifier_identity(data), **description, "steps_made": made, "steps": steps}
        save_classifier(out / CLASSIFIER_FILE, name, student, header, half=False)

    made = run.train(
        f"{name} on purified {data.name}", step, steps, modules={"classifier": student}, optimizers={"adam": optimizer},
        images=len(source.batch(0).inputs), finish=finish,
    )  # fmt: skip
    return student.eval().requires_grad_(False), made == steps


def classifier_identity(data: Dataset) -> dict[str, Any]:
    """What a classifier's header says of the images and classes that it is for."""
    _, channels, size, _ = data.train.images.shape
    return {
        "dataset": data.name, "channels": channels, "image_size": size, "classes": data.classes,
        "class_names": list(data.class_names),
    }  # fmt: skip
