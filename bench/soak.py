"""A long run of live streams that looks for leaks and wrong results: ``python -m bench.soak --frames 10_000_000``.

Again and again an engine is opened, streamed to from several threads and closed. Sources come and go, one frame in a
hundred is bad, queues run over now and then. Every image is compared with the one that a plain call gives, every frame
accounted for, every source's order checked. Bytes in use, resident memory, threads and handles are counted whenever all
is closed; they may not have grown between the end of the first minute and the end. Exit code 1 where anything is wrong;
the record is JSON. What was seen goes to a file meanwhile: a few small objects a life, kept in memory, would hold pages
that the heap could give back. The process starts itself anew with ``PYTHONMALLOC=malloc``, so that the C library knows
of all that is in use, and with ``MALLOC_ARENA_MAX=1``: where every thread may get a heap of its own, resident memory
climbs by some 6 % in the first hundred engines, until all heaps have been used.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import machine
from bench.report import write_json
from defense_vae_fast import Purifier
from defense_vae_fast.backlog import WhenFull
from defense_vae_fast.stream import Result, Stream

DISTINCT = 256  # frames whose serial results are known
PRODUCERS = 4
BAD_SHARE = 0.01
SETTLED_SECONDS = 60.0
SLACK = 0.02  # growth of memory that still counts as none
POLICIES: tuple[WhenFull, ...] = ("block", "block", "block", "latest", "drop_oldest", "reject")

Array = npt.NDArray[Any]


class Checker:
    """Compares results with the serial ones as they come; one for each stream, used by its thread alone."""

    def __init__(self, serial: list[bytes]) -> None:
        self._serial = serial
        self._next: dict[Hashable, int] = {}
        self.digest = 0
        """Sum over the images of the CRC-32 of their number and bytes."""
        self.expected = 0
        """The same of the serial results."""
        self.out = 0
        self.dropped: Counter[str] = Counter()
        self.wrong: list[str] = []

    def __call__(self, result: Result) -> None:
        """Take the result of a frame whose tag is (number in its source, which frame, whether the source ends)."""
        turn, index, last = result.tag
        if self._next.get(result.source, 0) != turn:
            self._note(f"{result.source}: frame {turn} came when {self._next.get(result.source, 0)} was due")
        self._next[result.source] = turn + 1
        if last:
            del self._next[result.source]
        if result.dropped is not None:
            self.dropped[result.dropped] += 1
            return
        image = result.image.tobytes()
        self.out += 1
        self.digest += zlib.crc32(image, turn)
        self.expected += zlib.crc32(self._serial[index], turn)
        if image != self._serial[index]:
            self._note(f"{result.source}: frame {turn} (image {index}) differs from its serial result")

    def _note(self, wrong: str) -> None:
        if len(self.wrong) < 20:
            self.wrong.append(wrong)


def feed(stream: Stream, frames: Array, producer: int, count: int, seed: int) -> int:
    """Put ``count`` good frames from sources that come and go, and bad ones among them; how many bad ones."""
    rng = np.random.default_rng([seed, producer])
    shape = frames.shape[1:]
    bad: list[Any] = [
        np.zeros((*shape[:2], 7), np.uint8),
        np.full((shape[2], *shape[:2]), np.nan, np.float32),
        np.zeros(shape, np.int64),
        None,
    ]
    refused = session = 0
    while count:
        session += 1
        number = min(count, int(rng.integers(1, 500)))
        count -= number
        choice = rng.integers(0, len(frames), number)
        is_bad = rng.random(number) < BAD_SHARE
        for turn, index in enumerate(choice.tolist()):
            if is_bad[turn]:
                try:
                    stream.put(bad[turn % len(bad)], source=(producer, session))
                except (TypeError, ValueError):
                    refused += 1
            stream.put(frames[index], source=(producer, session), tag=(turn, index, turn == number - 1))
    return refused


class Heap(ctypes.Structure):
    """What glibc says of its heap (mallinfo2), in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def usage() -> dict[str, int]:
    """Bytes in use, resident bytes, threads and open handles of this process.

    What the C library's heap keeps of freed memory goes back to the system first: the process no longer holds it.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc_trim(ctypes.c_size_t(0))
    library.mallinfo2.restype = Heap
    heap = library.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "in_use": heap.uordblks + heap.hblkhd,
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "handles": len(os.listdir("/proc/self/fd")),
    }


def life(
    checkpoint: str,
    engine: str,
    precision: str,
    when_full: WhenFull,
    count: int,
    seed: int,
    frames: Array,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Open, stream ``count`` frames, close; what was seen."""
    with Purifier.from_pretrained(checkpoint, engine=engine, precision=precision) as purifier:
        serial = [purifier(frame).tobytes() for frame in frames]
        checker = Checker(serial)
        shares = [count // PRODUCERS + (index < count % PRODUCERS) for index in range(PRODUCERS)]
        refused: list[int] = []
        with purifier.stream(when_full=when_full, callback=checker) as stream:
            threads = [
                threading.Thread(
                    target=lambda *given: refused.append(feed(*given)), args=(stream, frames, index, share, seed)
                )
                for index, share in enumerate(shares)
            ]
            for thread in threads:
                thread.start()
            shown = 0
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
                done = stream.stats()["frames_in"]
                progress(done - shown)
                shown = done
        stats = stream.stats()
    wrong = list(checker.wrong)
    counted = {name: number for name, number in stats["dropped"].items() if name != "invalid"}
    checks = {
        "in = out + dropped": stats["frames_in"] == stats["frames_out"] + sum(stats["dropped"].values()),
        "all frames were counted": stats["frames_in"] == count + sum(refused),
        "bad frames were refused": stats["dropped"].get("invalid", 0) == sum(refused) and len(refused) == PRODUCERS,
        "results as counted": checker.out == stats["frames_out"] and dict(checker.dropped) == counted,
        "nothing is left": stats["in_progress"] == 0 and stats["sources"] == 0,
        "digest": checker.digest == checker.expected,
        "none dropped under block": when_full != "block" or not counted,
    }
    wrong += [f"failed: {name}" for name, held in checks.items() if not held]
    progress(stats["frames_in"] - shown)
    counts = {name: stats[name] for name in ("frames_in", "frames_out", "dropped")}
    return {"when_full": when_full, "digest": f"{checker.digest:x}", "wrong": wrong, **counts}


def judge(lives: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth from the end of the first minute to the end; None where the run was too short for it.

    For resident memory: from the median of the first quarter of that time to the median of the last.
    """
    settled = [one for one in lives if one["seconds"] >= SETTLED_SECONDS]
    if len(settled) < 4:
        return {"settled_after_seconds": None, "growth": None, "grew": None}
    first, last = settled[0], settled[-1]
    quarters = np.array_split([one["resident"] for one in settled], 4)
    medians = [int(np.median(quarter)) for quarter in quarters]
    growth = {name: last[name] - first[name] for name in ("in_use", "threads", "handles")}
    growth["resident"] = medians[-1] - medians[0]
    return {
        "settled_after_seconds": first["seconds"],
        "resident_medians": medians,
        "growth": growth,
        "grew": growth["in_use"] > SLACK * first["in_use"]
        or growth["resident"] > SLACK * medians[0]
        or growth["threads"] > 0
        or growth["handles"] > 0,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the record, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000_000, help="good frames in all (default: ten million)")
    parser.add_argument("--life", type=int, default=20_000, help="frames before the engine is closed and reopened")
    parser.add_argument("--checkpoint", default="fashion_mnist", help="name or path")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest-soak.json")
    options = parser.parse_args(arguments)
    if min(options.frames, options.life) < PRODUCERS:
        parser.error(f"expected at least {PRODUCERS} frames, got {options.frames} in lives of {options.life}")
    chosen = {"engine": options.engine, "precision": options.precision}
    with Purifier.from_pretrained(options.checkpoint, **chosen) as purifier:
        channels, height, width = purifier.config.image_shape
        engine = purifier.info()
    frames = np.random.default_rng(options.seed).integers(0, 256, (DISTINCT, height, width, channels), dtype=np.uint8)
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with tempfile.TemporaryFile("w+") as kept, Progress(*columns) as bar:
        task = bar.add_task("soaking", total=options.frames)
        left = options.frames
        for number in itertools.count():
            count = min(left, options.life)
            if count < PRODUCERS:
                break
            seen = life(
                options.checkpoint, engine["engine"], engine["precision"], POLICIES[number % len(POLICIES)], count,
                options.seed + number, frames, lambda done: bar.advance(task, done),
            )  # fmt: skip
            left -= count
            now = usage()
            seen |= {"seconds": round(time.monotonic() - started, 1), **now}
            kept.write(json.dumps(seen) + "\n")
            bar.update(task, description=f"{now['in_use'] / 1e6:,.1f} MB in use, {now['threads']} threads")
        kept.seek(0)
        lives = [json.loads(each) for each in kept]
    verdict = judge(lives)
    wrong = [f"life {index}: {line}" for index, each in enumerate(lives) for line in each["wrong"]]
    total = {name: sum(each[name] for each in lives) for name in ("frames_in", "frames_out")}
    dropped: Counter[str] = Counter()
    for each in lives:
        dropped.update(each["dropped"])
    record = {
        "machine": machine.describe(),
        "options": {**vars(options), "out": str(options.out.name)},
        "engine": {name: engine[name] for name in ("engine", "precision", "device")},
        "checkpoint_digest": engine["checkpoint"]["digest"],
        **total,
        "dropped": dict(dropped),
        "seconds": lives[-1]["seconds"],
        "wrong": wrong,
        **verdict,
        "lives": lives,
    }
    write_json(options.out, record)
    print(
        json.dumps({name: record[name] for name in ("frames_in", "frames_out", "dropped", "seconds", "growth", "grew")})
    )
    for line in wrong:
        print(line)
    if verdict["grew"] is None:
        print(f"too short to say whether anything grows: expected four lives that end after {SETTLED_SECONDS:.0f} s")
    print(f"written to {options.out}")
    return 1 if wrong or verdict["grew"] else 0


if __name__ == "__main__":
    heap = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"}
    if not os.environ.items() >= heap.items():
        os.environ.update(heap)
        os.execv(sys.executable, sys.orig_argv)
    sys.exit(main())
