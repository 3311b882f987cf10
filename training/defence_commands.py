"""Commands that train the other defences: retrain, finetune, magnet, adversarial, defense-gan."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from defense_vae_fast.atomic import replacing
from defense_vae_fast.checkpoint import load_checkpoint
from defense_vae_fast.nn.model import DefenseVAE
from training import pool, recipe
from training.attacks import PAPER_TEST_ATTACKS
from training.baselines import adversarial_training, magnet, wgan
from training.baselines.defense_gan import LATENT_DIM
from training.classifiers import CLASSIFIERS
from training.data import Dataset, load_dataset
from training.defences import Defence, bare, defense_vae, measure
from training.device import find_device, place
from training.finetune import FinetuneSettings, finetune
from training.options import (
    COUNT,
    RUNS,
    data_option,
    device_option,
    noise_option,
    out_option,
    own_option,
    resume_option,
    seed_option,
)
from training.pairs import attack_all, pair_source
from training.retrain import RetrainSettings, retrain

REPORT_FILE = "report.json"
REPORT_IMAGES = 1000

name_option = click.option(
    "--name", type=click.Choice(list(CLASSIFIERS)), default="A", help="Built-in classifier, where none is your own."
)
checkpoint_option = click.option(
    "--checkpoint", help="Purifier to start from: a shipped name or a file. [default: DATASET]"
)
pairs_option = click.option(
    "--preset",
    type=click.Choice(list(recipe.PRESETS)),
    default="quick",
    help="Take the attacked images of this preset of 'fit': which attacks, how many images, the size of a batch.",
)
steps_option = click.option("--steps", type=COUNT, help="Optimizer steps instead of --epochs.")
epochs_option = click.option("--epochs", type=COUNT, default=2, help="Passes over the attacked and clean images.")
rate_option = click.option("--learning-rate", type=float, default=3e-4, help="Adam's, falling to 0.")


@click.command("retrain")
@click.argument("dataset")
@checkpoint_option
@data_option
@name_option
@own_option
@pairs_option
@noise_option
@steps_option
@epochs_option
@rate_option
@seed_option
@out_option
@resume_option
@device_option
def retrain_command(
    dataset: str, checkpoint: str | None, data: Path | None, name: str, own: str | None, preset: str,
    noise: float | None, steps: int | None, epochs: int, learning_rate: float, seed: int, out: Path | None,
    resume: bool, device: str,
) -> None:  # fmt: skip
    """Train a classifier on what a purifier makes of attacked and clean images: the paper's Defense-VAE-REC.

    The classifier starts from its own weights. OUT/classifier.safetensors gets the new ones under their names in the
    classifier's state_dict; OUT/report.json accuracies on validation images.

    \b
    Examples:
      python -m training retrain fashion_mnist --name B
      python -m training retrain path/to/images --checkpoint runs/images-pooled/checkpoint.safetensors \\
          --classifier my_package.my_module:make_classifier
    """
    settings = RetrainSettings(steps or 0, epochs, learning_rate, seed)
    where, loaded, purifier, out, name, attacked, chosen = _prepare(
        "rec", dataset, checkpoint, data, name, own, preset, noise, seed, out, device
    )
    student, finished = retrain(
        loaded, name, attacked, purifier, lambda: pair_source(loaded.train.to(where), {name: attacked}, chosen),
        settings, out, about={"pairs": chosen.to_dict()}, device=where, resume=resume,
    )  # fmt: skip
    before = defense_vae(attacked, purifier)
    _report(out, loaded, [bare(attacked), before, defense_vae(attacked, purifier, student, "retrained")], where)
    _end(finished)


@click.command("finetune")
@click.argument("dataset")
@checkpoint_option
@data_option
@name_option
@own_option
@click.option(
    "--start",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Start the classifier from this file of 'retrain' instead of its own weights, as the paper does.",
)
@click.option("--from-scratch", is_flag=True, help="Start both from random weights.")
@click.option("--lambda", "classifier_weight", type=float, default=5.0, help="Weight of the cross-entropy, equation 5.")
@click.option("--kl-weight", type=float, default=0.0, help="Weight of the KL term.")
@pairs_option
@noise_option
@steps_option
@epochs_option
@rate_option
@seed_option
@out_option
@resume_option
@device_option
def finetune_command(
    dataset: str, checkpoint: str | None, data: Path | None, name: str, own: str | None, start: Path | None,
    from_scratch: bool, classifier_weight: float, kl_weight: float, preset: str, noise: float | None,
    steps: int | None, epochs: int, learning_rate: float, seed: int, out: Path | None, resume: bool, device: str,
) -> None:  # fmt: skip
    """Train a purifier and a classifier together: the paper's Defense-VAE-E2E.

    OUT gets checkpoint.safetensors for the purifier, classifier.safetensors with the classifier's weights under their
    names in its state_dict, log.jsonl with validation accuracies on the way and report.json with those at the end.

    \b
    Examples:
      python -m training finetune fashion_mnist --name B --lambda 1
      python -m training finetune path/to/images --checkpoint runs/images-pooled/checkpoint.safetensors \\
          --classifier my_package.my_module:make_classifier --start runs/images-rec/classifier.safetensors
    """
    from training.train_classifier import load_weights

    if start is not None and from_scratch:
        raise ValueError("finetune: expected --start or --from-scratch, got both; name one")
    settings = FinetuneSettings(steps or 0, epochs, learning_rate, classifier_weight, kl_weight, from_scratch, seed)
    where, loaded, purifier, out, name, attacked, chosen = _prepare(
        "e2e", dataset, checkpoint, data, name, own, preset, noise, seed, out, device
    )
    classifier = attacked if start is None else load_weights(start, attacked, where)
    pair = finetune(
        loaded, name, attacked, purifier, classifier,
        lambda: pair_source(loaded.train.to(where), {name: attacked}, chosen), settings, out,
        about={"pairs": chosen.to_dict()}, device=where, resume=resume, report_every=200,
    )  # fmt: skip
    after = defense_vae(attacked, pair.purifier, pair.classifier, "end to end")
    _report(out, loaded, [bare(attacked), defense_vae(attacked, purifier), after], where)
    _end(pair.finished)


@click.command("magnet")
@click.argument("dataset")
@data_option
@name_option
@own_option
@click.option("--epochs", type=COUNT, default=100, help="Passes over the training images (100 in the paper).")
@click.option(
    "--drop-rate", type=float, help="Share of clean images that a detector may reject. [default: the paper's]"
)
@seed_option
@out_option
@resume_option
@device_option
def magnet_command(
    dataset: str, data: Path | None, name: str, own: str | None, epochs: int, drop_rate: float | None, seed: int,
    out: Path | None, resume: bool, device: str,
) -> None:  # fmt: skip
    """Train MagNet's autoencoders on clean images, and set its detectors' thresholds on validation images."""
    where, loaded = find_device(device), load_dataset(dataset, data)
    out = out or RUNS / f"{loaded.name}-magnet"
    attacked, name = _attacked(loaded, name, own, out, where)
    settings = magnet.MagNetSettings(epochs=epochs, seed=seed)
    networks = magnet.train_magnet(loaded, settings, out, device=where, resume=resume)
    defence = magnet.magnet(attacked, networks, loaded.validation.to(where), drop_rate)
    _report(out, loaded, [bare(attacked), defence], where)
    _end(networks.finished)


@click.command("adversarial")
@click.argument("dataset")
@data_option
@name_option
@own_option
@click.option(
    "--attack", type=click.Choice(adversarial_training.ATTACKS), default="fgsm", help="Of the training images."
)
@click.option("--epsilon", type=float, default=0.3, help="L-infinity bound of it.")
@click.option("--epochs", type=COUNT, default=10, help="Passes over the training images.")
@seed_option
@out_option
@resume_option
@device_option
def adversarial_command(
    dataset: str, data: Path | None, name: str, own: str | None, attack: str, epsilon: float, epochs: int, seed: int,
    out: Path | None, resume: bool, device: str,
) -> None:  # fmt: skip
    """Train a classifier on clean images and on images attacked as it learns; your own goes on from its weights."""
    where, loaded = find_device(device), load_dataset(dataset, data)
    out = out or RUNS / f"{loaded.name}-adversarial"
    model = pool.own(own, loaded, where) if own else None
    settings = adversarial_training.AdversarialSettings(attack, epsilon, epochs, seed=seed)
    network, finished = adversarial_training.train_adversarially(
        loaded, own or name, settings, out, model=model, device=where, resume=resume
    )
    _report(out, loaded, [bare(network, "adversarially trained")], where)
    _end(finished)


@click.command("defense-gan")
@click.argument("dataset")
@data_option
@name_option
@own_option
@click.option("--steps", type=COUNT, default=200_000, help="Generator steps (200,000 in the paper's code).")
@click.option("--latent-dim", type=COUNT, default=LATENT_DIM, help="Size of the generator's latent.")
@click.option("--search-steps", type=COUNT, default=200, help="L of the search in the report.")
@click.option("--restarts", type=COUNT, default=10, help="R of the search in the report.")
@click.option("--report-images", type=COUNT, default=100, help="Validation images in the report: the search is slow.")
@seed_option
@out_option
@resume_option
@device_option
def defense_gan_command(
    dataset: str, data: Path | None, name: str, own: str | None, steps: int, latent_dim: int, search_steps: int,
    restarts: int, report_images: int, seed: int, out: Path | None, resume: bool, device: str,
) -> None:  # fmt: skip
    """Train Defense-GAN's generator (WGAN-GP) on clean images, and try its search on a few validation images."""
    where, loaded = find_device(device), load_dataset(dataset, data)
    out = out or RUNS / f"{loaded.name}-defense-gan"
    attacked, name = _attacked(loaded, name, own, out, where)
    settings = wgan.GanSettings(steps, latent_dim=latent_dim, seed=seed)
    generator, finished = wgan.train_generator(loaded, settings, out, device=where, resume=resume)
    defence = wgan.defense_gan(attacked, generator, steps=search_steps, restarts=restarts, seed=seed)
    _report(out, loaded, [bare(attacked), defence], where, report_images)
    _end(finished)


