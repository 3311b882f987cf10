"""Rows of timings, and what follows from them: percentiles, the fit, the ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Group = Literal[
    "startup", "matmul", "copy", "bandwidth", "engine", "device", "released", "search", "stream", "kernel", "step",
    "paper", "forms", "timeline", "frames", "serving",
]  # fmt: skip

P99_CALLS = 100  # fewer calls than this have no 99th percentile worth printing
REFERENCE_SEARCH = (200, 10)  # Defense-GAN's recommended L and R


@dataclass(frozen=True)
class Row:
    """One benchmark: what was timed and the seconds that each call took.

    Attributes:
        group: kind of measurement.
        name: what was timed.
        batch: images in one call (1 where no image is involved).
        seconds: wall time of each call, warm-up left out.
        details: precision, image kind, steps, restarts, errors and whatever else describes the measurement.
    """

    group: Group
    name: str
    batch: int
    seconds: tuple[float, ...]
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"Row.batch: expected at least 1, got {self.batch}")
        if not self.seconds or not all(0 < value < math.inf for value in self.seconds):
            raise ValueError(f"Row.seconds: expected one or more positive times, got {self.seconds}")

    @property
    def p50(self) -> float:
        """Median seconds of an image."""
        return statistics.median(self.seconds) / self.batch

    @property
    def p99(self) -> float | None:
        """99th percentile (nearest rank) of the seconds of an image; None where too few calls were made."""
        if len(self.seconds) < P99_CALLS:
            return None
        return sorted(self.seconds)[math.ceil(0.99 * len(self.seconds)) - 1] / self.batch

    def to_dict(self) -> dict[str, Any]:
        """For the JSON record: every time, and what is derived from them."""
        derived = {"p50_per_image": self.p50, "p99_per_image": self.p99, "images_per_second": 1 / self.p50}
        plain = {"group": self.group, "name": self.name, "batch": self.batch, "details": self.details}
        return {**plain, **derived, "seconds": list(self.seconds)}


class Fit(NamedTuple):
    """Least squares of seconds an image against L x R: ``intercept + slope * (L x R)``."""

    intercept: float
    slope: float
    r_squared: float
    exponent: float
    """Slope of log seconds against log (L x R): 1 for O(L x R)."""


def fit(work: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fit a line, and a power law beside it.

    Raises:
        ValueError: fewer than three points, or fewer than two different values of ``work``.
    """
    if len(work) != len(seconds) or len(work) < 3 or len(set(work)) < 2:
        found = f"{len(work)} with L x R in {sorted(set(work))}"
        raise ValueError(f"fit: expected three or more points at different L x R, got {found}; measure more cells")
    slope, intercept = statistics.linear_regression(work, seconds)
    mean = statistics.fmean(seconds)
    residual = sum((y - intercept - slope * x) ** 2 for x, y in zip(work, seconds, strict=True))
    total = sum((y - mean) ** 2 for y in seconds)
    exponent = statistics.linear_regression([math.log(x) for x in work], [math.log(y) for y in seconds]).slope
    return Fit(intercept, slope, 1 - residual / total if total else 1.0, exponent)


def search_work(row: Row) -> int:
    """L x R of a search row."""
    return int(row.details["steps"]) * int(row.details["restarts"])


class Results:
    """All rows of a session, and what follows from them."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)

    def add(self, row: Row) -> None:
        """Take another row."""
        self.rows.append(row)

    def of(self, group: Group) -> list[Row]:
        """Rows of one group, in the order of measurement."""
        return [row for row in self.rows if row.group == group]

    def search_devices(self) -> list[str]:
        """Devices that the search ran on."""
        return sorted({str(row.details["device"]) for row in self.of("search")})

    def searches(self, device: str = "cpu") -> list[Row]:
        """Search rows of one device."""
        return [row for row in self.of("search") if row.details["device"] == device]

    def search_fit(self, device: str = "cpu") -> Fit | None:
        """The fit over a device's search rows; None where there are too few."""
        rows = self.searches(device)
        work = [search_work(row) for row in rows]
        return fit(work, [row.p50 for row in rows]) if len(rows) >= 3 and len(set(work)) > 1 else None

    def reference_search(self, device: str = "cpu") -> Row | None:
        """The search at the recommended L and R on a device."""
        rows = self.searches(device)
        return next((r for r in rows if (r.details["steps"], r.details["restarts"]) == REFERENCE_SEARCH), None)

    def fastest(self) -> list[Row]:
        """The fastest engine on each device at each batch size, smallest batch first."""
        best: dict[tuple[str, int], Row] = {}
        for row in sorted(self.of("engine"), key=lambda row: row.p50):
            best.setdefault((str(row.details["device"]), row.batch), row)
        return [best[key] for key in sorted(best)]

    def released(self, batch: int, device: str = "cpu", *, warm: bool = True) -> Row | None:
        """The released module at a batch size on a device."""
        rows = (row for row in self.of("released") if row.batch == batch and row.details["device"] == device)
        return next((row for row in rows if row.details["warm_allocator"] is warm), None)

    def matmul_rate(self, precision: str, device: str = "cpu") -> float | None:
        """Floating-point operations a second of the matrix product, where it was measured."""
        for row in self.of("matmul"):
            if (row.details["precision"], row.details["device"]) == (precision, device):
                return float(row.details["flop"]) / row.p50
        return None

    def ratios(self, row: Row) -> dict[str, float | None]:
        """How many times faster per image ``row`` is than others on its device; its share of the matrix product's rate.

        None stands for what was not measured.
        """
        device = row.details.get("device", "")
        search, warm = self.reference_search(device), self.released(row.batch, device)
        cold = self.released(row.batch, device, warm=False)
        rate = self.matmul_rate(row.details.get("precision", ""), device)
        flop = row.details.get("flop_per_image")
        return {
            "to_defense_gan": search.p50 / row.p50 if search else None,
            "to_released_warm": warm.p50 / row.p50 if warm else None,
            "to_released_cold": cold.p50 / row.p50 if cold else None,
            "share_of_matmul_rate": flop / row.p50 / rate if flop and rate else None,
        }

    def record(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Everything, for the JSON file."""
        fits = {device: self.search_fit(device) for device in self.search_devices()}
        return {
            "machine": machine,
            "fits": {device: line._asdict() for device, line in fits.items() if line},
            "rows": [{**row.to_dict(), "ratios": self.ratios(row)} for row in self.rows],
        }
