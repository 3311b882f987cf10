"""Int8 scales for a purifier: calibrated on training images, judged on validation images, kept in the checkpoint.

ONNX Runtime's calibrator collects the histograms of every layer's input in the float32 graph. What is stored is one
number a layer; weights have a scale for each output channel, which follows from the weights themselves. The graphs come
from :mod:`defense_vae_fast.onnx_graph`, so a user of the result needs no quantization library.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from defense_vae_fast import Purifier, onnx_graph
from defense_vae_fast.checkpoint import Checkpoint, Quantization
from defense_vae_fast.engines import EngineUnavailable
from defense_vae_fast.nn.model import DefenseVAE
from training import evaluate as measure
from training.attacks import FGSM, PAPER_TEST_ATTACKS, PGD, Attack, CarliniWagnerL2, RandFGSM, predict
from training.data import Dataset, Split, to_float
from training.device import place
from training.pairs import attack_all

PERCENTILES = (99.9, 99.99, 99.999, 99.9999)
"""Shares of a layer's input values, in percent, that are tried as its range; the rest is clipped."""
MOST_LEFT_OUT = 3
"""So many of the most sensitive layers are left in higher precision at the most."""
CLEAN_IMAGES = 512
ATTACKED_IMAGES = 32
"""For each classifier and attack."""
BATCH = 64
# What a purifier meets: one step and several, small and large; CW settles within four iterations at this rate.
CALIBRATION_ATTACKS: tuple[Attack, ...] = (
    FGSM(0.3),
    RandFGSM(0.3, 0.05),
    PGD(0.1, steps=5, relative_step=0.3),
    CarliniWagnerL2(10.0, iterations=4, abort_early=False),
)


@dataclass(frozen=True)
class Sensitivity:
    """What one layer in integers, and all others in float32, does to purified images.

    ``squared_change`` is the mean squared difference to float32 in grey levels, ``decisions_changed`` the share of the
    classifiers' decisions in percent.
    """

    layer: str
    squared_change: float
    decisions_changed: float


def mixed_images(split: Split, classifiers: Mapping[str, nn.Module], seed: int = 0) -> Tensor:
    """uint8 (N, C, H, W): clean images, and others attacked on each classifier in each of the ways above."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator).to(split.images.device)
    rows = [split.images[order[:CLEAN_IMAGES]]]
    start = CLEAN_IMAGES
    for classifier in classifiers.values():
        for attack in CALIBRATION_ATTACKS:
            part = split.take(order[start : start + ATTACKED_IMAGES])
            start = (start + ATTACKED_IMAGES) % max(1, len(split) - ATTACKED_IMAGES)
            rows.append(attack_all(attack, classifier, part, seed=seed))
    return torch.cat(rows)


def calibrate(
    checkpoint: Checkpoint, images: npt.NDArray[np.uint8], percentiles: Sequence[float]
) -> dict[float, dict[str, float]]:
    """Range of every layer's input.

    Args:
        checkpoint: the purifier.
        images: uint8 (N, C, H, W).
        percentiles: how much of the values the range shall hold, in percent.

    Returns:
        percentile -> layer name -> largest magnitude.
    """
    from onnxruntime.quantization.calibrate import PercentileCalibrater

    model = onnx_graph.build(checkpoint, "fp32", "float")
    kinds = ["Conv", "ConvTranspose", "Gemm"]
    inputs = {
        node.input[1].removesuffix(".weight"): node.input[0] for node in model.graph.node if node.op_type in kinds
    }
    first = checkpoint.config.encoder[0].name
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        calibrator = PercentileCalibrater(path, kinds, str(path.with_name("augmented.onnx")), symmetric=True)
        calibrator.augment_graph()
        calibrator.create_inference_session()
        for start in range(0, len(images), BATCH):  # it keeps what it has not yet counted, 1 MB an image
            calibrator.collect_data(_Reader(images[start : start + BATCH]))
        found = {}
        for percentile in percentiles:
            calibrator.collector.percentile = percentile
            ranges = calibrator.compute_data()
            found[percentile] = {
                # The image's own levels are its integers: nothing is rounded there.
                layer: 1.0 if layer == first else float(ranges[tensor].range_value[1])
                for layer, tensor in inputs.items()
            }
    return found


class _Reader:
    """One batch, as the calibrator asks for it."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self._batches: Iterator[dict[str, Any]] = iter([{onnx_graph.INPUT: images.astype(np.float32) / 255}])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._batches

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def quantize(
    checkpoint: Checkpoint,
    data: Dataset,
    classifiers: Mapping[str, nn.Module],
    *,
    images: int = 2000,
    limit: float = 0.3,
    seed: int = 0,
    device: torch.device | None = None,
    console: Console | None = None,
) -> Checkpoint:
    """The same purifier with int8 scales.

    1. Ranges: the percentile with the smallest change of the calibration images, all layers in integers.
    2. Sensitivity: each layer alone in integers, on validation images.
    3. Layers: all, or all but the most sensitive one, two or three: the first choice with which no classifier loses
       more than ``limit`` points on clean images or under any of the paper's attacks.

    Args:
        checkpoint: the purifier.
        data: its data set; calibrated on training images, measured on validation images.
        classifiers: attacked, and measured with.
        images: validation images of the accuracies.
        limit: points that no cell may lose against fp32.
        seed: chooses the calibration images.
        device: where attacks are made.
        console: where tables are printed.

    Raises:
        ValueError: no choice of layers keeps every cell within ``limit``.
    """
    device = device or torch.device("cpu")
    console = console or Console(quiet=True)
    calibration = mixed_images(data.train.to(device), classifiers, seed).cpu()
    ranges = calibrate(checkpoint, calibration.numpy(), PERCENTILES)
    with Purifier(checkpoint, engine="openvino", precision="fp32") as exact:
        reference = measure.purify_with(exact, calibration)
        tried = {p: _squared_change(checkpoint, amax, calibration, reference) for p, amax in ranges.items()}
        by_percentile = {p: change for p, change in tried.items() if change is not None}
        if not by_percentile:
            raise ValueError("quantize: every range was refused by the engine; train the purifier for longer")
        percentile = min(by_percentile, key=by_percentile.__getitem__)
        amax = ranges[percentile]
        judged = mixed_images(data.validation.to(device), classifiers, seed).cpu()
        sensitivities = _sensitivities(
            checkpoint, amax, judged, measure.purify_with(exact, judged), classifiers, device
        )
    console.print(_table(sensitivities, by_percentile))

    # The most sensitive first: what is left out first. The first layer's integers are the image's own: it stays.
    order = [s.layer for s in sorted(sensitivities, key=lambda s: -s.squared_change)]
    choices = [{name: v for name, v in amax.items() if name not in order[:n]} for n in range(MOST_LEFT_OUT + 1)]
    purifiers = {
        f"int8 without {', '.join(order[:n])}" if n else "int8": _int8(checkpoint, choice)
        for n, choice in enumerate(choices)
    }
    cells = measure.evaluate(
        place(DefenseVAE.from_checkpoint(checkpoint), device),
        classifiers,
        data.validation.first(images).to(device),
        PAPER_TEST_ATTACKS,
        engines=purifiers,
    )
    for purifier in purifiers.values():
        purifier.close()
    console.print(measure.render(cells, f"{data.name}, {cells[0].images} validation images"))
    worst = {name: min(round(cell.engines[name] - cell.purified, 2) for cell in cells) for name in purifiers}
    console.print(f"worst cell against fp32: {worst}")
    kept = first_within(worst, limit)
    recipe = {
        "calibrator": "onnxruntime PercentileCalibrater",
        "calibration_images": len(calibration),
        "attacks": ["none", *map(repr, CALIBRATION_ATTACKS)],
        "classifiers": list(classifiers),
        "seed": seed,
        "percentile": percentile,
        "squared_change_by_percentile": {str(p): round(v, 3) for p, v in by_percentile.items()},
        "sensitivity": {s.layer: [s.squared_change, s.decisions_changed] for s in sensitivities},
        "versions": {name: version(name) for name in ("onnxruntime", "openvino")},
    }
    accuracies = {
        "split": "validation",
        "images": cells[0].images,
        "columns": ["bare", "fp32", "int8"],
        "worst": worst[kept],
        "cells": measure.for_header([replace(cell, engines={kept: cell.engines[kept]}) for cell in cells]),
    }
    chosen = choices[list(purifiers).index(kept)]
    return replace(checkpoint, quantization=Quantization(chosen, recipe, accuracies))


