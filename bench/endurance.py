"""A million purifications on one engine: ``python -m bench.endurance --engine tensorrt``.

The same batches of several sizes go through again and again. Every time their bytes must be those of the first time,
and the memory of this process and of the GPU may not have grown between a tenth of the images and the end. Exit code 1
where something is wrong, 5 where the engine cannot work here; the record is JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.report import write_json
from defense_vae_fast import Purifier
from defense_vae_fast.engines import EngineUnavailable

UNAVAILABLE = 5
BATCHES = (1, 7, 64, 256)
MEMORY_SLACK = 16 << 20  # bytes: the C library's arenas breathe


def gpu_memory() -> int | None:
    """Bytes in use on all GPUs; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return sum(int(line) << 20 for line in found.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def host_memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def endure(purifier: Purifier, count: int, seed: int = 0) -> dict[str, Any]:
    """Purify ``count`` images or a few more; what was seen."""
    channels, height, width = purifier.config.image_shape
    rng = np.random.default_rng(seed)
    batches = [rng.integers(0, 256, (size, height, width, channels), dtype=np.uint8) for size in BATCHES]

    def digest(batch: Any) -> int:
        purified, scores = purifier(batch, return_score=True)
        return zlib.crc32(scores.tobytes(), zlib.crc32(purified.tobytes()))

    first = [digest(batch) for batch in batches]
    done = wrong = 0
    settled: dict[str, int | None] = {}
    start = time.monotonic()
    for index in cycle(range(len(batches))):
        wrong += digest(batches[index]) != first[index]
        done += len(batches[index])
        if not settled and done * 10 >= count:
            settled = {"host": host_memory(), "gpu": gpu_memory()}
        if done >= count:
            break
    end = {"host": host_memory(), "gpu": gpu_memory()}
    growth = {
        name: None if before is None or (after := end[name]) is None else after - before
        for name, before in settled.items()
    }
    return {
        "images": done, "seconds": round(time.monotonic() - start, 1), "calls_with_other_bytes": wrong,
        "growth": growth, "grew": any(value is not None and value > MEMORY_SLACK for value in growth.values()),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the record, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--checkpoint", default="fashion_mnist", help="name or path")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest-endurance.json")
    options = parser.parse_args(arguments)
    chosen = {name: getattr(options, name) for name in ("engine", "precision", "device")}
    try:
        opened = Purifier.from_pretrained(options.checkpoint, **chosen)
    except EngineUnavailable as error:
        print(f"not run: {error}")
        return UNAVAILABLE
    with opened as purifier:
        engine = {name: purifier.info()[name] for name in ("engine", "precision", "device")}
        found = endure(purifier, options.images)
    write_json(options.out, {"machine": machine.describe(), "engine": engine, **found})
    print(f"{engine}: {found}")
    print(f"written to {options.out}")
    return 1 if found["calls_with_other_bytes"] or found["grew"] else 0


if __name__ == "__main__":
    sys.exit(main())
