"""Options that several commands of ``python -m training`` share."""

from __future__ import annotations

from pathlib import Path

import click

RUNS = Path("runs")
COUNT = click.IntRange(min=1)

data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of the IDX files or of CelebA, or CIFAR-10's zip. [env: DEFENSE_VAE_DATA]",
)
device_option = click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto.")
own_option = click.option(
    "--classifier",
    "own",
    metavar="MODULE:FUNCTION",
    help="Your own torch classifier: a function without arguments that returns it.",
)
noise_option = click.option(
    "--noise",
    type=float,
    help="Share of the FGSM and RAND-FGSM pairs that get random signs instead of the gradient's, against attacks "
    "through a substitute; with the presets quick and paper, and 0 in the paper.",
)
resume_option = click.option("--resume", is_flag=True, help="Go on from the folder's last state.")
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of everything random.")
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the run. [default: runs/DATASET-KIND]"
)
