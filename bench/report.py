"""The closing report: tables and JSON made of rows; nothing here measures anything."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.load import STEADY
from bench.rows import Results, Row
from defense_vae_fast.atomic import replacing
from training.paper import paper_rows


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the record, replacing an earlier one only when the new one is complete."""
    with replacing(path) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")


def lines(results: Results, machine: dict[str, Any]) -> list[str]:
    """The closing report, one string a line."""
    return [
        *_machine_lines(machine),
        *_startup_lines(results),
        "",
        *_table(results),
        "",
        *_search_lines(results),
        *_paper_lines(results),
        *_best_lines(results),
        "",
        *_stream_lines(results),
        *serving_lines(results),
        *gpu_lines(results),
    ]


def _machine_lines(machine: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    load = machine["load"]
    shown = [
        f"{machine['cpu']}, {machine['cores']} cores; {machine['system']}; GPU: {'; '.join(machine['gpus']) or 'none'}",
        f"Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}; {machine['date']}",
        f"checkpoint {machine['checkpoint']}",
    ]
    if load["idle"] is None:
        return [*shown, "whether the machine was idle was not measured: /proc/stat is missing here"]
    use = (
        f"other processes used {load['others_cores_before']:.2f} cores before the run and "
        f"{load['others_cores_during']:.2f} during it (load average before: {load['load_average_before']:.2f})"
    )
    if load["idle"]:
        return [*shown, f"the machine was idle: {use}"]
    warning = "THE MACHINE WAS NOT IDLE, so these figures are not to be trusted"
    return [*shown, f"{warning}: {use}; two OpenMP programs on two cores slow each other a hundredfold"]


def _startup_lines(results: Results) -> list[str]:
    return [f"{row.name}: {duration(row.p50)} (median of {len(row.seconds)})" for row in results.of("startup")]


def _table(results: Results) -> list[str]:
    header = ["per image", "batch", "p50", "p99", "images/s", "x Defense-GAN", "x released", "x cold", "share"]
    body = []
    for row in [*results.of("engine"), *results.of("device"), *results.of("released"), *results.of("search")]:
        ratios = results.ratios(row)
        times = [ratios["to_defense_gan"], ratios["to_released_warm"], ratios["to_released_cold"]]
        share = ratios["share_of_matmul_rate"]
        measured = [duration(row.p50), duration(row.p99), number(1 / row.p50), *map(number, times)]
        body.append([row.name, str(row.batch), *measured, percent(share)])
    rates = [f"{row.name}: {row.details['flop'] / row.p50 / 1e9:,.0f} GFLOP/s" for row in results.of("matmul")]
    legend = [
        "x Defense-GAN: times faster per image than its search at L=200, R=10; x released, x cold: than the released",
        "eager fp32 module at the same batch, with the allocator warm and as a program normally starts; share: of the",
        "matrix product's rate in the same precision; all on the same device; -: not measured.",
    ]
    return [*columns([header, *body]), *rates, *legend]


def _search_lines(results: Results) -> list[str]:
    shown = []
    for device in results.search_devices():
        line = results.search_fit(device)
        if line is not None:
            shown.append(
                f"Defense-GAN's search, {device}: seconds an image = {line.intercept:.3g} + {line.slope:.3g} x L x R, "
                f"R^2 = {line.r_squared:.4f}; as a power law (L x R)^{line.exponent:.2f}"
            )
    if not shown:
        return ["Defense-GAN's search: not measured at enough points for a fit"]
    return [*shown, "(its generator has random weights here: time does not depend on them)"]


def _paper_lines(results: Results) -> list[str]:
    """The paper's Table 4, as far as it was measured."""
    paper = {(row.get("L"), row.get("R")): float(row["seconds"]) for row in paper_rows("4")}
    body = []
    for device in results.search_devices():
        for row in results.searches(device):
            own = paper.get((row.details["steps"], row.details["restarts"]))
            if own is not None:
                body.append([row.name, number(1000 * row.p50), number(own)])
        modules = [row for row in results.of("released") if row.details["device"] == device]
        engines = [row for row in results.fastest() if row.details["device"] == device]
        for rows, own_text in ((modules, number(paper[None, None])), (engines, "-")):
            if body and rows:
                best = min(rows, key=lambda row: row.p50)
                body.append([f"{best.name}, batch {best.batch}", number(1000 * best.p50), own_text])
    if not body:
        return []
    return ["", *columns([["the paper's Table 4: seconds for 1,000 images", "here", "paper, Titan Xp"], *body]), ""]


def _best_lines(results: Results) -> list[str]:
    shown = []
    for row in results.fastest():
        ratios = results.ratios(row)
        shown.append(
            f"Defense-VAE, constant, batch {row.batch}: {duration(row.p50)} an image ({row.name}), "
            f"{number(ratios['to_released_warm'])} x the released module, "
            f"{percent(ratios['share_of_matmul_rate'])} of the matrix product's rate, "
            f"{number(ratios['to_defense_gan'])} x Defense-GAN at L=200, R=10"
        )
    return shown


def _stream_lines(results: Results) -> list[str]:
    rows = results.of("stream")
    if not rows:
        return ["live streams: not measured"]
    shown = [f"live streams, {rows[0].details['engine']} engine in {rows[0].details['precision']}:"]
    for row in rows:
        if row.details["test"] in ("load", "own capacity", "cameras"):
            continue
        if row.details["test"] == "eighty percent":
            shares = row.details["shares_of_bound"]
            times = f"{duration(min(row.seconds))} to {duration(max(row.seconds))}"
            shown.append(
                f"{row.name}: p99 {statistics.median(shares):.2f} of its bound, the median of {len(shares)} runs "
                f"({min(shares):.2f} to {max(shares):.2f}; {times}), "
                f"{percent(sum(row.details['dropped']) / sum(row.details['frames']))} dropped"
            )
            continue
        line = f"{row.name}: {duration(row.p50)} a frame (median of {len(row.seconds)})"
        if "extra_seconds" in row.details:
            line += f", {1e6 * row.details['extra_seconds']:+.0f} us"
        if "share_of_calls" in row.details:
            line += f", {percent(row.details['share_of_calls'])} of the throughput of calls"
        shown.append(line)
    header = [
        "open-loop load",
        "arrivals",
        "sources",
        "load",
        "in/s",
        "out/s",
        "dropped",
        "p50",
        "p99",
        "p99.9",
        "bound",
    ]
    body = []
    for row in rows:
        told = row.details
        if told["test"] in ("load", "own capacity", "cameras"):
            rates = [number(told["offered_per_second"]), number(told["out_per_second"])]
            times = [duration(row.p50), duration(told["p99"]), duration(told["p999"])]
            within = "" if told["p99"] <= told["bound"] else " missed"
            if abs(told["full_batch_change"]) > STEADY:
                within += f", the machine {1 / (1 + told['full_batch_change']) - 1:+.0%}"
            body.append(
                [told["contestant"], told["arrivals"], str(told["sources"]), percent(told["load"]), *rates,
                 percent(told["dropped"] / told["frames"]), *times, duration(told["bound"]) + within]
            )  # fmt: skip
    legend = [
        "latency from the moment a frame was due to arrive; load: of the frames/s of calls with full batches of 64 in",
        "the same run; bound: of p99, four full batches and the stream's delay, twice that beyond 100 %; the machine:",
        "change of its speed from right before to right after, if more than a tenth even in the last of four runs.",
        "The last rows: the stream alone, at 80 % of what it manages itself and for sixteen cameras.",
    ]
    return [*shown, *(columns([header, *body]) if body else []), *legend]


def serving_lines(results: Results) -> list[str]:
    """Requests a second of a server with and without batching: nothing where that was not measured."""
    header = ["server", "clients", "requests/s", "gain", "images a batch", "p50", "p99"]
    body = [
        [
            row.name, str(row.details["clients"]), number(row.details["requests_per_second"]),
            number(row.details["gain"]), number(row.details["images_per_batch"]), duration(row.p50),
            duration(row.details["p99"]),
        ]
        for row in results.of("serving")
    ]  # fmt: skip
    if not body:
        return []
    return ["", *columns([header, *body]), "gain: requests/s over those without dynamic batching, blocks in turns"]


def gpu_lines(results: Results) -> list[str]:
    """Kernels and training steps on a GPU: nothing where they were not measured."""
    shown = [f"{row.name}: {row.details['bytes_per_second'] / 1e9:,.0f} GB/s" for row in results.of("bandwidth")]
    kernels = results.of("kernel")
    if kernels:
        header = [
            "BatchNorm + ReLU",
            "batch",
            "pass",
            "launch",
            "a call",
            "of copy",
            "x eager",
            "x compiled",
            "fastest",
        ]
        shown += ["", *columns([header, *(_kernel_row(row, kernels) for row in kernels)])]
        shown.append("of copy: bytes of two passes a second, as a share of the copy's; x: times as fast as that form")
    steps = results.of("step")
    if steps:
        header = ["training step", "batch", "launch", "a step", "images/s", "x eager"]
        shown += ["", *columns([header, *(_step_row(row, steps) for row in steps)])]
    for row in results.of("paper"):
        if row.details.get("projected"):
            shown += [
                "",
                f"{row.name}: a projection, {duration(row.details['total_seconds'])}, of which pairs "
                f"{duration(row.details['pairs_seconds'])} and {row.details['steps']:,} steps of "
                f"{duration(row.details['step_seconds'])} ({row.details['images_per_second']:,.0f} images/s) "
                f"{duration(row.details['training_seconds'])}",
            ]
    return shown


def _kernel_row(row: Row, rows: Sequence[Row]) -> list[str]:
    own = row.details
    peers = {
        other.details["form"]: other.p50
        for other in rows
        if other.batch == row.batch
        and all(other.details[key] == own[key] for key in ("layer", "backward", "graph"))
    }  # fmt: skip
    times = [peers[form] / row.p50 if form in peers else None for form in _KERNEL_BASELINES]
    return [
        row.name, str(row.batch), "both" if own["backward"] else "forward", "graph" if own["graph"] else "calls",
        duration(row.p50 * row.batch), percent(own["share_of_copy"]), *map(number, times),
        "yes" if row.p50 == min(peers.values()) else "no",
    ]  # fmt: skip


_KERNEL_BASELINES = ("torch channels_last", "compiled channels_last")


def _step_row(row: Row, rows: Sequence[Row]) -> list[str]:
    eager = next(
        (
            other for other in rows
            if (other.details["form"], other.details["graph"]) == ("torch", False)
            and (other.batch, other.details["precision"]) == (row.batch, row.details["precision"])
        ),
        None,
    )  # fmt: skip
    return [
        row.name, str(row.batch), "graph" if row.details["graph"] else "calls", duration(row.p50 * row.batch),
        f"{1 / row.p50:,.0f}", number(eager.p50 / row.p50 if eager else None),
    ]  # fmt: skip


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, the others to the right; the first row is underlined."""
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    return [text[0], "-" * len(text[0]), *text[1:]]


def duration(seconds: float | None) -> str:
    """Seconds with a fitting unit and three digits; "-" for None."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size * 0.9995:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def number(value: float | None) -> str:
    """Three significant digits, thousands apart, without an exponent; "-" for None."""
    return "-" if value is None else _three_digits(value)


def percent(share: float | None) -> str:
    """A share as a percentage; "-" for None."""
    return "-" if share is None else f"{share:.0%}"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    # Rounded first: 9.996 has one digit before the point, but is shown as 10.0.
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.2e}")))))
    return f"{value:,.{decimals}f}"
