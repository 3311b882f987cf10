"""Cells of the paper's tables, and the JSON record that each leaves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from defense_vae_fast.atomic import replacing
from training.attacks import PAPER_TEST_ATTACKS
from training.classifiers import PAPER_CLASSIFIERS, paper_classifiers

TABLES = ("1", "2", "3", "4", "7", "8")
DEFENCES = ("defense_vae", "defense_vae_rec", "defense_vae_e2e", "defense_gan", "magnet", "adv_training", "pooled")
# Run only when asked for by name: the paper says that it comes close to fine-tuning, and reports the latter.
FROM_SCRATCH = "defense_vae_e2e_scratch"
TRAINED_ON_ATTACKS = ("defense_vae", "defense_vae_rec", "defense_vae_e2e", FROM_SCRATCH, "pooled", "adv_training")
_WHITE_BOX: dict[str, dict[str, tuple[str, ...]]] = {
    table: {dataset: paper_classifiers(dataset) for dataset in datasets}
    for table, datasets in (("1", ("fashion_mnist", "mnist")), ("7", ("celeba", "cifar10_jpeg")))
}
_BLACK_BOX: dict[str, dict[str, list[tuple[str, str]]]] = {
    "3": {"fashion_mnist": [(c, s) for c in PAPER_CLASSIFIERS for s in ("B", "E")],
          "mnist": [(c, s) for c in PAPER_CLASSIFIERS for s in ("B", "E")]},
    "8": {"cifar10_jpeg": [("C", "E"), ("D", "E")]},
}  # fmt: skip
SEARCHES = ((200, 10), (400, 10), (200, 20), (400, 20))


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        table: the paper's number of the table.
        dataset: our name of the data set.
        column: what defends, by the name of the paper's column in ``paper_tables.json``.
        attack: ``clean``, or an attack's name; "" in Table 4.
        classifier: the attacked classifier; "" in Table 4.
        substitute: of the black-box attack; "" elsewhere.
        search: Defense-GAN's L and R in Table 4, as "200x10"; "" elsewhere.
    """

    table: str
    dataset: str
    column: str
    attack: str = ""
    classifier: str = ""
    substitute: str = ""
    search: str = ""

    @property
    def row(self) -> tuple[str, str, str, str]:
        """What tells the row from the table's other rows."""
        return (self.attack, self.classifier, self.substitute, self.search)

    @property
    def training(self) -> str:
        """What its purifier is trained on: ``three``, ``without_NAME`` or ``without_NAME_plus_deepfool``."""
        ending = {"trained_on_other_two": "", "plus_deepfool": "_plus_deepfool"}.get(self.column)
        return "three" if ending is None else f"without_{self.attack}{ending}"

    def command(self, scale: str, seed: int) -> str:
        """The command that measures this cell again."""
        options = {
            "--scale": scale, "--seed": str(seed), "--dataset": self.dataset, "--column": self.column,
            "--attack": self.attack, "--classifier": self.classifier, "--substitute": self.substitute,
            "--search": self.search,
        }  # fmt: skip
        named = [part for key, value in options.items() if value for part in (key, value)]
        return shlex.join(["python", "-m", "training", "table", self.table, *named, "--again"])

    def path(self, records: Path, scale: str, seed: int) -> Path:
        """Where its record lies."""
        parts = [self.dataset, *(part for part in self.row if part), self.column, f"seed{seed}"]
        return records / scale / f"table{self.table}" / f"{'-'.join(parts)}.json"


def cells(table: str) -> list[Cell]:
    """All cells of a table, those run only on request last.

    Raises:
        ValueError: there is no such table.
    """
    if table in _WHITE_BOX:
        attacks = ("clean", *PAPER_TEST_ATTACKS)
        return [
            Cell(table, dataset, column, attack, classifier)
            for dataset, classifiers in _WHITE_BOX[table].items()
            for classifier in classifiers
            for column in ("no_attack", "no_defense", *DEFENCES, FROM_SCRATCH)
            for attack in attacks
            # The clean accuracy of the bare classifier is the column "no attack" of every row.
            if attack != "clean" or column not in ("no_attack", "no_defense")
        ]
    if table in _BLACK_BOX:
        return [
            Cell(table, dataset, column, "fgsm", classifier, substitute)
            for dataset, pairs in _BLACK_BOX[table].items()
            for classifier, substitute in pairs
            for column in ("no_attack", "no_defense", *DEFENCES, FROM_SCRATCH)
        ]
    if table == "2":
        return [
            Cell(table, "fashion_mnist", column, attack, classifier)
            for attack in PAPER_TEST_ATTACKS
            for classifier in PAPER_CLASSIFIERS
            for column in ("trained_on_other_two", "plus_deepfool", "trained_on_three")
            if column != "plus_deepfool" or attack == "cw"
        ]
    if table == "4":
        searches = [
            Cell(table, "fashion_mnist", "defense_gan", search=f"{steps}x{starts}") for steps, starts in SEARCHES
        ]
        return [Cell(table, "fashion_mnist", "defense_vae"), Cell(table, "fashion_mnist", "purifier"), *searches]
    raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table}")


def select(every: Iterable[Cell], columns: Sequence[str] = (), **wanted: str | None) -> list[Cell]:
    """The cells whose fields have the wanted values; None wants any, and leaves out what is run only on request.

    Args:
        every: of these.
        columns: these alone, column after column in this order; empty for any.
        wanted: values by a field's name.

    Raises:
        ValueError: no cell is left, or none of one of the columns.
    """
    fitting = [
        cell for cell in every if all(value is None or getattr(cell, key) == value for key, value in wanted.items())
    ]  # fmt: skip
    found = []
    for column in columns or (None,):
        some = [cell for cell in fitting if (cell.column != FROM_SCRATCH if column is None else cell.column == column)]
        if not some:
            named = {"column": column, **wanted}
            asked = ", ".join(f"{key} {value}" for key, value in named.items() if value is not None)
            raise ValueError(f"table: expected a cell that it has, got none for {asked}; leave an option out")
        found += some
    return found


def write_record(path: Path, cell: Cell, record: dict[str, Any]) -> None:
    """Write a cell's record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps({**asdict(cell), **record}, indent=1, sort_keys=True).encode() + b"\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """A cell's record; None where the cell was not run.

    Raises:
        ValueError: the file is none.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        Cell(**{field.name: str(record[field.name]) for field in fields(Cell)})
        float(record["value"])
        int(record["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the record of a table's cell, got {error!r}; remove the file") from error
    return dict(record)
