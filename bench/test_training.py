"""Training on a GPU: the whole step in its forms, a run at the paper's scale, and what fused kernels do to accuracy."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from bench.conftest import Measure, Record

BATCHES = (16, 64, 256, 1024)
FORMS = ("torch", "compiled", "triton")
SEEDS = (0, 1, 2)
cuda = pytest.mark.parametrize("device", ["cuda"], indirect=True)
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("graph", [False, True], ids=["calls", "graph"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("batch", BATCHES)
@cuda
def test_step(
    device: str, batch: int, amp: str, form: str, graph: bool, quick: bool, measure: Measure, record: Record
) -> None:
    from bench import training

    assert training.FORMS == FORMS
    options = {"amp": amp, "device": device, "rounds": 3 if quick else 10, "steps": 20 if quick else 200}
    found = measure(
        f"step, batch {batch}, {amp}", training.measure,
        args=(form, batch), kwargs={**options, "graph": graph}, rounds=1,
    )  # fmt: skip
    plain = training.measure("torch", batch, graph=False, **{**options, "rounds": 1, "steps": 1})
    # The latent's noise differs between the forms; over a batch its part in the loss is small.
    assert found.losses == pytest.approx(plain.losses, rel=0.03)
    record(
        "step", f"{form} {amp}", batch, seconds=found.seconds,
        form=form, precision=amp, graph=graph, device=device, losses=found.losses,
    )  # fmt: skip


@cuda
def test_paper_scale(device: str, quick: bool, measure: Measure, record: Record) -> None:
    """A projection: each attack on some images and some steps, times what the preset "paper" needs."""
    import numpy as np
    import torch

    from bench import training
    from defense_vae_fast.checkpoint import WEIGHTS_FOLDER
    from training.pool import CLASSIFIER_FOLDER
    from training.train_classifier import load_classifier

    with np.load(WEIGHTS_FOLDER / "fashion_mnist_demo.npz") as data:
        images, labels = torch.from_numpy(data["clean"]).unsqueeze(1), torch.from_numpy(data["labels"].astype(np.int64))
    classifier = load_classifier(CLASSIFIER_FOLDER / "fashion_mnist_A.safetensors")[0].to(device)
    found = measure(
        "paper's scale", training.paper_scale, args=(images, labels, classifier),
        kwargs={"device": device, "attacked": 500 if quick else 10_000, "steps": 100 if quick else 5_000}, rounds=1,
    )  # fmt: skip
    assert 0 < found["total_seconds"] < math.inf
    record("paper", "preset paper, one classifier, projected", seconds=[found["total_seconds"]], device=device, **found)


@cuda
def test_fused_and_plain_training_reach_the_same_accuracy(
    device: str, quick: bool, measure: Measure, record: Record, tmp_path: Path
) -> None:
    from bench import training
    from training.data import load_dataset
    from training.recipe import preset

    folder = os.environ.get("DEFENSE_VAE_DATA")
    if folder is None:
        pytest.skip("DEFENSE_VAE_DATA is not set; name the folder with Fashion-MNIST's files")
    data, seeds = load_dataset("fashion_mnist", Path(folder)), SEEDS[:2] if quick else SEEDS
    found = measure("accuracy", training.accuracies, args=(data, preset("quick"), seeds, device, tmp_path), rounds=1)
    plain, fused = ([sum(run.values()) / len(run) for run in found[form]] for form in ("torch", "triton"))
    spread = max(max(plain) - min(plain), max(fused) - min(fused))
    record("paper", "accuracy of fused and plain training", device=device, spread=spread, **found)
    assert abs(sum(fused) / len(fused) - sum(plain) / len(plain)) <= spread
