"""Render ``docs/RESULTS.md`` from the records: ours, the paper's, the difference, and what was not run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from defense_vae_fast.atomic import replacing
from training.attacks import PAPER_TEST_ATTACKS
from training.experiments.cells import FROM_SCRATCH, TABLES, Cell, cells, read_record
from training.experiments.measure import AWAY_FROM_PREDICTION, SUBSTITUTE_AS_PRINTED, paper_cell
from training.experiments.scale import SCALES

NOT_RUN = "not run"
DATASET_TITLES = {
    "fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "celeba": "CelebA",
    "cifar10_jpeg": "CIFAR-10 (JPEG copy); the paper's numbers are on CIFAR-10 itself",
}  # fmt: skip
COLUMN_TITLES = {
    "no_attack": "no attack", "no_defense": "no defence", "defense_vae": "Defense-VAE",
    "defense_vae_rec": "Defense-VAE-REC", "defense_vae_e2e": "Defense-VAE-E2E", FROM_SCRATCH: "E2E from scratch",
    "defense_gan": "Defense-GAN", "magnet": "MagNet", "adv_training": "adversarial training",
    "pooled": "the shipped, pooled purifier", "trained_on_other_two": "trained on the other two",
    "plus_deepfool": "and on DeepFool", "trained_on_three": "trained on all three",
    "purifier": "the library's Purifier",
}  # fmt: skip
TABLE_TITLES = {
    "1": "Table 1: oblivious attacks (the paper's white-box)",
    "2": "Table 2: attacks that the purifier was not trained on (Defense-VAE-REC, as in the paper)",
    "3": "Table 3: black-box FGSM, epsilon 0.3, through a substitute",
    "4": "Table 4: seconds for 1,000 images",
    "7": "Table 7: oblivious attacks on larger images",
    "8": "Table 8: black-box FGSM on CIFAR-10",
}  # fmt: skip
_BESIDE = {AWAY_FROM_PREDICTION: "away from the prediction", SUBSTITUTE_AS_PRINTED: "substitute as printed"}
_INTRODUCTION = """# The paper's tables, regenerated

This page is written by `python -m training table N`; do not edit it. A cell reads **ours** (the paper's, the
difference); accuracies in percent. Where there are several seeds, ours is their mean ± standard deviation; the
attacked classifiers are the same for all of them. "not run" means just that. A dash stands where the paper has no
number.