COMMANDS = (retrain_command, finetune_command, magnet_command, adversarial_command, defense_gan_command)


def _prepare(
    kind: str, dataset: str, checkpoint: str | None, data: Path | None, name: str, own: str | None, preset: str,
    noise: float | None, seed: int, out: Path | None, device: str,
) -> tuple[torch.device, Dataset, DefenseVAE, Path, str, nn.Module, recipe.Recipe]:  # fmt: skip
    """What 'retrain' and 'finetune' start from."""
    where = find_device(device)
    loaded = load_dataset(dataset, data)
    try:
        bundle = load_checkpoint(checkpoint or dataset)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name your own with --checkpoint") from error
    if bundle.config.image_shape != tuple(loaded.train.images.shape[1:]):
        raise ValueError(
            f"{kind}: expected images of the purifier's shape {bundle.config.image_shape}, "
            f"got {tuple(loaded.train.images.shape[1:])} in {loaded.name}"
        )
    out = out or RUNS / f"{loaded.name}-{kind}"
    attacked, name = _attacked(loaded, name, own, out, where)
    purifier = place(DefenseVAE.from_checkpoint(bundle), where)
    pairs = recipe.preset(preset, classifiers=(name,), noise=noise, seed=seed)
    return where, loaded, purifier, out, name, attacked, pairs


