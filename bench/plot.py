"""Plots: seconds an image against L x R (the search's points and line, and our constant), and latency under load."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from bench.rows import Results, search_work


def draw(path: Path, results: Results) -> bool:
    """Write the plot as PNG; False, and no file, where the search was not measured at enough points for a fit."""
    line = results.search_fit()
    if line is None:
        return False
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    searches = results.searches()
    for restarts in sorted({row.details["restarts"] for row in searches}):
        rows = [row for row in searches if row.details["restarts"] == restarts]
        points = [search_work(row) for row in rows], [row.p50 for row in rows]
        axes.plot(*points, "o", label=f"Defense-GAN, R = {restarts}")
    work = sorted({search_work(row) for row in searches})
    label = f"fit {line.intercept:.2g} s + {line.slope:.2g} s x L x R, R² = {line.r_squared:.4f}"
    axes.plot(work, [line.intercept + line.slope * value for value in work], "-", color="grey", label=label)
    engines = [row for row in results.fastest() if row.details["device"] == "cpu"]  # as the search that is drawn
    for best, style in zip(engines, cycle(("-", "--", ":")), strict=False):
        label = f"Defense-VAE, {best.name}, batch {best.batch}"
        axes.axhline(best.p50, linestyle=style, color="black", label=label)
    axes.set(xscale="log", yscale="log", xlabel="L x R (gradient steps x restarts)", ylabel="seconds an image")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def draw_stream(path: Path, results: Results) -> bool:
    """Write p99 latency against load, a panel for each kind of arrivals; False, and no file, without such rows."""
    rows = [row for row in results.of("stream") if row.details["test"] == "load"]
    scenes = sorted({(row.details["arrivals"], row.details["sources"]) for row in rows})
    if not scenes:
        return False
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(scenes), figsize=(3.2 * len(scenes) + 1, 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, scene in zip(panels[0], scenes, strict=True):
        here = [row for row in rows if (row.details["arrivals"], row.details["sources"]) == scene]
        for name in dict.fromkeys(row.details["contestant"] for row in here):
            points = sorted(
                (row.details["load"], row.details["p99"]) for row in here if row.details["contestant"] == name
            )
            axes.plot(*zip(*points, strict=True), "o-", label=name)
        bounds = sorted((row.details["load"], row.details["bound"]) for row in here)
        axes.plot(*zip(*bounds, strict=True), ":", color="grey", label="bound of the stream")
        title = f"{scene[0]}, {scene[1]} source{'s' if scene[1] > 1 else ''}"
        axes.set(yscale="log", xlabel="load / capacity", title=title)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("p99 latency in seconds")
    panels[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
