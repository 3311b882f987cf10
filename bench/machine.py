"""What the figures were measured on, and whether anything else was running at the time."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("defense-vae-fast", "numpy", "openvino", "torch", "triton", "tensorrt", "pytest-benchmark")
IDLE_CORES = 0.1  # others may use this much of a core on a machine that still counts as idle
SAMPLE_SECONDS = 1.0
_ROOT = Path(__file__).resolve().parents[1]
_STAT = Path("/proc/stat")


def describe() -> dict[str, Any]:
    """Processor, cores, GPUs, operating system, library versions, commit and date; None for what is not known."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": cores(),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()) or 'unknown C library'}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def commit() -> str | None:
    """Commit of the checkout, with "-dirty" where the working tree differs from it; None outside a git checkout."""
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def cpu_name() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Name and driver of each NVIDIA GPU."""
    listing = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return listing.splitlines() if listing else []


class OthersWatch:
    """CPU time that other processes use, in cores: in a sample before the first measurement and over the whole run.

    Linux only; elsewhere both are None ("not measured").
    """

    def __init__(self, sample_seconds: float = SAMPLE_SECONDS) -> None:
        start = _Clock.read()
        time.sleep(sample_seconds)
        self._start = _Clock.read()
        self.before = _others(start, self._start)
        self.load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def during(self) -> float | None:
        """Average since the sample; children count as our own once they have been waited for."""
        return _others(self._start, _Clock.read())

    def report(self) -> dict[str, Any]:
        """For the record: ``idle`` is None where nothing could be measured."""
        during = self.during()
        known = [value for value in (self.before, during) if value is not None]
        return {
            "others_cores_before": self.before,
            "others_cores_during": during,
            "load_average_before": self.load_before,
            "idle": max(known) <= IDLE_CORES if known else None,
        }


class _Clock:
    """Seconds of wall time, of everyone's CPU time (None: unknown), of our own with that of waited-for children."""

    def __init__(self, wall: float, everyone: float | None, own: float) -> None:
        self.wall, self.everyone, self.own = wall, everyone, own

    @classmethod
    def read(cls) -> _Clock:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return cls(time.monotonic(), busy_seconds(_STAT), own)


def busy_seconds(stat: Path) -> float | None:
    """CPU time spent since boot on anything but idling and waiting for disks; None without ``/proc/stat``."""
    try:
        fields = stat.read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _others(start: _Clock, end: _Clock) -> float | None:
    if start.everyone is None or end.everyone is None:
        return None
    # The two clocks tick in hundredths of a second on their own, so their difference can fall a little below zero.
    return max(0.0, (end.everyone - start.everyone) - (end.own - start.own)) / (end.wall - start.wall)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
