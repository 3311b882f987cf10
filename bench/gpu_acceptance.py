"""All GPU tests and all GPU benchmarks of this checkout, in under nine minutes, into one JSON file.

    python bench/gpu_acceptance.py [--out FILE] [--seconds 520] [--quick]

Nothing need be installed but what the parts themselves need: a part whose packages are missing is skipped and the file
says why. Whatever is marked ``gpu`` in tests/ and bench/ is run, each file in a process of its own, so that one that
hangs, dies or loses its CUDA context takes nothing with it: the tests side by side where they can, then the benchmarks,
one after another. The file is written again after every part.

Exit codes: 0 everything that ran passed; 1 something failed or ran out of time; 2 there is no GPU, or nothing ran.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SECONDS = 520.0
COLLECT_SECONDS = 90.0
PART_SECONDS = 240.0
GRACE_SECONDS = 3.0  # of a part's time, to report what it has so far
# What matters most, should time run out.
FIRST = (
    "tests/test_gpu.py", "tests/test_folded.py", "tests/test_region_kernels.py", "bench/test_gpu.py",
    "bench/test_matmul.py", "bench/test_gpu_baselines.py", "tests/test_distributed.py",
)  # fmt: skip
ALONE = ("tests/test_gpu.py",)  # it watches the device's free memory
OK, FAILED, NOTHING = 0, 1, 2


def main() -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu_acceptance.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:.0f})")
    parser.add_argument("--quick", action="store_true", help="few rounds: a trial, not a measurement")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    report: dict[str, Any] = {"machine": _safely(_machine), "gpus": _safely(_gpus), "parts": [], "rows": []}
    if not isinstance(report["gpus"], list) or not report["gpus"]:
        report["gpu"] = "there is no GPU here, so nothing was measured; this lists what would have run"
    files, problem = _collect(min(COLLECT_SECONDS, arguments.seconds / 2))
    report["collected"], report["collection"] = files, problem
    _write(arguments.out, report)
    if "gpu" in report:
        print(f"{report['gpu']}: {len(files)} files; {problem}")
        print(f"written to {arguments.out}")
        return NOTHING

    def run(path: str) -> dict[str, Any]:
        left = deadline - time.monotonic()
        return _run(path, min(PART_SECONDS, left), arguments.quick) if left > 10 else {"outcome": "no time was left"}

    def keep(path: str, part: dict[str, Any]) -> None:
        report["rows"] += part.pop("rows", [])
        report["parts"].append({"file": path, **part})
        report["judged"] = _safely(lambda: judge(report["rows"]))
        _write(arguments.out, report)
        print(f"{path}: {part['outcome']}", flush=True)

    files.sort(key=lambda path: (FIRST.index(path) if path in FIRST else len(FIRST), path))
    together = [path for path in files if path not in ALONE and not path.startswith("bench")]
    for path in filter(ALONE.__contains__, files):
        keep(path, run(path))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for path, part in zip(together, pool.map(run, together), strict=True):
            keep(path, part)
    for path in filter(lambda path: path.startswith("bench"), files):
        keep(path, run(path))
    report["timeline"] = _safely(lambda: _draw_timeline(arguments.out.with_suffix(".timeline.png"), report["rows"]))
    _write(arguments.out, report)
    print(json.dumps(report.get("judged"), indent=1))
    print(f"written to {arguments.out}")
    outcomes = [part["outcome"] for part in report["parts"]]
    if not outcomes or all(outcome == "skipped" for outcome in outcomes):
        return NOTHING
    return OK if all(outcome in ("passed", "skipped") for outcome in outcomes) else FAILED


def _draw_timeline(path: Path, rows: list[dict[str, Any]]) -> str | None:
    """Draw what the events have shown beside the record; the picture's name, or None where there is nothing to draw."""
    from bench import timeline

    return path.name if timeline.draw(path, timeline.of_rows(rows)) else None


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the GPU engines are judged by; None for what was not measured."""
    device = [row for row in rows if row["group"] == "device"]
    ours = [row for row in device if not row["name"].startswith(("eager", "torch.compile", "Defense-GAN"))]
    host = [row for row in rows if row["group"] == "engine" and row["details"].get("device") == "cuda"]
    alone = [row for row in host if row["name"].endswith("engine alone")]

    def best(candidates: list[dict[str, Any]], batch: int | None = None) -> dict[str, Any] | None:
        fitting = [row for row in candidates if batch is None or row["batch"] == batch]
        return min(fitting, key=lambda row: float(row["p50_per_image"]), default=None)

    def named(start: str, batch: int | None = None) -> dict[str, Any] | None:
        return best([row for row in device if row["name"].startswith(start)], batch)

    def seconds(row: dict[str, Any] | None) -> float | None:
        return float(row["p50_per_image"]) if row else None

    def ratio(slow: dict[str, Any] | None, fast: dict[str, Any] | None) -> float | None:
        return float(slow["p50_per_image"]) / float(fast["p50_per_image"]) if slow and fast else None

    one, large = best(ours, 1), best(ours)
    big = large["batch"] if large else None
    single, batched = named("Defense-GAN", 1), named("Defense-GAN")
    by_streams = {
        (row["name"].partition(",")[0], row["details"]["streams"]): row for row in host if "streams" in row["details"]
    }
    gains = {
        name: {str(n): ratio(by_streams.get((name, 1)), by_streams.get((name, n))) for n in (2, 4)}
        for name in {name for name, _ in by_streams}
    }
    forms = {(row["name"], row["batch"]): row for row in rows if row["group"] == "forms"}
    plain, chosen = (f"torch, {kind} forms" for kind in ("plain", "chosen"))
    hidden: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["group"] == "timeline":
            details = row["details"]
            hidden.setdefault(details["engine"], {})[str(details["streams"])] = details["overlap"]["share"]
    return {
        "engine at batch 1": one["name"] if one else None,
        "engine at its best batch": f"{large['name']}, {big}" if large else None,
        "batch 1 on the device, p50 in us": _times(seconds(one), 1e6),
        "batch 1 host to host, engine alone, p50 in us": _times(seconds(best(alone, 1)), 1e6),
        "images/s from device memory": 1 / seconds(large) if large else None,  # type: ignore[operator]
        "x eager fp32 at batch 1": ratio(named("eager fp32", 1), one),
        "x eager fp32 at its best batch": ratio(named("eager fp32"), large),
        "x torch.compile max-autotune at batch 1": ratio(named("torch.compile", 1), one),
        "x torch.compile max-autotune at its best batch": ratio(named("torch.compile"), large),
        "x Defense-GAN one image at a time": ratio(single, large),
        "x Defense-GAN at its best batch": ratio(batched, large),
        "x one stream, host to host, by streams": gains,
        "share of copies or computing that hides behind the other, by streams": hidden,
        "torch, x layers in plain form, by batch": {
            str(batch): ratio(forms[plain, batch], row)
            for (name, batch), row in forms.items()
            if name == chosen and (plain, batch) in forms
        },
        "roofline": _roofline(rows, large),
    }


def _roofline(rows: list[dict[str, Any]], row: dict[str, Any] | None) -> dict[str, float] | None:
    """Time that the measured matrix rate and copy bandwidth allow an image, and the share of it that is reached."""
    rates = [
        r
        for r in rows
        if r["group"] == "matmul" and r["details"]["device"] == "cuda" and r["details"]["precision"] == "fp16"
    ]
    copies = [r for r in rows if r["group"] == "copy" and "within" in r["name"]]
    if not (row and rates and copies):
        return None
    flops = rates[0]["details"]["flop"] / rates[0]["p50_per_image"]
    bandwidth = copies[0]["details"]["bytes"] / copies[0]["p50_per_image"]
    arithmetic = row["details"]["flop_per_image"] / flops
    memory = row["details"]["bytes_per_image"] / bandwidth
    return {
        "matrix FLOP/s": flops,
        "copy bytes/s": bandwidth,
        "seconds an image by arithmetic": arithmetic,
        "seconds an image by memory": memory,
        "share reached": max(arithmetic, memory) / row["p50_per_image"],
    }


def _collect(seconds: float) -> tuple[list[str], str]:
    """Files of tests/ and bench/ with anything marked gpu, and what pytest said of those that it could not read."""
    code, output = _pytest(["--collect-only", "-q", "--continue-on-collection-errors", "tests", "bench"], seconds)
    files = sorted(
        {line.partition("::")[0] for line in output.splitlines() if "::" in line and line[:5] in ("tests", "bench")}
    )
    errors = [line for line in output.splitlines() if line.startswith("ERROR ")]
    if not files:
        return [], f"pytest found nothing (exit code {code}): {output[-500:]}"
    return files, "; ".join(errors) or "every file was read"


def _run(path: str, seconds: float, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = [path, f"--junitxml={folder}/junit.xml", "-q"]
        if path.startswith("bench"):
            words += ["--benchmark-only", f"--bench-out={folder}", *(["--bench-quick"] if quick else [])]
        start = time.monotonic()
        code, output = _pytest(words, seconds)
        part = {**_tests(Path(folder) / "junit.xml"), "seconds": round(time.monotonic() - start, 1), "exit_code": code}
        rows = _safely(lambda: json.loads((Path(folder) / "latest.json").read_text())["rows"])
    counts = part.get("counts", {})
    if code is None:
        outcome = f"stopped after {seconds:.0f} s"
    elif code == 0:
        outcome = "passed" if counts.get("passed") else "skipped"
    elif code == 5:
        outcome = "skipped"
    else:
        outcome = "failed"
    if outcome not in ("passed", "skipped"):
        part["output"] = output[-4000:]
    return {"outcome": outcome, **part, "rows": rows if isinstance(rows, list) else []}


def _pytest(words: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit code and output; None when it had to be stopped."""
    from bench.process import run_limited

    # pytest-benchmark's own --strict options are not ours.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *words]
    # Interrupted, pytest still reports what it has; killed, it leaves nothing.
    code, output, stopped = run_limited(command, seconds - GRACE_SECONDS, cwd=ROOT, grace=GRACE_SECONDS)
    return None if stopped else code, output


def _tests(path: Path) -> dict[str, Any]:
    """Counts by outcome, and the reasons of what did not pass, from a JUnit file."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}
    counts = {"passed": 0, "skipped": 0, "failed": 0}
    reasons: dict[str, list[str]] = {"skipped": [], "failed": []}
    for case in cases:
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        counts[outcome] += 1
        if bad is not None:
            message = bad.get("message", "")[:300]
            reasons[outcome].append(message if outcome == "skipped" else f"{case.get('name')}: {message}")
    return {"counts": counts, "skipped": sorted(set(reasons["skipped"])), "failed": reasons["failed"]}


def _machine() -> dict[str, Any]:
    from bench import machine

    return machine.describe()


def _gpus() -> list[dict[str, Any]]:
    from defense_vae_fast import cuda

    return [device._asdict() for device in cuda.devices()]


def _safely(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or its error as text: one missing package must not cost the rest."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1, default=str) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
