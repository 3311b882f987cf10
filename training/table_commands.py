"""Commands that regenerate the paper's tables and figures."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click

from training.device import find_device
from training.experiments.cells import TABLES, cells, select
from training.experiments.figures import FIGURES
from training.experiments.results import write_results
from training.experiments.scale import SCALES
from training.options import COUNT, RUNS, data_option, device_option

scale_option = click.option(
    "--scale",
    type=click.Choice(list(SCALES)),
    default="quick",
    help="How much work: quick to try, cpu, gpu, or the paper's.",
)
runs_option = click.option(
    "--runs", type=click.Path(path_type=Path, file_okay=False), default=RUNS / "experiments",
    help="What was trained and attacked is kept here.",
)  # fmt: skip


@click.command("table")
@click.argument("numbers", type=click.Choice(TABLES), nargs=-1, required=True, metavar="NUMBER...")
@scale_option
@click.option("--seed", type=click.IntRange(min=0), help="This seed instead of the scale's own.")
@click.option("--dataset", help="Only this data set's cells.")
@click.option(
    "--column", "columns", multiple=True, help="Only this column's cells, such as defense_vae_rec; may be given again."
)
@click.option("--attack", help="Only this attack's cells.")
@click.option("--classifier", help="Only this classifier's cells.")
@click.option("--substitute", help="Only this substitute's cells.")
@click.option("--search", help="Only this search of Table 4, such as 200x10.")
@click.option("--jobs", type=COUNT, default=1, help="Processes that share the work, a training at a time.")
@click.option("--again", is_flag=True, help="Measure cells that have a record already, too.")
@click.option(
    "--records", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/results/tables"),
    help="A JSON record of every cell goes here.",
)  # fmt: skip
@click.option(
    "--page", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/RESULTS.md"),
    help="The page that is written from all records.",
)  # fmt: skip
@runs_option
@data_option
@device_option
def table_command(
    numbers: tuple[str, ...], scale: str, seed: int | None, dataset: str | None, columns: tuple[str, ...],
    attack: str | None, classifier: str | None, substitute: str | None, search: str | None, jobs: int, again: bool,
    records: Path, page: Path, runs: Path, data: Path | None, device: str,
) -> None:  # fmt: skip
    """Run what is missing of the paper's tables NUMBER..., and write docs/RESULTS.md.

    Whatever has to be trained is trained first and kept, attacked images too. Ctrl-C stops at any time, and the same
    command goes on. Data sets that are not here are said and left out. With several --jobs each prints into a file of
    its own in the folder logs of --runs.

    \b
    Scales:
      quick  2,000 training images an attack, 500 test images: to see everything work
      short  10,000 training images an attack (4,000 for CW), all test images: an hour a classifier and core
      noise  20,000 (6,000), random signs in six of ten single-step pairs: the black-box table, beyond the paper
      cpu    20,000 training images an attack (6,000 for CW), all test images: hours a classifier and core
      gpu    30,000 training images an attack (20,000 for CW), all test images: minutes of one GPU
      paper  everything, three seeds: hours of one

    \b
    Examples:
      python -m training table 1
      python -m training table 1 --scale cpu --dataset mnist --classifier A
      python -m training table 3 --scale cpu --column defense_vae --column defense_vae_rec
      python -m training table 1 2 3 7 8 --scale gpu --jobs 12
    """
    from training.experiments.processes import STOPPED, run_groups, share_out
    from training.experiments.run import Request, run_cells, run_group

    chosen = SCALES[scale]
    wanted = select(
        (cell for number in dict.fromkeys(numbers) for cell in cells(number)), columns, dataset=dataset, attack=attack,
        classifier=classifier, substitute=substitute, search=search,
    )  # fmt: skip
    find_device(device)
    missing: dict[str, None] = {}
    code = 0
    for one in chosen.seeds if seed is None else (seed,):
        request = Request(chosen, one, again, records, runs, data, device)
        if jobs == 1:
            outcome = run_cells(request, wanted)
            missing.update(dict.fromkeys(outcome.reasons))
            code = STOPPED if outcome.stopped else 0
        else:
            logs = runs / "logs"
            todo = wanted if again else request.missing(wanted)
            code = run_groups(share_out(todo), jobs, partial(run_group, request), logs)
            if left := len(request.missing(wanted)):
                missing[f"not run: {left} cells; why is in {logs}"] = None
        if code:
            break
    write_results(page, records)
    for line in missing:
        click.echo(line, err=True)
    click.echo(f"{page}: written from the records in {records}")
    if code:
        sys.exit(code)


@click.command("figure")
@click.argument("number", type=click.Choice(FIGURES))
@scale_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of everything trained for it.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="PNG file. [default: docs/results/figureN.png]"
)
@runs_option
@data_option
@device_option
def figure_command(
    number: str, scale: str, seed: int, out: Path | None, runs: Path, data: Path | None, device: str
) -> None:
    """Draw the paper's figure NUMBER from the same runs as the tables.

    1: images attacked by FGSM 0.05 and 0.1, and purified. 4: the learning curve of end-to-end fine-tuning. 5: black-box
    FGSM through Defense-GAN and Defense-VAE.
    """
    from training.experiments import figures
    from training.experiments.lab import Lab

    lab = Lab(SCALES[scale], seed, runs, data, find_device(device))
    out = out or Path("docs/results") / f"figure{number}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw = {"1": figures.figure_1, "4": figures.figure_4, "5": figures.figure_5}[number]
    shown = draw(lab, out)
    click.echo(f"{out}: {', '.join(shown)}, scale {scale}")


COMMANDS = (table_command, figure_command)
