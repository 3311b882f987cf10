"""Whether the toolboxes' attacks see the purifier: ``python -m bench.toolboxes``.

Adaptive PGD (L-infinity, no random start) on a classifier behind the shipped purifier, three times: written down here
on ``Purifier.defend``, by the Adversarial Robustness Toolbox on its ``Preprocessor``, and by Foolbox on its model.
Accuracy behind the purifier at several epsilons; the three must agree within a point. An oblivious PGD of the same
strength, on the bare classifier, is beside them: a toolbox that did not see the purifier would do no better than that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import art.attacks.evasion
import foolbox
import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from defense_vae_fast import Purifier
from defense_vae_fast.demo import load_samples
from defense_vae_fast.integrations.art import DefenseVAEPreprocessor
from defense_vae_fast.integrations.foolbox import foolbox_model
from training.train_classifier import load_classifier

EPSILONS = (0.02, 0.05, 0.1, 0.2, 0.3)
BATCH = 50
AGREEMENT = 1.0  # points
_WEIGHTS = Path(__file__).resolve().parents[1] / "training" / "weights"


def plain(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, step: float, steps: int) -> Tensor:
    """PGD (Madry et al. 2018) from the image itself."""
    attacked = images.clone()
    for _ in range(steps):
        attacked.requires_grad_()
        [gradient] = torch.autograd.grad(F.cross_entropy(model(attacked), labels, reduction="sum"), attacked)
        attacked = (attacked.detach() + step * gradient.sign()).clamp(images - epsilon, images + epsilon).clamp(0, 1)
    return attacked.detach()


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many are still classified rightly."""
    return int((model(images).argmax(1) == labels).sum())


def main() -> int:
    """Attack, print, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="the packaged test images, up to 500")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--classifier", default="D", help="A, B, C, D, residual ...: training/weights/fashion_mnist_*")
    options = parser.parse_args()
    samples = load_samples("fashion_mnist")
    images = torch.from_numpy(samples.images["clean"][: options.images]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(samples.labels[: options.images].astype(np.int64))
    classifier = load_classifier(_WEIGHTS / f"fashion_mnist_{options.classifier}.safetensors")[0].eval()
    with Purifier.from_pretrained("fashion_mnist") as purifier:
        defended = purifier.defend(classifier)
        boxed = foolbox_model(purifier, classifier)
        defence = DefenseVAEPreprocessor(purifier, device_type="cpu")
    estimator = PyTorchClassifier(
        classifier, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 10, clip_values=(0, 1),
        preprocessing_defences=defence, device_type="cpu",
    )  # fmt: skip
    table = Table(title=f"accuracy behind the purifier in %, {len(images)} images, PGD with {options.steps} steps")
    headings = ("epsilon", "plain PGD, adaptive", "ART", "Foolbox", "plain PGD, oblivious")
    for heading in headings:
        table.add_column(heading, justify="right")
    agree = True
    for epsilon in EPSILONS:
        step = epsilon / 8
        by_art = art.attacks.evasion.ProjectedGradientDescent(
            estimator, eps=epsilon, eps_step=step, max_iter=options.steps, batch_size=BATCH, verbose=False
        )
        by_foolbox = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=options.steps, random_start=False)
        counts = np.zeros(4)
        for some, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            counts += [
                correct(defended, attacked, wanted)
                for attacked in (
                    plain(defended, some, wanted, epsilon, step, options.steps),
                    torch.from_numpy(by_art.generate(some.numpy(), wanted.numpy())),
                    by_foolbox(boxed, some, wanted, epsilons=epsilon)[1],
                    plain(classifier, some, wanted, epsilon, step, options.steps),
                )
            ]
        found = 100 * counts / len(images)
        agree &= bool(np.ptp(found[:3]) <= AGREEMENT)
        table.add_row(f"{epsilon:g}", *(f"{value:.1f}" for value in found))
    Console().print(table)
    print(f"the three agree within {AGREEMENT:g} point at every epsilon: {'yes' if agree else 'NO'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