def first_within(worst: Mapping[str, float], limit: float) -> str:
    """The first choice whose worst cell loses at most ``limit`` points.

    Raises:
        ValueError: there is none.
    """
    for name, difference in worst.items():
        if difference >= -limit:
            return name
    raise ValueError(
        f"quantize: expected every cell within {limit} points of fp32, got {dict(worst)}; "
        "measure on more images (--images), or allow more (--limit)"
    )


def _int8(checkpoint: Checkpoint, amax: Mapping[str, float]) -> Purifier:
    return Purifier(replace(checkpoint, quantization=Quantization(amax)), engine="openvino", precision="int8")


def _squared_change(
    checkpoint: Checkpoint, amax: Mapping[str, float], images: Tensor, reference: Tensor
) -> float | None:
    """Mean squared change of purified images; None where so much is clipped that the engine takes it for a fault."""
    try:
        return _squared(_purified(checkpoint, amax, images), reference)
    except EngineUnavailable:
        return None


def _purified(checkpoint: Checkpoint, amax: Mapping[str, float], images: Tensor) -> Tensor:
    with _int8(checkpoint, amax) as purifier:
        return measure.purify_with(purifier, images)


def _squared(images: Tensor, reference: Tensor) -> float:
    return float((images.float() - reference.float()).square().mean())


def _sensitivities(
    checkpoint: Checkpoint,
    amax: Mapping[str, float],
    images: Tensor,
    reference: Tensor,
    classifiers: Mapping[str, nn.Module],
    device: torch.device,
) -> list[Sensitivity]:
    def decisions(purified: Tensor) -> Tensor:
        parts = torch.split(purified.to(device), 250)
        return torch.stack([torch.cat([predict(c, to_float(p)) for p in parts]) for c in classifiers.values()])

    before = decisions(reference)
    found = []
    for layer, value in amax.items():
        purified = _purified(checkpoint, {layer: value}, images)
        changed = float((decisions(purified) != before).float().mean())
        found.append(Sensitivity(layer, round(_squared(purified, reference), 4), round(100 * changed, 3)))
    return found


def _table(sensitivities: Sequence[Sensitivity], by_percentile: Mapping[float, float]) -> Table:
    chosen = ", ".join(f"{percentile} %: {value:.3f}" for percentile, value in by_percentile.items())
    table = Table(title="One layer in int8, the others in fp32", caption=f"all layers, by calibrated range: {chosen}")
    for column in ("layer", "squared change", "decisions changed, %"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for each in sensitivities:
        table.add_row(each.layer, f"{each.squared_change:.4f}", f"{each.decisions_changed:.3f}")
    return table