def _attacked(
    loaded: Dataset, name: str, own: str | None, out: Path, where: torch.device
) -> tuple[nn.Module, str]:  # fmt: skip
    if own:
        return pool.own(own, loaded, where), own
    return pool.for_run(name, loaded, out, 10, where), name


def _report(
    out: Path, loaded: Dataset, defences: list[Defence], where: torch.device, images: int = REPORT_IMAGES
) -> None:  # fmt: skip
    """Print accuracies on validation images under the paper's oblivious attacks, and keep them in ``report.json``."""
    split = loaded.validation.first(images).to(where)
    table = Table(title=f"{loaded.name}, {len(split)} validation images: accuracy in %, oblivious attacks")
    for column in ("defence", "images", "accuracy", "rejected", "right or rejected"):
        table.add_column(column)
    rows: list[Mapping[str, Any]] = []
    attacked_classifier, made = defences[0].attacked, {"clean": split.images}
    for name, attack in PAPER_TEST_ATTACKS.items():
        made[name] = attack_all(attack, attacked_classifier, split, title=f"{name} on the classifier")
    for defence in defences:
        assert defence.attacked is attacked_classifier
        for name, attacked in made.items():
            score = measure(defence, attacked, split.labels, title=f"{defence.name}, {name}")
            rows.append({"defence": defence.name, "attack": name, "images": len(split), **score._asdict()})
            table.add_row(defence.name, name, *(f"{value:.2f}" for value in score))
    Console().print(table)
    with replacing(out / REPORT_FILE) as file:
        file.write(json.dumps({"split": "validation", "rows": rows}, indent=1).encode() + b"\n")
    click.echo(f"{out}: weights and {REPORT_FILE}")


def _end(finished: bool) -> None:
    if not finished:
        click.echo("stopped early; what was written is usable as it is, and --resume goes on", err=True)
        sys.exit(130)
