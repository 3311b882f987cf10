"""The paper's own numbers, packaged."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

# Ours on the left: the JPEG copy of CIFAR-10 is compared with the paper's CIFAR-10, and named as a copy everywhere.
_DATASETS = {"cifar10_jpeg": "cifar10"}
_TABLES = {
    "1": "table1_white_box", "2": "table2_untrained_attack", "3": "table3_black_box",
    "4": "table4_seconds_per_1000_images", "7": "table7_white_box", "8": "table8_black_box",
}  # fmt: skip


@cache
def _tables() -> dict[str, Any]:
    return dict(json.loads(resources.files("training").joinpath("paper_tables.json").read_text()))


def paper_rows(table: str) -> list[dict[str, Any]]:
    """The rows of a table by its number: accuracies in percent, times in seconds.

    Raises:
        ValueError: the paper has no such table of results.
    """
    if table not in _TABLES:
        raise ValueError(f"table: expected one of {', '.join(_TABLES)}, got {table}")
    return list(_tables()[_TABLES[table]])


def paper_value(table: str, column: str, **row: Any) -> float | None:
    """A cell of the paper, None where it has none.

    Args:
        table: its number.
        column: its name in ``paper_tables.json``.
        row: what tells the row: ``dataset`` (by our name), ``attack``, ``classifier``, ``substitute``, ``L``, ``R``.
    """
    wanted = {**row, "dataset": _DATASETS.get(row["dataset"], row["dataset"])} if "dataset" in row else row
    for found in paper_rows(table):
        if all(found.get(key) == value for key, value in wanted.items() if value):
            value = found.get(column)
            return None if value is None else float(value)
    return None
