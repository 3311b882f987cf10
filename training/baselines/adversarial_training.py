"""Adversarial training (Goodfellow et al. 2014; Kurakin et al. 2017; with PGD, Madry et al. 2018).

The loss is the mean of the cross-entropies on clean images and on images attacked on the network as it is at that step.
The attack runs away from the network's own prediction: away from the true label a single step writes that label into
its sign pattern, and the network learns to read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.attacks import FGSM, PGD, Attack, predict
from training.classifiers import build
from training.data import Dataset, to_float
from training.device import place
from training.loop import Run
from training.pairs import Order
from training.precision import autocast
from training.retrain import CLASSIFIER_FILE, classifier_identity
from training.train_classifier import accuracy, save_classifier

# By name: the paper's epsilon 0.3, single-step as in its table, and iterated, which masks no gradients.
ATTACKS = ("fgsm", "pgd")
PGD_STEPS, PGD_STEP = 7, 0.25


@dataclass(frozen=True)
class AdversarialSettings:
    """How a classifier is trained adversarially.

    Args:
        attack: ``fgsm``, the paper's column, or ``pgd`` with seven steps.
        epsilon: L-infinity bound (0.3 in the paper).
        epochs: passes over the training images (10 in the paper).
        batch_size: clean images a step; as many attacked ones join them.
        learning_rate: Adam's.
        seed: seeds weights, order, dropout and PGD's starts.
    """

    attack: str = "fgsm"
    epsilon: float = 0.3
    epochs: int = 10
    batch_size: int = 100
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS:
            raise ValueError(f"adversarial attack: expected one of {', '.join(ATTACKS)}, got {self.attack!r}")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"adversarial epsilon: expected above 0 and at most 1, got {self.epsilon}")
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.learning_rate < float("inf"):
            raise ValueError(
                "adversarial: expected epochs, batch_size and learning_rate above 0, "
                f"got {self.epochs}, {self.batch_size} and {self.learning_rate}"
            )

    def make_attack(self) -> Attack:
        """The attack of the training images."""
        return FGSM(self.epsilon) if self.attack == "fgsm" else PGD(self.epsilon, PGD_STEPS, PGD_STEP)


def train_adversarially(
    data: Dataset,
    name: str,
    settings: AdversarialSettings,
    out: Path,
    *,
    model: nn.Module | None = None,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
) -> tuple[nn.Module, bool]:
    """Train a classifier adversarially; ``classifier.safetensors`` in ``out`` holds its weights.

    Args:
        data: the data set; its training split is used.
        name: a built-in classifier, or what to call ``model``.
        settings: how to train.
        out: folder of the run.
        model: train this network from the weights it has, instead of a built-in one from random weights.
        about: what else decides the result.
        device: where to train.
        resume: go on from ``out``'s state.

    Returns:
        The classifier in eval mode, and whether all steps were made.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: the folder is another run's, or there is none to resume.
    """
    device = torch.device(device)
    description = {
        "kind": "adversarial", "classifier": name, "data_digest": data.digest, **vars(settings), **(about or {}),
    }  # fmt: skip
    run = Run(out, description, settings.seed, device, resume)
    run.open()
    torch.manual_seed(settings.seed)
    _, channels, size, _ = data.train.images.shape
    network = place(model if model is not None else build(name, channels, size, data.classes), device)
    network.requires_grad_(True).train()
    train = data.train.to(device)
    batch_size = min(settings.batch_size, len(train))
    steps = settings.epochs * (len(train) // batch_size)
    order = Order(len(train), settings.seed)
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    attack = settings.make_attack()

    def step(number: int) -> Tensor:
        index = order.take(number * batch_size, batch_size).to(device)
        images, labels = to_float(train.images[index]), train.labels[index]
        with autocast(device):
            # Without dropout, and with BatchNorm's running statistics: the network that will be attacked.
            network.eval()
            attacked = attack(network, images, predict(network, images))
            network.train()
            # One forward for both: BatchNorm's statistics are of all images that the network has to handle.
            logits = network(torch.cat([images, attacked.to(images)]))
        loss = F.cross_entropy(logits.float(), torch.cat([labels, labels]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def finish(made: int) -> None:
        header = {**classifier_identity(data), **description, "steps_made": made, "steps": steps}
        if made == steps:
            network.eval()
            header["validation_accuracy"] = accuracy(network, data.validation.to(device))
            network.train()
        save_classifier(out / CLASSIFIER_FILE, name, network, header, half=False)

    made = run.train(
        f"{name} adversarially on {data.name}", step, steps, modules={"classifier": network},
        optimizers={"adam": optimizer}, images=2 * batch_size, finish=finish,
    )  # fmt: skip
    return network.eval().requires_grad_(False), made == steps
