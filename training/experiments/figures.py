"""The paper's Figures 1, 4 and 5, from what the tables' runs have left."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from defense_vae_fast.atomic import replacing
from training.attacks import FGSM
from training.baselines.defense_gan import reconstruct
from training.data import Split, to_float, to_uint8
from training.evaluate import purify_all
from training.experiments.lab import Lab, NotAvailable
from training.fit import LOG_FILE
from training.pairs import attack_all

FIGURES = ("1", "4", "5")
_COLUMNS = 8
_ZOOM = 2


def figure_1(lab: Lab, path: Path) -> list[str]:
    """Clean images, attacked by FGSM with epsilon 0.05 and 0.1, and both purified: a block of rows a data set.

    Returns:
        The data sets that are in it; the others' images are not here.

    Raises:
        NotAvailable: none is here.
    """
    rows: list[Tensor] = []
    shown = []
    for dataset in ("mnist", "fashion_mnist", "cifar10_jpeg", "celeba"):
        try:
            made = lab.defence(dataset, "A", "defense_vae")
        except NotAvailable:
            continue
        attacked = made.defence.attacked
        split = lab.dataset(dataset).test.first(_COLUMNS).to(lab.device)
        vae = lab.purifier(dataset, "A")
        rows.append(split.images)
        for epsilon in (0.05, 0.1):
            images = attack_all(FGSM(epsilon), attacked, split)
            rows += [images, purify_all(vae, images)]
        shown.append(dataset)
    if not shown:
        raise NotAvailable("figure 1: expected the images of at least one data set, found none; name them with --data")
    save_grid(rows, path)
    return shown


def figure_5(lab: Lab, path: Path) -> list[str]:
    """Black-box FGSM on Fashion-MNIST: original, attacked, by Defense-GAN, by Defense-VAE."""
    dataset, classifier, substitute = "fashion_mnist", "A", "E"
    made = lab.defence(dataset, classifier, "defense_vae")
    attacked = lab.images(dataset, made.defence, "fgsm", substitute, _COLUMNS).images
    first = lab.scale.substitute.images
    test = lab.dataset(dataset).test
    original = Split(test.images[first:], test.labels[first:]).first(_COLUMNS).to(lab.device).images
    generator = lab.generator(dataset)
    steps, restarts = lab.scale.search
    found = reconstruct(
        generator, to_float(attacked), steps, restarts, latent_dim=generator.latent_dim, seed=lab.seed
    ).images  # fmt: skip
    save_grid([original, attacked, to_uint8(found), purify_all(lab.purifier(dataset, classifier), attacked)], path)
    return [dataset]


def figure_4(lab: Lab, path: Path) -> list[str]:
    """The learning curve of end-to-end fine-tuning: accuracy on 500 validation images under FGSM 0.3, and clean."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise RuntimeError("figure 4 needs matplotlib; install it with: pip install '.[bench]'") from error
    dataset, classifier = "fashion_mnist", "A"
    lab.defence(dataset, classifier, "defense_vae_e2e")
    lines = read_curve(lab.folder(dataset, f"{classifier}-three", "defense_vae_e2e") / LOG_FILE)
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key, label in (("fgsm_0.3", "FGSM, epsilon 0.3"), ("clean", "clean")):
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=label)
    axes.set(
        xlabel="step of fine-tuning", ylabel="validation accuracy in %", title="Defense-VAE-E2E, F-MNIST, classifier A"
    )
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return [dataset]


def read_curve(path: Path) -> list[dict[str, float]]:
    """The lines of a fine-tuning's log in the order of their steps; of a step that was made twice, the later one."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def save_grid(rows: list[Tensor], path: Path) -> None:
    """Write uint8 (N, C, H, W) images, one batch a row, as a PNG; rows may differ in size and channels."""
    strips = []
    for row in rows:
        image = row.cpu().expand(-1, 3, -1, -1)
        strips.append(torch.cat([*image], 2).repeat_interleave(_ZOOM, 1).repeat_interleave(_ZOOM, 2))
    width = max(strip.shape[2] for strip in strips)
    padded = [torch.nn.functional.pad(strip, (0, width - strip.shape[2], 0, 2), value=255) for strip in strips]
    page = torch.cat(padded, 1).permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        Image.fromarray(page).save(file, "PNG")
