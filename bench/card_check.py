"""A robustness card's numbers once more, by an attack library that is not ours: ``python -m bench.card_check NAME``.

Foolbox attacks the images that the card in ``docs/cards/NAME`` was measured on: the bare classifier, for the oblivious
rows, and the whole pipeline with PGD from as many random starts as the card's, for the adaptive ones. Every accuracy
must be within a point of the card's; exit code 1 where one is not. The comparison is written beside the card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.machine import describe
from bench.report import write_json
from defense_vae_fast import Purifier
from training import pool
from training.black_box import SubstituteSettings, split_off
from training.card.render import JSON_FILE
from training.data import load_dataset, to_float, to_uint8

AGREEMENT = 1.0  # points
BATCH = 100
OBLIVIOUS: dict[str, tuple[Callable[[], Any], float | None]] = {
    "fgsm_0.1": (foolbox.attacks.FGSM, 0.1),
    "fgsm_0.3": (foolbox.attacks.FGSM, 0.3),
    "pgd_0.1": (lambda: foolbox.attacks.LinfPGD(steps=20, rel_stepsize=0.1), 0.1),
    "pgd_0.3": (lambda: foolbox.attacks.LinfPGD(steps=20, rel_stepsize=0.1), 0.3),
    "cw": (lambda: foolbox.attacks.L2CarliniWagnerAttack(1, 100, stepsize=10.0, initial_const=100), None),
    "cw_small": (lambda: foolbox.attacks.L2CarliniWagnerAttack(1, 100, stepsize=0.01, initial_const=100), None),
    "deepfool": (lambda: foolbox.attacks.L2DeepFoolAttack(candidates=None), None),
}


def attacked(attack: Any, network: nn.Module, images: Tensor, labels: Tensor, epsilon: float | None) -> Tensor:
    """Float images as Foolbox gives them for a network, a batch at a time; those that it has not fooled as they were.

    Its CW gives a black image where it has found nothing, and counts that as found if black is of another class.
    """
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
    parts = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    made = torch.cat([attack(model, some, wanted, epsilons=epsilon)[1] for some, wanted in parts])
    return torch.where(made.flatten(1).any(1).view(-1, 1, 1, 1), made, images)


@torch.no_grad()
def right(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: which images are classified as their label."""
    return torch.cat([network(part).argmax(1) for part in images.split(BATCH)]) == labels


def percent(mask: Tensor) -> float:
    """Share of true ones."""
    return 100 * float(mask.float().mean())


def adaptive(pipeline: nn.Module, images: Tensor, labels: Tensor, settings: dict[str, Any]) -> dict[str, float]:
    """By epsilon, percent of images that PGD has not fooled at it or below it, from any of its random starts."""
    standing = right(pipeline, images, labels)
    found = {}
    steps = int(settings["steps"])
    attack = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=min(1.0, max(0.1, 2.5 / steps)), random_start=True)
    for epsilon in settings["epsilons"]:
        for _ in range(settings["restarts"]):
            left = standing.nonzero().squeeze(1)
            if len(left):
                tried = attacked(attack, pipeline, images[left], labels[left], epsilon)
                standing[left] = right(pipeline, tried, labels[left])
        found[f"{epsilon:g}"] = percent(standing)
    return found


def main() -> int:
    """Attack, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a shipped name, whose card is in docs/cards")
    parser.add_argument("--card", type=Path, help="the card's folder (default: docs/cards/CHECKPOINT)")
    parser.add_argument("--data", type=Path, help="where the data set lies")
    parser.add_argument("--classifiers", help="comma-separated names (default: all of the card)")
    options = parser.parse_args()
    folder = options.card or Path("docs/cards") / options.checkpoint
    card = json.loads((folder / JSON_FILE).read_text())
    effort = card["settings"]["effort"]
    data, cpu = load_dataset(card["dataset"], options.data), torch.device("cpu")
    rest = split_off(data.test, SubstituteSettings(**card["settings"]["substitute"]))[1]
    split, few = rest.first(card["images"]["oblivious"]), rest.first(card["images"]["adaptive"])
    names = options.classifiers.split(",") if options.classifiers else list(card["classifiers"])
    rows: list[dict[str, Any]] = []
    for name in names:
        section, classifier = card["classifiers"][name], pool.shipped(name, data, cpu)
        with Purifier.from_pretrained(options.checkpoint) as purifier:
            if purifier.info()["checkpoint"]["digest"] != card["checkpoint"]:
                raise SystemExit(f"{folder}: expected the card of this checkpoint, got another's; write it again")
            pipeline = purifier.defend(classifier).eval()
        torch.manual_seed(effort["seed"])
        for attack, (make, epsilon) in OBLIVIOUS.items():
            made = to_float(to_uint8(attacked(make(), classifier, to_float(split.images), split.labels, epsilon)))
            for column, network in (("bare", classifier), ("purified", pipeline)):
                ours, theirs = section["oblivious"][attack][column], percent(right(network, made, split.labels))
                rows.append({"classifier": name, "attack": f"{attack}, {column}", "card": ours, "foolbox": theirs})
        theirs_by_epsilon = adaptive(pipeline, to_float(few.images), few.labels, effort)
        after = section["adaptive"]["after"]
        last = f"PGD-{effort['steps']}, start {effort['restarts']}"
        for epsilon, theirs in theirs_by_epsilon.items():
            # The card's other attacks come after PGD, and carry what they have found to the next epsilon.
            ours = after[epsilon][last]
            rows.append({"classifier": name, "attack": f"adaptive PGD, {epsilon}", "card": ours, "foolbox": theirs})
    table = Table(title=f"{options.checkpoint}: accuracy in %")
    for heading in ("classifier", "attack", "card", "foolbox", "difference"):
        table.add_column(heading, justify="left" if heading in ("classifier", "attack") else "right")
    for row in rows:
        row["difference"] = round(row["foolbox"] - row["card"], 2)
        row["agrees"] = abs(row["difference"]) <= AGREEMENT
        table.add_row(
            row["classifier"], row["attack"], f"{row['card']:.2f}", f"{row['foolbox']:.2f}", f"{row['difference']:+.2f}"
        )
    Console().print(table)
    away = [row for row in rows if not row["agrees"]]
    print(f"{len(rows) - len(away)} of {len(rows)} numbers agree within {AGREEMENT:g} point")
    record = {"checkpoint": card["checkpoint"], "foolbox": foolbox.__version__, "machine": describe(), "rows": rows}
    write_json(folder / "foolbox.json", record)
    return 1 if away else 0


if __name__ == "__main__":
    sys.exit(main())
