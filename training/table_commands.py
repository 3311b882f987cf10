"""Commands that regenerate the paper's tables and figures."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from training.device import find_device
from training.experiments.cells import TABLES, cells, read_record, select, write_record
from training.experiments.figures import FIGURES
from training.experiments.results import write_results
from training.experiments.scale import SCALES
from training.options import RUNS, data_option, device_option

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
@click.argument("number", type=click.Choice(TABLES))
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
    number: str, scale: str, seed: int | None, dataset: str | None, columns: tuple[str, ...], attack: str | None,
    classifier: str | None, substitute: str | None, search: str | None, again: bool, records: Path, page: Path,
    runs: Path, data: Path | None, device: str,
) -> None:  # fmt: skip
    """Run what is missing of the paper's table NUMBER, and write docs/RESULTS.md.

    Whatever has to be trained is trained first and kept, attacked images too. Ctrl-C stops at any time, and the same
    command goes on. Data sets that are not here are said and left out.

    \b
    Scales:
      quick  2,000 training images an attack, 500 test images: to see everything work
      cpu    20,000 training images an attack (6,000 for CW), all test images: an hour a classifier and core
      gpu    30,000 training images an attack (20,000 for CW), all test images: minutes of one GPU
      paper  everything, three seeds: hours of one

    \b
    Examples:
      python -m training table 1
      python -m training table 1 --scale cpu --dataset mnist --classifier A
      python -m training table 3 --scale cpu --column defense_vae --column defense_vae_rec
    """
    from training.experiments.lab import Lab, NotAvailable
    from training.experiments.measure import run_cell
    from training.experiments.once import Stopped

    chosen = SCALES[scale]
    wanted = [
        cell
        for column in columns or (None,)
        for cell in select(
            cells(number), dataset=dataset, column=column, attack=attack, classifier=classifier, substitute=substitute,
            search=search,
        )
    ]  # fmt: skip
    where = find_device(device)
    missing: dict[str, None] = {}
    stopped = False
    for number_ in chosen.seeds if seed is None else (seed,):
        lab = Lab(chosen, number_, runs, data, where)
        for cell in wanted:
            path = cell.path(records, scale, number_)
            if read_record(path) is not None and not again:
                continue
            try:
                record = run_cell(lab, cell)
            except NotAvailable as error:
                missing[f"not run: {error}"] = None
                continue
            except Stopped as error:
                click.echo(str(error), err=True)
                stopped = True
                break
            write_record(path, cell, record)
            paper = "" if record["paper"] is None else f" (paper {record['paper']:.2f})"
            name = " ".join(filter(None, (cell.dataset, *cell.row, cell.column)))
            click.echo(f"{name}: {record['value']:.2f}{paper}, {record['images']} images")
        if stopped:
            break
    write_results(page, records)
    for line in missing:
        click.echo(line, err=True)
    click.echo(f"{page}: written from the records in {records}")
    if stopped:
        sys.exit(130)


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
