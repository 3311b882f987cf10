"""``python -m training``: train a purifier and measure it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table
from torch import nn

from defense_vae_fast import Purifier
from defense_vae_fast.atomic import replacing
from defense_vae_fast.checkpoint import WEIGHTS_FOLDER, load_checkpoint, resolve, save_checkpoint
from defense_vae_fast.nn.kernels.selection import Kernels
from defense_vae_fast.nn.model import DefenseVAE
from training import card_commands, classifiers, defence_commands, distributed, pool, recipe, table_commands
from training.attacks import PAPER_TEST_ATTACKS, Attack
from training.data import load_dataset
from training.device import find_device, place
from training.options import COUNT, RUNS, data_option, device_option, noise_option, own_option
from training.precision import Amp


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train a Defense-VAE purifier, and measure what it is worth."""
    if distributed.launched() and context.invoked_subcommand != "fit":
        raise ValueError(
            f"{context.invoked_subcommand}: expected one process, got several from torchrun, which only 'fit' can use; "
            "start it with 'python -m training'"
        )


@cli.command()
@click.argument("dataset")
@click.option("--preset", type=click.Choice(list(recipe.PRESETS)), default="quick", help="The recipe to start from.")
@data_option
@own_option
@click.option(
    "--classifiers", "names", help="Comma-separated names of built-in classifiers to attack instead of the preset's."
)
@click.option(
    "--classifier-epochs", type=COUNT, default=10, help="Epochs for built-in classifiers that have to be trained first."
)
@click.option("--steps", type=COUNT, help="Optimizer steps instead of the preset's length.")
@click.option("--batch-size", type=COUNT, help="Images a batch instead of the preset's; the clean ones' share stays.")
@click.option("--kl-weight", type=float, help="Weight of the KL term: 1 in the paper's text, 0 in its released code.")
@noise_option
@click.option("--mirrored", is_flag=True, help="Train on mirror images of the training images, too.")
@click.option(
    "--optimizer",
    type=click.Choice(get_args(recipe.Optimizer)),
    help="adam, or muon: steps that go further in all directions of the weights. [default: the preset's, adam]",
)
@click.option("--latent-dim", type=int, help="Size of the latent.")
@click.option("--seed", type=int, help="Seed of everything random.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the run. [default: runs/DATASET-PRESET]"
)
@click.option("--init", help="Start from this purifier, a shipped name or a file, instead of random weights.")
@click.option("--resume", is_flag=True, help="Go on from the folder's last state.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events into the run's folder.")
@click.option(
    "--amp",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Precision of the networks; weights are float32. [default: bf16; fp32 on a CPU without it]",
)
@click.option(
    "--kernels",
    type=click.Choice(["auto", "triton", "torch"]),
    default="auto",
    help="Fused Triton kernels or plain torch; auto is Triton on CUDA where it works.",
)
@click.option(
    "--cuda-graph/--no-cuda-graph", default=True, help="On CUDA, launch a whole step at once, as a CUDA graph."
)
@device_option
def fit(
    dataset: str, preset: str, data: Path | None, own: str | None, names: str | None, classifier_epochs: int,
    steps: int | None, batch_size: int | None, kl_weight: float | None, noise: float | None, mirrored: bool,
    optimizer: recipe.Optimizer | None, latent_dim: int | None, seed: int | None, out: Path | None, init: str | None,
    resume: bool, tensorboard: bool, amp: Amp | None, kernels: Kernels, cuda_graph: bool, device: str,
) -> None:  # fmt: skip
    """Train a purifier for DATASET: fashion_mnist, mnist, cifar10_jpeg, celeba, or a folder with a sub-folder a class.

    A data set's files are looked for in --data, or else in $DEFENSE_VAE_DATA and Debian's /usr/share/datasets;
    Fashion-MNIST is downloaded when it is nowhere. A run may be stopped with Ctrl-C at any time and goes on with the
    same command and --resume.

    \b
    Presets, on two cores (quick and paper are estimates):
      quick   each of the paper's attacks on 6,000 images, one classifier: tens of minutes
      paper   the same on all images, five epochs with batches of 16: a day; meant for a GPU
      pooled  fresh attacks on seven classifiers, the shipped recipe: one to two hours
      polish  its second part, after --init: one hour on one core

    On several GPUs, or several CPU sockets, torchrun starts a process for each; they share every batch, so the recipe
    and its batch stay as they are.

    \b
    Examples:
      python -m training fit fashion_mnist --preset quick
      python -m training fit fashion_mnist --preset paper --kl-weight 1
      python -m training fit fashion_mnist --preset quick --noise 0.6
      python -m training fit path/to/images --classifier my_package.my_module:make_classifier
      torchrun --nproc-per-node 4 -m training fit fashion_mnist --preset paper
    """
    from training.fit import fit as run

    if own and names:
        raise ValueError("fit: expected --classifier or --classifiers, got both; name one")
    chosen = recipe.preset(
        preset, batch_size=batch_size, steps=steps, epochs=0 if steps else None, kl_weight=kl_weight, noise=noise,
        mirrored=mirrored or None, optimizer=optimizer, latent_dim=latent_dim, seed=seed,
        classifiers=(own,) if own else tuple(names.split(",")) if names else None,
    )  # fmt: skip
    if not own:
        pool.check_names(chosen.classifiers)
    start = load_checkpoint(init) if init else None
    with distributed.joined(device) as (ranks, where):
        with ranks.first_alone():
            images = load_dataset(dataset, data)
            out = out or RUNS / f"{images.name}-{preset}"
            attacked = {
                name: pool.own(name, images, where)
                if own
                else pool.for_run(name, images, out, classifier_epochs, where)
                for name in chosen.classifiers
            }
        begun = time.monotonic()
        result = run(
            images, attacked, chosen, out, device=where, init=start, resume=resume, tensorboard=tensorboard, amp=amp,
            kernels=kernels, cuda_graph=cuda_graph, ranks=ranks,
        )  # fmt: skip
        spent = time.monotonic() - begun
    if ranks.first:
        click.echo(f"{result.checkpoint} (step {result.step} of {result.steps}, in {spent:,.0f} s, pairs included)")
    if not result.finished:
        if ranks.first:
            click.echo("stopped early; the checkpoint is usable as it is, and --resume goes on", err=True)
        sys.exit(130)


