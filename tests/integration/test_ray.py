"""Bulk work and serving on a real Ray cluster of two nodes on this machine, which lose actors and a node."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import requests
from PIL import Image
from ray import serve
from test_bulk_files import png, write_tar
from test_triton_server import free_ports

from bench.cluster import Nodes, command_of, descendants, once, writers
from defense_vae_fast import Purifier
from defense_vae_fast.engines.base import EngineUnavailable
from defense_vae_fast.integrations import ray_bulk
from defense_vae_fast.integrations.bulk_output import OutputError
from defense_vae_fast.integrations.ray_bulk import BulkError, Done, Report, bulk
from defense_vae_fast.integrations.ray_serve import SCORE_HEADER, app

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

Array = np.ndarray[Any, Any]
SHARD, SHARDS = 250, 8
ATTEMPTS = 5  # to catch an actor at work, which a busy machine may be too slow for


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        yield made
    finally:
        made.close()
    assert not [command_of(pid) for pid in descendants(os.getpid()) if "ray" in command_of(pid)]


@pytest.fixture(autouse=True)
def all_actors_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work starts when all actors are there: on a busy machine the first one is done before the second has started."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "wait_for_min_actors_s", 60)


@pytest.fixture(scope="module")
def purifier(checkpoint_path: Path) -> Iterator[Purifier]:
    with Purifier.from_pretrained(checkpoint_path, engine="openvino") as made:
        yield made


@pytest.fixture(scope="module")
def pixels() -> Array:
    return np.random.default_rng(9).integers(0, 256, (SHARD * SHARDS, 28, 28, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def shards(pixels: Array, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet with a shard in each row group."""
    folder = tmp_path_factory.mktemp("shards")
    values = pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), 784)
    pq.write_table(pa.table({"image": values}), folder / "in.parquet", row_group_size=SHARD)
    return folder


def run(source: Path, out: Path, checkpoint: Path, **options: Any) -> Report:
    return bulk(source, out, checkpoint, engine="openvino", shard_images=SHARD, **options)


def rows_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """All rows by source and key, none of which may be there twice."""
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    found = {(row["source"], row["key"]): row for row in rows}
    assert len(found) == len(rows), "an image came out twice"
    return found


def assert_complete(out: Path, pixels: Array, purifier: Purifier) -> None:
    """Every image once, with the bytes and the score of a local call."""
    rows = rows_of(out)
    assert set(rows) == {("in.parquet", str(index)) for index in range(len(pixels))}
    expected, scores = purifier(pixels, return_score=True)
    for index in range(len(pixels)):
        row = rows["in.parquet", str(index)]
        assert row["error"] is None
        assert row["image"] == expected[index].tobytes()
        assert np.float32(row["score"]) == scores[index]
    assert [path.name for path in out.iterdir() if path.suffix != ".parquet"] == []


# Bulk


def test_an_actor_killed_midway_costs_nothing(
    nodes: Nodes, shards: Path, pixels: Array, purifier: Purifier, checkpoint_path: Path, tmp_path: Path
) -> None:
    finished: list[Done] = []

    def midway(out: Path) -> list[int]:
        return writers(out, os.getpid()) if finished else []

    for attempt in range(ATTEMPTS):
        out = tmp_path / str(attempt)
        finished.clear()
        with once(partial(midway, out), lambda pids: os.kill(pids[0], signal.SIGKILL)) as killed:
            report = run(shards, out, checkpoint_path, actors=2, encoding="raw", advance=finished.append)
        if killed:
            break
    assert killed, "no actor was caught at work"
    assert (report.shards, report.images, report.failed, report.damaged) == (SHARDS, len(pixels), 0, [])
    assert sum(done.images for done in finished) == len(pixels)
    assert_complete(out, pixels, purifier)
    told = json.loads(pq.read_metadata(next(out.glob("*.parquet"))).metadata[b"defense_vae_fast"])
    assert told["engine"] == "openvino"
    assert told["checkpoint"] == purifier.info()["checkpoint"]["digest"]


def test_a_lost_node_costs_nothing(
    nodes: Nodes, shards: Path, pixels: Array, purifier: Purifier, checkpoint_path: Path, tmp_path: Path
) -> None:
    for attempt in range(ATTEMPTS):
        out = tmp_path / str(attempt)
        with once(partial(writers, out, nodes.second_process), lambda _: nodes.lose()) as caught:
            report = run(shards, out, checkpoint_path, actors=2, encoding="raw")
        if caught:
            break
    nodes.add()
    assert caught, "no actor of the second node was caught at work"
    assert report.images == len(pixels)
    assert_complete(out, pixels, purifier)