Attacks are *oblivious*: made on the bare classifier (for adversarial training on the trained one), without knowledge
of what stands in front of it. They say nothing about an attacker who knows. Rows "clean" show what a defence costs
where there is no attack; the paper does not have them. REC and E2E answer with a classifier of their own, and are
attacked through the one that it was trained from, as in the paper; an attacker who had the new one
[did more harm](EXPERIMENTS.md#a-pair-as-a-variant-of-the-shipped-purifier) where that was tried. Classifiers are
trained by our recipe and are not the paper's: compare a defence with the column "no attack" of the same page too.
MagNet's figures are of the answers alone, as the paper's are; how many of the attacked images its detectors turn away
stands under the table. Below scale `paper` Defense-GAN's generator has at most 2 % of its authors' steps, and keeps
far less than theirs under attack: [what was looked into](EXPERIMENTS.md#what-differs-from-the-sources).

Under the mean, FGSM once more, away from what the classifier *predicts* instead of from the true label. A single step
away from the true label carries that label in its pattern of signs, and whoever is trained on such images can learn to
read it ("label leaking"): accuracy above that on clean images is a sign of it, and is no robustness.

In Table 3 the substitute is trained as in the code of Defense-GAN's experiments, which the paper follows: its images
only ever move towards their label, and B keeps a fifth of each image where Table 5 drops a fifth. Under the mean, the
same attack through a substitute as it is printed: with steps that turn (Papernot et al.) and the dropout of Table 5.
On Fashion-MNIST REC and E2E gain less there than in the paper, whatever
[was tried](EXPERIMENTS.md#the-black-box-attack) with its pairs. Scale `noise` goes beyond the paper in its pairs, not
in its loss: [random signs](EXPERIMENTS.md#random-signs-among-the-pairs) among them help against substitutes.
[CIFAR-10](EXPERIMENTS.md#cifar-10) has a recipe of its own.

Each cell has a record with seed, scale, number of images, times, machine, versions, the digests of the weights, and
the command that measures it again: [docs/results/tables](results/tables). [docs/EXPERIMENTS.md](EXPERIMENTS.md) says
what the defences are and what the scales mean.
"""


@dataclass(frozen=True)
class Entry:
    """A cell's numbers over all seeds; none where it was not run."""

    values: tuple[float, ...]
    images: tuple[int, ...]
    paper: float | None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds."""
        return statistics.fmean(self.values) if self.values else None

    def text(self) -> str:
        """For the page."""
        if self.mean is None:
            return f"{NOT_RUN} ({_number(self.paper)})" if self.paper is not None else NOT_RUN
        spread = f" ± {statistics.stdev(self.values):.2f}" if len(self.values) > 1 else ""
        if self.paper is None:
            return f"**{self.mean:.2f}**{spread} (–)"
        return f"**{self.mean:.2f}**{spread} ({_number(self.paper)}, {self.mean - self.paper:+.2f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def write_results(path: Path, records: Path) -> None:
    """Write the page anew from all records of all scales.

    Raises:
        ValueError: a record is damaged.
    """
    parts = [_INTRODUCTION]
    for table in TABLES:
        parts.append(f"## {TABLE_TITLES[table]}\n")
        # A scale without records has no section of its own; a table without any has one that says so.
        run = [scale for scale in SCALES if _found(cells(table), records, scale)]
        for scale in run or [next(iter(SCALES))]:
            parts += _sections(table, records, scale if run else "")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(("\n".join(parts).rstrip() + "\n").encode())


def entry(cell: Cell, records: Path, scale: str) -> Entry:
    """A cell's numbers from all of its records at one scale."""
    found = _found([cell], records, scale)
    return Entry(
        tuple(float(record["value"]) for record in found), tuple(int(record["images"]) for record in found),
        paper_cell(cell),
    )  # fmt: skip


def _beside(key: str, cell: Cell, records: Path, scale: str) -> Entry:
    found = [record for record in _found([cell], records, scale) if key in record]
    values = tuple(float(record[key]) for record in found)
    return Entry(values, tuple(int(record["images"]) for record in found), None)


def _found(some: Sequence[Cell], records: Path, scale: str) -> list[dict[str, Any]]:
    found = []
    for cell in some:
        path = cell.path(records, scale, 0) if scale else None
        for one in sorted(path.parent.glob(path.name.replace("-seed0.json", "-seed*.json"))) if path else ():
            record = read_record(one)
            if record is not None:
                found.append(record)
    return found


def _sections(table: str, records: Path, scale: str) -> list[str]:
    """A table for every data set, at one scale; "" for none at all."""
    parts = []
    for dataset, group in groupby(cells(table), key=lambda cell: cell.dataset):
        some = list(group)
        found = _found(some, records, scale)
        if not found and scale:
            continue
        parts.append(f"### {DATASET_TITLES[dataset]}{f', scale `{scale}`' if scale else ': ' + NOT_RUN}\n")
        parts.append(_table(some, records, scale))
        if found:
            parts.append(_footnote(some, found, records, scale))
    # Data sets that nobody has images of are named all the same.
    if scale:
        missing = [name for name in dict.fromkeys(cell.dataset for cell in cells(table))
                   if not _found([cell for cell in cells(table) if cell.dataset == name], records, scale)]  # fmt: skip
        parts += [f"{DATASET_TITLES[name].partition(';')[0]}: {NOT_RUN} at this scale.\n" for name in missing]
    return parts


def _table(some: list[Cell], records: Path, scale: str) -> str:
    columns = list(dict.fromkeys(cell.column for cell in some))
    if not _found([cell for cell in some if cell.column == FROM_SCRATCH], records, scale):
        columns = [column for column in columns if column != FROM_SCRATCH]
    if some[0].table == "4":
        return _times(some, records, scale)
    by_place = {(cell.row, cell.column): entry(cell, records, scale) for cell in some}
    order = ("clean", *PAPER_TEST_ATTACKS)
    rows = sorted(dict.fromkeys(cell.row for cell in some), key=lambda row: order.index(row[0]))  # as the paper does
    lines = [f"| attack | classifier | {' | '.join(COLUMN_TITLES[column] for column in columns)} |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for row in rows:
        texts = [by_place[row, column].text() if (row, column) in by_place else "" for column in columns]
        lines.append(f"| {row[0]} | {_name(row)} | {' | '.join(texts)} |")
    means = [_average([by_place[row, column] for row in rows if row[0] != "clean" and (row, column) in by_place])
             for column in columns]  # fmt: skip
    lines.append(f"| mean | under attack | {' | '.join(means)} |")
    for key, title in _BESIDE.items():
        for row in rows:
            found = [_beside(key, cell, records, scale) for column in columns for cell in some
                     if (cell.row, cell.column) == (row, column)]  # fmt: skip
            if any(one.values for one in found):
                texts = [one.text() if one.values else "" for one in found]
                lines.append(f"| {row[0]}, {title} | {_name(row)} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _name(row: tuple[str, str, str, str]) -> str:
    _, classifier, substitute, _ = row
    return f"{classifier}/{substitute}" if substitute else classifier


def _average(entries: list[Entry]) -> str:
    """Mean of a column; of nothing less than the whole column."""
    papers = [one.paper for one in entries if one.paper is not None]
    paper = statistics.fmean(papers) if len(papers) == len(entries) and papers else None
    means = [one.mean for one in entries if one.mean is not None]
    if len(means) != len(entries) or not means:
        return Entry((), (), paper).text()
    return Entry((statistics.fmean(means),), (), paper).text()


def _times(some: list[Cell], records: Path, scale: str) -> str:
    entries = {cell: entry(cell, records, scale) for cell in some}
    plain = next(one for cell, one in entries.items() if cell.column == "defense_vae")
    lines = [
        "| method | seconds here (the paper's Titan Xp) | times as long as Defense-VAE (the paper's) |",
        "|---|---|---|",
    ]
    for cell, one in entries.items():
        steps, _, starts = cell.search.partition("x")
        name = COLUMN_TITLES[cell.column] + (f", L={steps} R={starts}" if cell.search else "")
        ours = NOT_RUN if one.mean is None else f"**{_figures(one.mean)}**"
        ratio = NOT_RUN if one.mean is None or plain.mean is None else f"**{_figures(one.mean / plain.mean)}**"
        paper = "–" if one.paper is None or plain.paper is None else _figures(one.paper / plain.paper)
        lines.append(f"| {name} | {ours} ({_number(one.paper)}) | {ratio} ({paper}) |")
    return "\n".join(lines) + "\n"


def _figures(value: float) -> str:
    """Three figures, or all in front of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _footnote(some: list[Cell], found: list[dict[str, Any]], records: Path, scale: str) -> str:
    """How much was measured and what it cost."""
    counts: dict[str, set[int]] = {}
    for cell in some:
        counts.setdefault(cell.column, set()).update(entry(cell, records, scale).images)
    images = "; ".join(
        f"{COLUMN_TITLES[column]} {' or '.join(f'{count:,}' for count in sorted(values))}"
        for column, values in counts.items() if values
    )  # fmt: skip
    devices = ", ".join(sorted({str(record["device"]) for record in found}))
    seeds = ", ".join(map(str, sorted({int(record["seed"]) for record in found})))
    trained = {tuple(sorted(record["digests"].items())): float(record["training_seconds"]) for record in found}
    return (
        f"Test images: {images}. Seeds: {seeds}. Device: {devices}. Measuring took "
        f"{sum(float(record['wall_seconds']) for record in found) / 60:.1f} minutes; the longest training behind a "
        f"cell {max(trained.values()) / 60:.1f} minutes.{_turned_away(found)}\n"
    )


def _turned_away(found: list[dict[str, Any]]) -> str:
    """What defences with detectors reach where an attacked image that is turned away counts as handled."""
    handled: dict[str, list[float]] = {}
    for record in found:
        if record["attack"] != "clean" and record.get("rejected"):
            handled.setdefault(record["column"], []).append(float(record["right_or_rejected"]))
    return "".join(
        f" Under attack {statistics.fmean(values):.2f} % are right or turned away by the detectors of "
        f"{COLUMN_TITLES[column]} (mean of {len(values)} cells)."
        for column, values in handled.items()
    )