@cli.command()
@click.argument("dataset")
@click.option("--checkpoint", help="Purifier to measure: a shipped name or a file. [default: DATASET]")
@data_option
@click.option(
    "--split", type=click.Choice(["test", "validation"]), default="test", help="Choose on validation, report on test."
)
@click.option("--images", type=COUNT, help="Only the first so many images.")
@click.option(
    "--classifiers", "names", help="Comma-separated names. [default: the paper's: A,B,C,D; A,C,D for CIFAR-10]"
)
@own_option
@click.option(
    "--predicted-labels", is_flag=True, help="Attack away from the classifier's own predictions: no label leaks."
)
@click.option("--held-out", is_flag=True, help="Measure the held-out residual network too, with more attacks.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep attacked images in this folder, and take from it what an earlier call left there.",
)
@click.option(
    "--engine-precision",
    "precisions",
    multiple=True,
    help="Measure the engine in this precision too (int8, bf16 ...), on the fp32 module's very images; repeatable.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write every cell here.")
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the checkpoint with these accuracies in its header.",
)
@device_option
def evaluate(
    dataset: str, checkpoint: str | None, data: Path | None, split: str, images: int | None, names: str | None,
    own: str | None, predicted_labels: bool, held_out: bool, keep: Path | None, precisions: tuple[str, ...],
    json_path: Path | None, save: Path | None, device: str,
) -> None:  # fmt: skip
    """Print the paper's Table 1 (or 7) for DATASET with our purifier: oblivious attacks on the bare classifiers.

    DATASET and --data are as in 'fit'. All 10,000 test images take minutes on a CPU, with --held-out an hour, nearly
    all of it for making the attacked images; --images makes it shorter, and --keep the second time.

    \b
    Examples:
      python -m training evaluate fashion_mnist
      python -m training evaluate fashion_mnist --checkpoint runs/mine/checkpoint.safetensors --split validation
    """
    from training import evaluate as measure

    if own and names:
        raise ValueError("evaluate: expected --classifier or --classifiers, got both; name one")
    where = find_device(device)
    for path in (json_path, save):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    try:
        bundle = load_checkpoint(checkpoint or dataset)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name your own with --checkpoint") from error
    model = place(DefenseVAE.from_checkpoint(bundle), where)
    loaded = load_dataset(dataset, data)
    if bundle.config.image_shape != tuple(loaded.test.images.shape[1:]):
        raise ValueError(
            f"evaluate: expected images of the purifier's shape {bundle.config.image_shape}, "
            f"got {tuple(loaded.test.images.shape[1:])} in {loaded.name}"
        )
    part = (loaded.test if split == "test" else loaded.validation).first(images).to(where)
    console = Console()
    record: dict[str, Any] = {"checkpoint": bundle.digest, "split": split, "images": len(part), "sections": {}}
    engines: dict[str, Purifier] = {}
    for precision in precisions:
        purifier = Purifier(bundle, precision=precision)
        engines[f"{purifier.info()['engine']} {precision}"] = purifier
    kept: dict[str, Any] = {"images": len(part), "columns": ["bare", "purified", *engines]}

    def section(title: str, models: Mapping[str, nn.Module], attacks: Mapping[str, Attack]) -> None:
        cells = measure.evaluate(
            model, models, part, attacks, engines=engines, dataset=loaded.name, predicted_labels=predicted_labels,
            keep=keep,
        )  # fmt: skip
        figures = measure.summary(cells)
        console.print(measure.render(cells, f"{loaded.name}, {len(part)} {split} images: {title}"))
        console.print(
            f"mean under attack {figures['attacked_mean']:.2f}, clean images lose {figures['clean_loss']:.2f} points"
        )
        record["sections"][title] = {"cells": measure.records(cells), **figures}
        kept[title] = {**measure.for_header(cells), **figures}

    chosen = tuple(names.split(",")) if names else classifiers.paper_classifiers(loaded.name)
    models = {own: pool.own(own, loaded, where)} if own else {n: pool.shipped(n, loaded, where) for n in chosen}
    section("attacked classifiers", models, PAPER_TEST_ATTACKS)
    if held_out:
        name = classifiers.HELD_OUT
        section("held-out classifier", {name: pool.shipped(name, loaded, where)}, measure.TRANSFER_ATTACKS)
    if json_path:
        with replacing(json_path) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")
    if save:
        key = f"{len(part)} {split} images, attacks away from {'predicted' if predicted_labels else 'true'} labels"
        save_checkpoint(save, replace(bundle, accuracies={**bundle.accuracies, key: kept}))


