"""When copies and computing ran, and how much of them side by side: arithmetic on intervals, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Stage = Literal["copy in", "compute", "copy out"]
STAGES: tuple[Stage, ...] = get_args(Stage)
COLOURS: dict[Stage, str] = {"copy in": "tab:blue", "compute": "tab:orange", "copy out": "tab:green"}

Interval = tuple[float, float]


class Span(NamedTuple):
    """One stage of one piece of a batch on one worker, in seconds from one origin."""

    worker: int
    piece: int
    stage: Stage
    start: float
    end: float


class Overlap(NamedTuple):
    """How much of a timeline ran side by side, in seconds."""

    copying: float
    """At least one copy, in either direction, was under way."""
    computing: float
    """At least one worker computed."""
    both: float
    """Both were so."""
    elapsed: float
    """From the first beginning to the last end."""
    share: float | None
    """``both`` as a share of the shorter of copying and computing, all of which could hide; None without one."""


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time in ascending intervals that neither overlap nor touch; empty ones are left out.

    Raises:
        ValueError: an end lies before its start, or is no number.
    """
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if not (math.isfinite(start) and math.isfinite(end)) or end < start:
            raise ValueError(f"interval: expected finite numbers with start <= end, got {start} to {end}")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return [(start, end) for start, end in merged if end > start]


def intersect(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """The points of time that lie in an interval of each."""
    ours, theirs, found = merge(first), merge(second), []
    while ours and theirs:
        start, end = max(ours[0][0], theirs[0][0]), min(ours[0][1], theirs[0][1])
        if start < end:
            found.append((start, end))
        # The one that ends first can meet nothing more.
        (ours if ours[0][1] <= theirs[0][1] else theirs).pop(0)
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Time in at least one of the intervals."""
    return math.fsum(end - start for start, end in merge(intervals))


def overlap(spans: Sequence[Span]) -> Overlap:
    """How much of the copies ran beside computing.

    Raises:
        ValueError: there is no span, or one ends before its start.
    """
    if not spans:
        raise ValueError("spans: expected at least one, got none")
    copies = [(span.start, span.end) for span in spans if span.stage != "compute"]
    computing = [(span.start, span.end) for span in spans if span.stage == "compute"]
    both = length(intersect(copies, computing))
    shorter = min(length(copies), length(computing))
    elapsed = max(span.end for span in spans) - min(span.start for span in spans)
    return Overlap(length(copies), length(computing), both, elapsed, both / shorter if shorter else None)


def draw(path: Path, timelines: Sequence[dict[str, Any]]) -> bool:
    """Write the timelines as PNG, one above the other, a line for each worker; False, and no file, without any.

    Args:
        path: of the picture.
        timelines: each has ``title`` and ``spans``, the latter as :class:`Span` or as JSON has left them.
    """
    if not timelines:
        return False
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    made = [(line["title"], [Span(*span) for span in line["spans"]]) for line in timelines]
    workers = [max(span.worker for span in spans) + 1 for _, spans in made]
    figure, panels = pyplot.subplots(
        len(made), 1, figsize=(10, 1.2 * len(made) + 0.35 * sum(workers) + 0.5), layout="constrained", squeeze=False,
        height_ratios=workers,
    )  # fmt: skip
    for axes, (title, spans), count in zip(panels[:, 0], made, workers, strict=True):
        origin = min(span.start for span in spans)
        for worker in range(count):
            here = [span for span in spans if span.worker == worker]
            bars = [(1e6 * (span.start - origin), 1e6 * (span.end - span.start)) for span in here]
            axes.broken_barh(
                bars, (worker - 0.4, 0.8), facecolors=[COLOURS[span.stage] for span in here], edgecolor="white", lw=0.3
            )
        axes.set(yticks=range(count), yticklabels=[f"worker {worker}" for worker in range(count)], title=title)
        axes.invert_yaxis()
    panels[-1, 0].set_xlabel("microseconds")
    handles = [Patch(color=COLOURS[stage], label=stage) for stage in STAGES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(STAGES), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def of_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What :func:`draw` takes, from the benchmarks' rows as their JSON record has them."""
    found = []
    for row in rows:
        if row["group"] == "timeline":
            share = row["details"]["overlap"]["share"]
            hidden = (
                "nothing to hide" if share is None else f"{share:.0%} of the shorter of copying and computing hidden"
            )
            found.append({"title": f"{row['name']}: {hidden}", "spans": row["details"]["spans"]})
    return found
