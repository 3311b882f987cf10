"""Bulk work with an actor killed midway and a node lost: ``python -m bench.bulk --images 100000``.

Makes a WebDataset of Fashion-MNIST's images (and of noisy ones where there are not enough), purifies it with
``defense_vae_fast.integrations.ray_bulk`` on a Ray cluster of two nodes on this machine. An actor is killed in the
middle of a shard, the work stopped after three shards and continued, a node taken away in the middle of a shard. Then
every image has to have come out once, with the bytes and the score of a local call. Exit code 1 where anything is
wrong; the record is JSON. Needs ``pip install '.[integration,train]'``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

from bench import machine
from bench.cluster import Nodes, once, writers
from bench.report import write_json
from defense_vae_fast import Purifier
from defense_vae_fast.integrations.ray_bulk import Done, bulk
from training.data import load_dataset

Array = npt.NDArray[Any]
CHECK = 1000  # images compared at once


def images_of(count: int, data: Path | None, seed: int) -> Array:
    """uint8 (N, 28, 28, 1): Fashion-MNIST's images, the same again with noise where there are not enough."""
    dataset = load_dataset("fashion_mnist", data)
    known = np.concatenate([part.images.numpy() for part in (dataset.train, dataset.validation, dataset.test)]).reshape(
        -1, 28, 28, 1
    )
    rng = np.random.default_rng(seed)
    rounds = [known[:count]]
    while sum(map(len, rounds)) < count:
        more = known[: count - sum(map(len, rounds))].astype(np.int16)
        more += rng.choice(np.array([-76, 76], np.int16), more.shape)
        rounds.append(np.clip(more, 0, 255).astype(np.uint8))
    return np.concatenate(rounds)


def write_shards(folder: Path, images: Array, shard: int) -> int:
    """Tars of PNG files, named by number; the bytes written."""
    total = 0
    for first in range(0, len(images), shard):
        path = folder / f"{first // shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for index in range(first, min(first + shard, len(images))):
                file = io.BytesIO()
                Image.fromarray(images[index, :, :, 0]).save(file, "PNG", compress_level=1)
                member = tarfile.TarInfo(f"{index:09d}.png")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
        total += path.stat().st_size
    return total


def check(out: Path, images: Array, checkpoint: str, engine: str) -> tuple[list[str], float]:
    """What is wrong with the output, and the images a second of the local calls."""
    wrong: list[str] = []
    rows: dict[int, tuple[bytes | None, float | None]] = {}
    for path in sorted(out.glob("*.parquet")):
        table = pq.read_table(path, columns=["key", "image", "score"])
        for key, image, score in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if int(key) in rows:
                wrong.append(f"image {key} came out twice")
            rows[int(key)] = (image, score)
    if missing := set(range(len(images))) - set(rows):
        wrong.append(f"{len(missing)} images are missing, {min(missing)} for one")
    seconds = 0.0
    with Purifier.from_pretrained(checkpoint, engine=engine) as purifier:
        purifier.warmup()
        for first in range(0, len(images), CHECK):
            batch = images[first : first + CHECK]
            start = time.perf_counter()
            clean, scores = purifier(batch, return_score=True)
            seconds += time.perf_counter() - start
            for index in range(len(batch)):
                image, score = rows.get(first + index, (None, None))
                if image != clean[index].tobytes() or score is None or np.float32(score) != scores[index]:
                    wrong.append(f"image {first + index} differs from a local call")
    return wrong, len(images) / seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the record, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shard", type=int, default=4000, help="images of a tar")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's IDX files; looked for, then fetched")
    parser.add_argument("--checkpoint", default="fashion_mnist", help="name or path")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest-bulk.json")
    options = parser.parse_args(arguments)
    if options.images < 6 * options.shard:
        parser.error(f"expected at least six shards, got {options.images} images in shards of {options.shard}")
    images = images_of(options.images, options.data, options.seed)
    watch = machine.OthersWatch()
    with tempfile.TemporaryDirectory(prefix="defense-vae-fast-bulk-") as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        source.mkdir()
        written = write_shards(source, images, options.shard)
        nodes = Nodes()
        seen: list[Done] = []
        accidents: dict[str, bool] = {}
        try:
            start = time.perf_counter()
            job: dict[str, Any] = {"engine": options.engine, "encoding": "raw", "actors": 2}

            def advance(done: Done) -> None:
                seen.append(done)
                print(f"{time.perf_counter() - start:7.1f} s  {sum(one.images for one in seen):,} images", flush=True)
                if len(seen) == 3 and "stopped" not in accidents:
                    accidents["stopped"] = True
                    raise KeyboardInterrupt

            def at_work() -> list[int]:
                return writers(out, os.getpid()) if len(seen) >= 1 else []

            with once(at_work, lambda pids: os.kill(pids[0], signal.SIGKILL)) as killed:
                try:
                    bulk(source, out, options.checkpoint, advance=advance, **job)
                except KeyboardInterrupt:
                    print("stopped after three shards; going on")
            accidents["actor killed at work"] = bool(killed)
            second = nodes.second_process
            with once(lambda: writers(out, second), lambda _: nodes.lose()) as lost:
                report = bulk(source, out, options.checkpoint, advance=advance, **job)
            accidents["node lost at work"] = bool(lost)
            seconds = time.perf_counter() - start
        finally:
            nodes.close()
        wrong, local_rate = check(out, images, options.checkpoint, options.engine)
        sizes = {"in": written, "out": sum(path.stat().st_size for path in out.iterdir())}
    wrong += [f"it did not happen: {name}" for name, happened in accidents.items() if not happened]
    if (report.images, report.failed, report.damaged) != (len(images), 0, []):
        wrong.append(f"the report is {report}")
    record = {
        "machine": {**machine.describe(), "load": watch.report()},
        "options": {name: value for name, value in vars(options).items() if name not in ("data", "out")},
        "images": report.images,
        "shards": report.shards,
        "resumed_shards": report.resumed,
        "accidents": accidents,
        "bytes": sizes,
        "seconds_with_accidents": seconds,
        "images_per_second_with_accidents": report.images / seconds,
        "images_per_second_of_local_calls": local_rate,
        "wrong": wrong[:100],
    }
    write_json(options.out, record)
    shown = ("images", "shards", "resumed_shards", "accidents", "bytes", "seconds_with_accidents")
    print(json.dumps({name: record[name] for name in shown}))
    for line in wrong[:20]:
        print(line)
    print(f"{len(wrong)} things are wrong" if wrong else "complete, every image once, each as a local call gives it")
    print(f"written to {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