@cli.command()
@click.argument("checkpoint")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to write it. [default: in its place]"
)
@click.option("--dataset", help="As in 'fit'. [default: the one that the checkpoint was trained on]")
@data_option
@click.option("--images", type=COUNT, default=2000, help="Validation images to measure on.")
@click.option(
    "--classifiers", "names", help="Comma-separated names. [default: the paper's: A,B,C,D; A,C,D for CIFAR-10]"
)
@click.option("--classifier", "own", metavar="MODULE:FUNCTION", help="Your own torch classifier, as in 'fit'.")
@click.option("--limit", type=float, default=0.3, help="Points that no cell may lose against fp32.")
@device_option
def quantize(
    checkpoint: str, out: Path | None, dataset: str | None, data: Path | None, images: int, names: str | None,
    own: str | None, limit: float, device: str,
) -> None:  # fmt: skip
    """Give CHECKPOINT, a shipped name or a file, the scales of int8 arithmetic (precision="int8").

    Calibrates on clean and attacked training images, measures how much each layer bears, takes as many layers as keep
    every accuracy within --limit of fp32 on validation images, and writes scales, recipe and accuracies into the
    header. The weights stay as they are. Test images are never looked at.

    \b
    Examples:
      python -m training quantize fashion_mnist
      python -m training quantize runs/mine/checkpoint.safetensors -o quantized.safetensors --classifier my.module:make
    """
    from training.quantize import quantize as run

    if own and names:
        raise ValueError("quantize: expected --classifier or --classifiers, got both; name one")
    bundle = load_checkpoint(checkpoint)
    loaded = load_dataset(dataset or bundle.dataset, data)
    where = find_device(device)
    chosen = tuple(names.split(",")) if names else classifiers.paper_classifiers(loaded.name)
    models = {own: pool.own(own, loaded, where)} if own else {n: pool.shipped(n, loaded, where) for n in chosen}
    result = run(bundle, loaded, models, images=images, limit=limit, device=where, console=Console())
    path = out or resolve(checkpoint)
    click.echo(f"{path}: digest {save_checkpoint(path, result)}")


