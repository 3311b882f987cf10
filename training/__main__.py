"""``python -m training``: train a purifier and measure it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import nn

from defense_vae_fast.atomic import replacing
from defense_vae_fast.checkpoint import WEIGHTS_FOLDER, load_checkpoint, save_checkpoint
from defense_vae_fast.nn.model import DefenseVAE
from training import classifiers, recipe
from training.attacks import PAPER_TEST_ATTACKS, Attack
from training.data import Dataset, load_dataset
from training.device import find_device, place
from training.train_classifier import accuracy, fit_classifier, load_classifier, save_classifier

CLASSIFIER_FOLDER = Path(__file__).parent / "weights"
RUNS = Path("runs")


class Failure(click.ClickException):
    """One line on stderr and exit code 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def cli() -> None:
    """Train a Defense-VAE purifier, and measure what it is worth."""


data_option = click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Folder of the IDX files. [env: DEFENSE_VAE_DATA]"
)
device_option = click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto.")


@cli.command()
@click.argument("dataset")
@click.option("--preset", type=click.Choice(list(recipe.PRESETS)), default="quick", help="The recipe to start from.")
@data_option
@click.option(
    "--classifier",
    "own",
    metavar="MODULE:FUNCTION",
    help="Your own torch classifier: a function without arguments that returns it.",
)
@click.option(
    "--classifiers", "names", help="Comma-separated names of built-in classifiers to attack instead of the preset's."
)
@click.option("--classifier-epochs", default=10, help="Epochs for built-in classifiers that have to be trained first.")
@click.option("--steps", type=int, help="Optimizer steps instead of the preset's length.")
@click.option("--kl-weight", type=float, help="Weight of the KL term: 1 in the paper's text, 0 in its released code.")
@click.option("--latent-dim", type=int, help="Size of the latent.")
@click.option("--seed", type=int, help="Seed of everything random.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the run. [default: runs/DATASET-PRESET]"
)
@click.option("--resume", is_flag=True, help="Go on from the folder's last state.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events into the run's folder.")
@device_option
def fit(
    dataset: str, preset: str, data: Path | None, own: str | None, names: str | None, classifier_epochs: int,
    steps: int | None, kl_weight: float | None, latent_dim: int | None, seed: int | None, out: Path | None,
    resume: bool, tensorboard: bool, device: str,
) -> None:  # fmt: skip
    """Train a purifier for DATASET: fashion_mnist, mnist, or a folder of images, one sub-folder a class.

    \b
    Examples:
      python -m training fit fashion_mnist --preset quick
      python -m training fit fashion_mnist --preset paper --kl-weight 1
      python -m training fit path/to/images --classifier my_package.my_module:make_classifier
    """
    from training.fit import fit as run

    where = find_device(device)
    images = load_dataset(dataset, data)
    pool_names = tuple(names.split(",")) if names else None
    if own:
        pool_names = (own,)
    chosen = recipe.preset(
        preset, steps=steps, epochs=0 if steps else None, kl_weight=kl_weight, latent_dim=latent_dim, seed=seed,
        classifiers=pool_names,
    )  # fmt: skip
    out = out or RUNS / f"{images.name}-{preset}"
    pool: dict[str, nn.Module] = {}
    for name in chosen.classifiers:
        pool[name] = (
            _own_classifier(name, images, where) if own else _built_in(name, images, out, classifier_epochs, where)
        )
    result = run(images, pool, chosen, out, device=where, resume=resume, tensorboard=tensorboard)
    click.echo(f"{result.checkpoint} (step {result.step} of {result.steps})")
    if not result.finished:
        click.echo("stopped early; the checkpoint is usable as it is, and --resume goes on", err=True)
        sys.exit(130)


@cli.command()
@click.argument("dataset")
@click.option("--checkpoint", help="Purifier to measure: a shipped name or a file. [default: DATASET]")
@data_option
@click.option(
    "--split", type=click.Choice(["test", "validation"]), default="test", help="Choose on validation, report on test."
)
@click.option("--images", type=int, help="Only the first so many images.")
@click.option("--classifiers", "names", default=",".join(classifiers.PAPER_CLASSIFIERS), help="Comma-separated names.")
@click.option(
    "--predicted-labels", is_flag=True, help="Attack away from the classifier's own predictions: no label leaks."
)
@click.option("--held-out", is_flag=True, help="Measure the held-out residual network too, with more attacks.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every cell here.")
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the checkpoint with these accuracies in its header.",
)
@device_option
def evaluate(
    dataset: str, checkpoint: str | None, data: Path | None, split: str, images: int | None, names: str,
    predicted_labels: bool, held_out: bool, json_path: Path | None, save: Path | None, device: str,
) -> None:  # fmt: skip
    """Print the paper's Table 1 for DATASET with our purifier: oblivious attacks on the bare classifiers.

    \b
    Examples:
      python -m training evaluate fashion_mnist
      python -m training evaluate fashion_mnist --checkpoint runs/mine/checkpoint.safetensors --split validation
    """
    from training import evaluate as measure

    where = find_device(device)
    bundle = load_checkpoint(checkpoint or dataset)
    model = place(DefenseVAE.from_checkpoint(bundle), where)
    loaded = load_dataset(dataset, data)
    part = (loaded.test if split == "test" else loaded.validation).first(images).to(where)
    console = Console()
    record: dict[str, Any] = {"checkpoint": bundle.digest, "split": split, "images": len(part), "sections": {}}
    kept: dict[str, Any] = {"images": len(part), "columns": ["bare", "purified"]}

    def section(title: str, which: tuple[str, ...], attacks: Mapping[str, Attack]) -> None:
        models = {name: _shipped(name, loaded, where) for name in which}
        cells = measure.evaluate(model, models, part, attacks, dataset=loaded.name, predicted_labels=predicted_labels)
        figures = measure.summary(cells)
        console.print(measure.render(cells, f"{loaded.name}, {len(part)} {split} images: {title}"))
        console.print(
            f"mean under attack {figures['attacked_mean']:.2f}, clean images lose {figures['clean_loss']:.2f} points"
        )
        record["sections"][title] = {"cells": measure.records(cells), **figures}
        kept[title] = {**measure.for_header(cells), **figures}

    section("attacked classifiers", tuple(names.split(",")), PAPER_TEST_ATTACKS)
    if held_out:
        section("held-out classifier", (classifiers.HELD_OUT,), measure.TRANSFER_ATTACKS)
    if json_path:
        with replacing(json_path) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")
    if save:
        key = f"{split} images, attacks away from {'predicted' if predicted_labels else 'true'} labels"
        save_checkpoint(save, replace(bundle, accuracies={**bundle.accuracies, key: kept}))


