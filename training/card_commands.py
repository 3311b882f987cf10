"""The command that writes a robustness card."""

from __future__ import annotations

from pathlib import Path

import click

from defense_vae_fast.checkpoint import load_checkpoint
from training import pool
from training.classifiers import HELD_OUT, paper_classifiers
from training.data import load_dataset
from training.device import find_device
from training.options import COUNT, RUNS, data_option, device_option, own_option, seed_option


@click.command("card")
@click.argument("checkpoint")
@click.option("--dataset", help="Data set or folder of images. [default: the one in the checkpoint's header]")
@data_option
@click.option(
    "--classifiers", "names", help=f"Comma-separated names. [default: the paper's of the data set, and {HELD_OUT}]"
)
@own_option
@click.option("--images", type=COUNT, default=200, help="Test images for adaptive attacks.")
@click.option("--oblivious-images", type=COUNT, default=1000, help="Test images for everything else.")
@click.option("--epsilons", default="0.01,0.02,0.05,0.1,0.2,0.3,0.4", help="Comma-separated, rising.")
@click.option("--steps", type=COUNT, default=100, help="Steps of PGD and APGD.")
@click.option("--restarts", type=COUNT, default=5, help="Random starts of PGD.")
@click.option("--queries", type=click.IntRange(min=0), default=1000, help="Queries of Square; 0 leaves it out.")
@click.option("--library/--no-library", default=True, help="Run APGD and Square of the Adversarial Robustness Toolbox.")
@click.option(
    "--draws", type=click.IntRange(min=0), default=0, help="Sample the latent, with so many draws a gradient."
)
@click.option(
    "--adversarial", multiple=True, metavar="NAME=FILE",
    help="Compare classifier NAME with this file of 'adversarial'; may be given several times.",
)  # fmt: skip
@seed_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the card. [default: docs/cards/CHECKPOINT]",
)
@device_option
def card_command(
    checkpoint: str, dataset: str | None, data: Path | None, names: str | None, own: str | None, images: int,
    oblivious_images: int, epsilons: str, steps: int, restarts: int, queries: int, library: bool, draws: int,
    adversarial: tuple[str, ...], seed: int, out: Path | None, device: str,
) -> None:  # fmt: skip
    """Write the robustness card of CHECKPOINT, a shipped name or a file: CARD.md, card.html, card.json and pictures.

    It says what the purifier withstands and where it fails: clean and damaged images, attackers who do not know it,
    attackers who only ask, attackers who know everything, and what its score detects. It takes from minutes to an hour
    a classifier on two cores; fewer --images make it shorter. Stopped, the same command goes on with the classifiers
    that are missing.

    \b
    Examples:
      python -m training card fashion_mnist
      python -m training card fashion_mnist --classifiers A \\
          --adversarial A=runs/fashion_mnist-adversarial/classifier.safetensors
      python -m training card runs/images-quick/checkpoint.safetensors --dataset path/to/images \\
          --classifier my_package.my_module:make_classifier
    """
    from training.card.adaptive import Effort
    from training.card.measure import CardSettings, make_card
    from training.card.render import CARD_FILE, PAGE_FILE, write_card
    from training.train_classifier import load_weights

    if own and names:
        raise ValueError("card: expected --classifier or --classifiers, got both; name one")
    try:
        bounds = tuple(float(part) for part in epsilons.split(","))
    except ValueError as error:
        raise ValueError(f"--epsilons: expected numbers with commas between, got {epsilons!r}") from error
    effort = Effort(bounds, steps, restarts, queries, library, seed)
    settings = CardSettings(images, oblivious_images, effort, draws)
    bundle = load_checkpoint(checkpoint)
    where, loaded = find_device(device), load_dataset(dataset or bundle.dataset, data)
    if bundle.config.image_shape != tuple(loaded.test.images.shape[1:]):
        raise ValueError(
            f"card: expected images of the purifier's shape {bundle.config.image_shape}, "
            f"got {tuple(loaded.test.images.shape[1:])} in {loaded.name}"
        )
    chosen = names.split(",") if names else [*paper_classifiers(loaded.name), HELD_OUT]
    models = {own: pool.own(own, loaded, where)} if own else {n: pool.shipped(n, loaded, where) for n in chosen}
    robust = {}
    for spec in adversarial:
        name, found, file = spec.partition("=")
        if not found or name not in models:
            raise ValueError(f"--adversarial: expected NAME=FILE with NAME one of {', '.join(models)}, got {spec!r}")
        robust[name] = load_weights(Path(file), models[name], where)
    title = Path(checkpoint).stem if Path(checkpoint).suffix else checkpoint
    card, pictures = make_card(bundle, loaded, models, settings, adversarial=robust, device=where, keep=RUNS / "card")
    out = out or Path("docs/cards") / title
    write_card(card, pictures, out, title)
    for name, section in card["classifiers"].items():
        click.echo(f"{name}: clean {section['clean']['purified']:.1f}, adaptive worst case " + ", ".join(
            f"{value:.1f} at {epsilon}" for epsilon, value in section["adaptive"]["worst"].items()))  # fmt: skip
    click.echo(f"{out / CARD_FILE} and {out / PAGE_FILE}")


COMMANDS = (card_command,)