def test_both_nodes_work(nodes: Nodes, shards: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    for attempt in range(ATTEMPTS):
        out = tmp_path / str(attempt)
        run(shards, out, checkpoint_path, actors=2, encoding="raw")
        told = [json.loads(pq.read_metadata(path).metadata[b"defense_vae_fast"]) for path in out.glob("*.parquet")]
        # A quick actor is done with all of these few images before the other node's has started.
        if len({each["node"] for each in told}) == 2:
            return
    pytest.fail("one node did all the work, every time")


def test_what_is_done_is_not_done_again(
    nodes: Nodes, shards: Path, pixels: Array, purifier: Purifier, checkpoint_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    seen = []

    def stop(done: Done) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(shards, out, checkpoint_path, encoding="raw", advance=stop)
    # What was stopped must not go on behind the back of the next run.
    end = time.monotonic() + 60
    while writers(out, os.getpid()) and time.monotonic() < end:
        time.sleep(0.05)
    before = {path: path.stat().st_ino for path in out.glob("*.parquet")}
    assert 3 <= len(before) < SHARDS
    (out / ".0123456789abcdef.tmp").write_bytes(b"left by one that was killed")
    states: list[tuple[int, int]] = []
    again = run(shards, out, checkpoint_path, encoding="raw", started=lambda r: states.append((r.shards, r.resumed)))
    assert states == [(SHARDS, len(before))]
    assert again.resumed == len(before)
    assert again.images == len(pixels)
    assert {path: path.stat().st_ino for path in before} == before
    assert_complete(out, pixels, purifier)
    # All done: Ray is not even asked.
    assert run(shards, out, checkpoint_path, encoding="raw").resumed == SHARDS
    with pytest.raises(OutputError, match="8 of its files are of another input, checkpoint or option"):
        run(shards, out, checkpoint_path, encoding="png")


@pytest.fixture
def mixed(tmp_path: Path, pixels: Array) -> Path:
    """A folder of images with a bad one, a tar with another, a tar that is cut short."""
    folder = tmp_path / "in"
    (folder / "photos").mkdir(parents=True)
    for index in range(5):
        (folder / "photos" / f"{index}.png").write_bytes(png(pixels[index]))
    (folder / "photos" / "3.png").write_bytes(b"not a picture")
    write_tar(folder / "a.tar", {"5.png": png(pixels[5]), "bad.png": png(np.zeros((32, 32, 1), np.uint8))})
    whole = write_tar(folder / "b.tar", {f"{index}.png": png(pixels[index]) for index in range(20)}).read_bytes()
    (folder / "b.tar").write_bytes(whole[:5000])
    return folder


def test_the_command_tells_of_bad_images_and_goes_on(
    nodes: Nodes, mixed: Path, pixels: Array, purifier: Purifier, checkpoint_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from defense_vae_fast.cli import main; main()", "bulk", str(mixed), str(out)]
    options = ["-c", str(checkpoint_path), "--engine", "openvino", "--address", nodes.cluster.address]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1, done.stderr
    assert "5 images in 2 shards purified into" in done.stdout
    assert "2 images could not be used, see the column 'error'; 1 shard failed" in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("defense-vae-fast: ")]
    assert len(told) == 3, done.stderr
    for part in (
        "photos/3.png: expected an image file", "a.tar: bad: expected a 28x28 8-bit gray image, got 32x32",
        "b.tar: expected a tar, got a damaged one (it ends without an end mark",
    ):  # fmt: skip
        assert part in " ".join(told).replace(str(mixed) + "/", "")
    rows = rows_of(out)
    assert {key for key, row in rows.items() if row["error"]} == {("photos/3.png",) * 2, ("a.tar", "bad")}
    with Image.open(io.BytesIO(rows["a.tar", "5"]["image"])) as image:
        np.testing.assert_array_equal(np.asarray(image), purifier(pixels[5])[:, :, 0])


def test_a_bad_image_is_the_end_if_so_wished(nodes: Nodes, mixed: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BulkError, match=r"3\.png: expected an image file"):
        run(mixed / "photos", tmp_path / "out", checkpoint_path, fail_on_bad=True)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_an_engine_that_does_not_work_is_named(
    nodes: Nodes, shards: Path, checkpoint_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineUnavailable, match="tensorrt"):
        bulk(shards, tmp_path / "out", checkpoint_path, engine="tensorrt")


def test_bad_options_are_named_before_anything_is_written(shards: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoding: expected one of png, raw"):
        run(shards, tmp_path / "out", checkpoint_path, encoding="gif")
    with pytest.raises(ValueError, match="actors: expected at least 1"):
        run(shards, tmp_path / "out", checkpoint_path, actors=0)
    assert not (tmp_path / "out").exists()


def test_actors_follow_the_gpus_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [{"Alive": True}, {"Alive": True}, {"Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    for there, options, expected in (
        ({}, (None, None, "auto"), (2, 0.0)),
        ({"GPU": 8.0}, (None, None, "auto"), (8, 1.0)),
        ({"GPU": 8.0}, (None, 0.5, "auto"), (16, 0.5)),
        ({"GPU": 8.0}, (3, None, "auto"), (3, 1.0)),
        ({"GPU": 8.0}, (None, None, "cpu"), (2, 0.0)),
    ):
        monkeypatch.setattr(ray, "cluster_resources", lambda there=there: there)
        found = ray_bulk._actors(*options)
        assert (found["actors"], found["num_gpus"], found["num_cpus"]) == (*expected, 0)


# Serving


@pytest.fixture(scope="module")
def served(nodes: Nodes, checkpoint_path: Path) -> Iterator[tuple[Any, str]]:
    [port] = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        settings = {"checkpoint": str(checkpoint_path), "engine": "openvino", "max_batch": "16", "max_delay_ms": "20"}
        yield serve.run(app(settings), name="purifier"), f"http://127.0.0.1:{port}/"
    finally:
        serve.shutdown()


def test_served_images_share_batches_and_get_the_bytes_of_a_local_call(
    served: tuple[Any, str], pixels: Array, purifier: Purifier
) -> None:
    handle, _ = served
    expected, scores = purifier(pixels[:50], return_score=True)
    answers = [answer.result(timeout_s=60) for answer in [handle.purify.remote(image) for image in pixels[:50]]]
    for (clean, score), image, number in zip(answers, expected, scores, strict=True):
        np.testing.assert_array_equal(clean, image)
        assert np.float32(score) == number
    sizes = handle.batch_sizes.remote().result(timeout_s=60)
    assert sum(size * count for size, count in sizes.items()) == 50
    assert 1 < max(sizes) <= 16, sizes


def test_served_over_http(served: tuple[Any, str], pixels: Array, purifier: Purifier) -> None:
    _, url = served
    answer = requests.post(url, data=png(pixels[3]), timeout=60)
    clean, score = purifier(pixels[3], return_score=True)
    assert answer.status_code == 200
    with Image.open(io.BytesIO(answer.content)) as image:
        np.testing.assert_array_equal(np.asarray(image), clean[:, :, 0])
    assert np.float32(answer.headers[SCORE_HEADER]) == np.float32(score)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "expected an image file"),
        (b"garbage", 400, "expected an image file"),
        (png(np.zeros((32, 32, 1), np.uint8)), 400, "expected a 28x28 8-bit gray image, got 32x32"),
        (png(np.zeros((28, 28, 1), np.uint8))[:50], 400, ""),
        (b"0" * (3 << 20), 413, "expected an image file of at most"),
    ],
    ids=["empty", "garbage", "size", "cut", "huge"],
)
def test_bad_requests_are_told_so(
    served: tuple[Any, str], pixels: Array, body: bytes, status: int, reason: str
) -> None:
    _, url = served
    answer = requests.post(url, data=body, timeout=60)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]
    assert requests.get(url, timeout=60).status_code == 405
    assert requests.post(url, data=png(pixels[0]), timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((28, 28), np.uint8), r"expected the shape \(28, 28, 1\), got \(28, 28\)"),
        (np.zeros((28, 28, 1)), "expected a uint8 array, got float64"),
        (7, "expected a uint8 array, got int"),
    ],
    ids=["shape", "dtype", "kind"],
)
def test_bad_calls_fail_alone(served: tuple[Any, str], pixels: Array, given: Any, message: str) -> None:
    handle, _ = served
    together = [handle.purify.remote(one) for one in (pixels[0], given, pixels[1])]
    with pytest.raises((TypeError, ValueError), match=message):
        together[1].result(timeout_s=60)
    for answer in (together[0], together[2]):
        assert answer.result(timeout_s=60)[0].shape == (28, 28, 1)


def test_settings_are_checked() -> None:
    with pytest.raises(TypeError, match=r"expected settings among checkpoint, .*, got 'delay'"):
        app({"delay": 3})
    with pytest.raises(ValueError, match="max_delay_ms: expected 0 to 60000, got -1"):
        app({"max_delay_ms": "-1"})