def _shipped(name: str, data: Dataset, device: torch.device) -> nn.Module:
    path = CLASSIFIER_FOLDER / f"{data.name}_{name}.safetensors"
    if not path.exists():
        raise Failure(
            f"classifier {name} of {data.name}: expected the file {path}; "
            f"train it with 'python -m training classifier {data.name} {name}'"
        )
    return load_classifier(path, device)[0]


@cli.command()
@click.argument("dataset")
@click.argument("name", type=click.Choice(list(classifiers.CLASSIFIERS)))
@data_option
@click.option("--epochs", default=10, help="Passes over the training images (10 in the paper).")
@device_option
def classifier(dataset: str, name: str, data: Path | None, epochs: int, device: str) -> None:
    """Train the built-in classifier NAME on DATASET and store it beside the shipped ones."""
    loaded = load_dataset(dataset, data)
    model = fit_classifier(name, loaded, epochs=epochs, device=find_device(device))
    header = classifier_header(loaded, epochs, model)
    save_classifier(CLASSIFIER_FOLDER / f"{loaded.name}_{name}.safetensors", name, model, header)
    click.echo(
        f"{name}: {header['validation_accuracy']:.2f} % on validation, {header['test_accuracy']:.2f} % on test images"
    )


@cli.command("demo-data")
@click.argument("dataset")
@click.argument("name", default="A")
@data_option
def demo_data(dataset: str, name: str, data: Path | None) -> None:
    """Rewrite the packaged demo data: classifier NAME without torch, and DATASET's test images attacked on it."""
    from training.demo_data import write_demo_data

    loaded = load_dataset(dataset, data)
    write_demo_data(loaded, _shipped(name, loaded, torch.device("cpu")), WEIGHTS_FOLDER)


def _built_in(name: str, data: Dataset, out: Path, epochs: int, device: torch.device) -> nn.Module:
    """A shipped classifier, or one trained for this run and kept beside it."""
    shipped = CLASSIFIER_FOLDER / f"{data.name}_{name}.safetensors"
    path = shipped if shipped.exists() else out / "classifiers" / f"{data.name}_{name}.safetensors"
    if not path.exists():
        model = fit_classifier(name, data, epochs=epochs, device=device)
        save_classifier(path, name, model, classifier_header(data, epochs, model))
    return load_classifier(path, device)[0]


def classifier_header(data: Dataset, epochs: int, model: nn.Module) -> dict[str, Any]:
    """What a classifier's file says of it."""
    _, channels, size, _ = data.train.images.shape
    device = next(model.parameters()).device
    return {
        "dataset": data.name,
        "channels": channels,
        "image_size": size,
        "classes": data.classes,
        "epochs": epochs,
        "seed": 0,
        "validation_accuracy": accuracy(model, data.validation.to(device)),
        "test_accuracy": accuracy(model, data.test.to(device)),
    }


def _own_classifier(spec: str, data: Dataset, device: torch.device) -> nn.Module:
    module_name, _, function = spec.partition(":")
    if not module_name or not function:
        raise Failure(f"--classifier: expected package.module:function, got {spec!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), function)()
    except (ImportError, AttributeError) as error:
        raise Failure(f"--classifier {spec}: {error}") from error
    if not isinstance(made, nn.Module):
        raise Failure(f"--classifier {spec}: expected a torch.nn.Module, got {type(made).__name__}")
    made = made.to(device).eval().requires_grad_(False)
    shape = made(torch.zeros(2, *data.train.images.shape[1:], device=device)).shape
    if shape != (2, data.classes):
        raise Failure(
            f"--classifier {spec}: expected logits of shape (N, {data.classes}), got {tuple(shape)} for N = 2"
        )
    return made


def main() -> None:
    """Entry point: errors in one line and exit code 2, a traceback with ``--debug``."""
    debug = "--debug" in sys.argv
    try:
        cli(prog_name="python -m training")
    except (ValueError, OSError) as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
