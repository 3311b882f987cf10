"""Measure one cell of a table and say everything about how."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.machine import describe
from defense_vae_fast.checkpoint import load_checkpoint
from defense_vae_fast.nn.model import DefenseVAE
from training.baselines.defense_gan import Generator, reconstruct
from training.data import to_float
from training.defences import measure
from training.device import place
from training.evaluate import purify_all
from training.experiments.cells import TRAINED_ON_ATTACKS, Cell
from training.experiments.lab import Lab
from training.paper import paper_value

AWAY_FROM_PREDICTION = "away_from_prediction"
SUBSTITUTE_AS_PRINTED = "substitute_as_printed"
TIMED_IMAGES = 1000  # of the fast methods: the paper's number


def run_cell(lab: Lab, cell: Cell) -> dict[str, Any]:
    """A cell's record.

    Returns:
        ``value`` (percent, or seconds for 1,000 images in Table 4), ``paper``, ``images``, ``wall_seconds`` of the
        measurement, attack included where it was not made before, ``training_seconds`` of everything trained for it,
        ``digests`` of the weights, ``settings``, ``machine``, ``scale``, ``seed``, and the ``command`` that does it
        again; for FGSM on the classifier itself ``away_from_prediction`` too: the accuracy where the attack runs away
        from the prediction; through a substitute ``substitute_as_printed``, the accuracy where that was trained so.

    Raises:
        NotAvailable: the data are missing, or there is no such defence for this data set.
        Stopped: Ctrl-C came during a training.
    """
    common = {
        "scale": lab.scale.name, "seed": lab.seed, "device": _device(lab.device),
        "command": cell.command(lab.scale.name, lab.seed), "machine": describe(),
    }  # fmt: skip
    return {**common, **(_seconds(lab, cell) if cell.table == "4" else _accuracy(lab, cell))}


def prepare(lab: Lab, cell: Cell) -> None:
    """Make the classifier that a cell attacks, and the attacked images that its column shares with others.

    Raises:
        NotAvailable: the data are missing.
    """
    made = lab.defence(cell.dataset, cell.classifier, "no_defense")
    lab.images(cell.dataset, made.defence, cell.attack, cell.substitute, lab.scale.test_images)
    if cell.substitute:
        lab.images(
            cell.dataset, made.defence, cell.attack, cell.substitute, lab.scale.test_images, as_printed=True
        )  # fmt: skip


def paper_cell(cell: Cell) -> float | None:
    """The paper's number, None where it has none."""
    if cell.table == "4":
        steps, _, starts = cell.search.partition("x")
        row = {"method": cell.column, "L": int(steps or 0), "R": int(starts or 0)}
        return paper_value("4", "seconds", **row)
    return paper_value(
        cell.table, cell.column, dataset=cell.dataset, attack=cell.attack, classifier=cell.classifier,
        substitute=cell.substitute,
    )  # fmt: skip


def _accuracy(lab: Lab, cell: Cell) -> dict[str, Any]:
    # The paper's "trained on 3" are the numbers of Defense-VAE-REC in its Table 1, so all of Table 2 is REC.
    column = "defense_vae_rec" if cell.table == "2" else cell.column
    made = lab.defence(cell.dataset, cell.classifier, column, cell.training)
    start = time.monotonic()
    count = lab.scale.search_images if column == "defense_gan" else lab.scale.test_images
    attack = "clean" if column == "no_attack" else cell.attack
    substitute = "" if column == "no_attack" else cell.substitute
    split = lab.images(cell.dataset, made.defence, attack, substitute, count)
    title = f"{cell.column} {' '.join(filter(None, cell.row))}"
    score = measure(made.defence, split.images, split.labels, title=title)
    beside: dict[str, float] = {}
    if attack == "fgsm" and not substitute and cell.column in TRAINED_ON_ATTACKS:
        # One step away from the true label carries that label in its sign pattern, which a defence can learn to read.
        other = lab.images(cell.dataset, made.defence, attack, "", count, predicted=True)
        found = measure(made.defence, other.images, other.labels, title=f"{title}, away from the prediction")
        beside = {AWAY_FROM_PREDICTION: found.accuracy}
    if substitute:
        other = lab.images(cell.dataset, made.defence, attack, substitute, count, as_printed=True)
        found = measure(made.defence, other.images, other.labels, title=f"{title}, substitute as printed")
        beside = {SUBSTITUTE_AS_PRINTED: found.accuracy}
    return {
        **beside,
        "value": score.accuracy, "unit": "percent", "rejected": score.rejected, "right_or_rejected": score.handled,
        "images": len(split), "paper": paper_cell(cell), "wall_seconds": round(time.monotonic() - start, 2),
        "training_seconds": made.training_seconds, "digests": made.digests, "settings": made.settings,
    }  # fmt: skip


def _seconds(lab: Lab, cell: Cell) -> dict[str, Any]:
    test = lab.dataset(cell.dataset).test.to(lab.device)
    start = time.monotonic()
    digests: dict[str, str] = {}
    if cell.column == "defense_gan":
        images = test.first(lab.scale.timed_images).images
        steps, _, starts = cell.search.partition("x")
        # Time does not depend on the weights.
        generator = place(Generator(seed=0), lab.device).eval().requires_grad_(False)
        reconstruct(generator, to_float(images), 2, int(starts))
        times = [_timed(lambda: reconstruct(generator, to_float(images), int(steps), int(starts)), lab.device)]
    else:
        images = test.first(TIMED_IMAGES).images
        bundle = load_checkpoint(cell.dataset)
        digests = {"checkpoint": bundle.digest}
        if cell.column == "defense_vae":
            model = place(DefenseVAE.from_checkpoint(bundle), lab.device)
            purify: Callable[[], object] = lambda: purify_all(model, images)  # noqa: E731
        else:
            purify = _shipped_purifier(cell.dataset, images)
        purify()
        times = [_timed(purify, lab.device) for _ in range(5)]
    return {
        "value": round(statistics.median(times) * 1000 / len(images), 4), "unit": "seconds for 1,000 images",
        "images": len(images), "times": [round(value, 5) for value in times], "paper": paper_cell(cell),
        "wall_seconds": round(time.monotonic() - start, 2), "training_seconds": 0.0, "digests": digests, "settings": {},
    }  # fmt: skip


def _shipped_purifier(name: str, images: torch.Tensor) -> Callable[[], object]:
    from defense_vae_fast import Purifier

    purifier = Purifier.from_pretrained(name)
    arrays = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return lambda: purifier(arrays)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {torch.get_num_threads()} threads"
