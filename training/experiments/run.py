"""Run cells: measure those that have no record, and write one for each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click

from training.device import find_device
from training.experiments.cells import Cell, read_record, write_record
from training.experiments.lab import Lab, NotAvailable
from training.experiments.measure import prepare, run_cell
from training.experiments.once import Stopped
from training.experiments.processes import STOPPED, Group
from training.experiments.scale import Scale


@dataclass(frozen=True)
class Request:
    """What all cells of a run have in common.

    Args:
        scale: how much work.
        seed: of every training.
        again: measure cells that have a record, too.
        records: folder of the records.
        runs: folder of everything that is kept between calls.
        data: where data sets are looked for.
        device: where to work, as for :func:`training.device.find_device`.
    """

    scale: Scale
    seed: int
    again: bool
    records: Path
    runs: Path
    data: Path | None
    device: str

    def missing(self, some: Sequence[Cell]) -> list[Cell]:
        """The cells that have no record."""
        return [cell for cell in some if read_record(cell.path(self.records, self.scale.name, self.seed)) is None]


class Outcome(NamedTuple):
    """Why cells were not run, each reason once, and whether Ctrl-C came before the last."""

    reasons: list[str]
    stopped: bool


def run_cells(request: Request, some: Sequence[Cell], prepared: Sequence[Cell] = ()) -> Outcome:
    """Measure cells one after the other and say what was found.

    Args:
        request: how.
        some: the cells.
        prepared: cells whose classifier and attacked images are made before.
    """
    lab = Lab(request.scale, request.seed, request.runs, request.data, find_device(request.device))
    reasons: dict[str, None] = {}
    todo = list(some) if request.again else request.missing(some)
    try:
        with contextlib.suppress(NotAvailable):  # the cells that need it say so
            for cell in prepared:
                prepare(lab, cell)
        for cell in todo:
            try:
                record = run_cell(lab, cell)
            except NotAvailable as error:
                reasons[f"not run: {error}"] = None
                continue
            write_record(cell.path(request.records, request.scale.name, request.seed), cell, record)
            paper = "" if record["paper"] is None else f" (paper {record['paper']:.2f})"
            name = " ".join(filter(None, (cell.dataset, *cell.row, cell.column)))
            click.echo(f"{name}: {record['value']:.2f}{paper}, {record['images']} images")
    except Stopped as error:
        click.echo(str(error), err=True)
        return Outcome([*reasons], True)
    return Outcome([*reasons], False)


def run_group(request: Request, group: Group) -> int:
    """:func:`run_cells` in a process of its own; its exit code."""
    outcome = run_cells(request, group.cells, group.prepared)
    for line in outcome.reasons:
        click.echo(line)
    return STOPPED if outcome.stopped else 0