@cli.command()
@click.argument("dataset")
@click.argument("name", type=click.Choice(list(classifiers.CLASSIFIERS)))
@data_option
@click.option("--epochs", type=COUNT, default=10, help="Passes over the training images (10 in the paper).")
@click.option("--batch-size", type=COUNT, default=100, help="Images a step (100 in the paper).")
@click.option("--force", is_flag=True, help="Replace a classifier that is there already.")
@device_option
def classifier(
    dataset: str, name: str, data: Path | None, epochs: int, batch_size: int, force: bool, device: str
) -> None:
    """Train the built-in classifier NAME on DATASET and store it beside the shipped ones.

    Purifiers are trained and measured against these files: replacing one makes earlier figures void.
    """
    where = find_device(device)
    loaded = load_dataset(dataset, data)
    path = pool.shipped_path(name, loaded)
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already; --force replaces it")
    header = pool.train_and_store(name, loaded, path, epochs, where, batch_size=batch_size)
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
    write_demo_data(loaded, pool.shipped(name, loaded, find_device("cpu")), WEIGHTS_FOLDER)


@cli.command()
@click.argument("dataset")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--name", default="A", help="The attacked classifier of the run, one of Table 5's.")
@click.option("--variant", default="e2e", help="What it is called.")
@data_option
@click.option("--images", type=COUNT, help="Only the first so many validation and test images.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder of attacked images.")
@device_option
def variant(
    dataset: str, run: Path, name: str, variant: str, data: Path | None, images: int | None, keep: Path | None,
    device: str,
) -> None:  # fmt: skip
    """Release the purifier and classifier of RUN, a folder of 'finetune', as a variant of DATASET's shipped purifier.

    That is done only if they are better on validation images. Both are measured on test images, too, for the header,
    and int8 scales are added as by 'quantize'.

    \b
    Example:
      python -m training variant fashion_mnist runs/fashion_mnist-e2e
    """
    from training.quantize import quantize as scales
    from training.variant import release

    where, loaded = find_device(device), load_dataset(dataset, data)
    released = release(
        loaded, name, pool.shipped(name, loaded, where), load_checkpoint(loaded.name), run, WEIGHTS_FOLDER,
        variant=variant, images=images, device=where, keep=keep,
    )  # fmt: skip
    for title, rows in (
        ("validation, attacks away from predicted labels", released.validation),
        *((f"test, attacks away from {labels} labels", rows) for labels, rows in released.test.items()),
    ):
        table = Table("attack", *released.columns, title=title)
        for attack, values in rows.items():
            table.add_row(attack, *(f"{value:.2f}" for value in values))
        Console().print(table)
    path = WEIGHTS_FOLDER / f"{released.name}.safetensors"
    judges = {f"{name}, trained with it": released.classifier}
    save_checkpoint(path, scales(load_checkpoint(path), loaded, judges, device=where, console=Console()))
    click.echo(f"{path} and its classifier")


for command in (*defence_commands.COMMANDS, *table_commands.COMMANDS, *card_commands.COMMANDS):
    cli.add_command(command)


def main() -> None:
    """Entry point: errors in one line and exit code 2, a traceback with ``--debug``."""
    debug = "--debug" in sys.argv
    try:
        cli(prog_name="python -m training")
    except (ValueError, OSError, RuntimeError) as error:
        if debug:
            raise
        click.echo(f"error{distributed.name()}: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
