"""A Triton server on this machine: what gathering the requests of several clients into batches gains.

``pip install '.[bench,triton-server]'``, then ``pytest bench/test_serving.py --benchmark-only``. One server holds the
same purifier several times, with and without dynamic batching; blocks of load take turns between these, so that all see
the same machine. Clients are on the same cores as the server.
"""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import statistics
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bench.conftest import Measure, Record
from bench.inputs import batches
from bench.triton_client import Load, drive, request
from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.integrations import triton_launcher
from defense_vae_fast.integrations.triton_server import Batching, write_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None,
    reason="needs the wheel with the server: pip install '.[triton-server]'",
)

# Name of the model: microseconds of delay; None for no dynamic batching.
MODELS = {"alone": None, "batched_0": 0, "batched_500": 500, "batched_2000": 2000}
CLIENTS = (1, 8)
ENGINE = "openvino"  # in which an image's result does not depend on its company
KEPT = 1000


@pytest.fixture(scope="module")
def server(checkpoint_name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running server with all ``MODELS``."""
    repository = tmp_path_factory.mktemp("models")
    for name, delay in MODELS.items():
        written = write_model(
            repository, checkpoint_name, name=name, engine=ENGINE, batching=Batching(max_delay_us=delay or 0)
        )
        if delay is None:
            path = written / "config.pbtxt"
            path.write_text(re.sub(r"^dynamic_batching \{.*?^\}\n", "", path.read_text(), flags=re.S | re.M))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--http-port={port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false",
        "--exit-timeout-secs=5",
    ]  # fmt: skip
    log = repository.parent / "server.log"
    with log.open("wb") as file, triton_launcher.running(repository, options, log=file.fileno()) as process:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
        yield f"127.0.0.1:{port}"


def statistics_of(address: str, model: str) -> tuple[int, int]:
    """Images and batches that a model has purified so far."""
    with urllib.request.urlopen(f"http://{address}/v2/models/{model}/stats", timeout=30) as answer:
        [told] = json.load(answer)["model_stats"]
    return int(told["inference_count"]), int(told["execution_count"])


@pytest.mark.parametrize("clients", CLIENTS, ids=[f"{count}-clients" for count in CLIENTS])
def test_dynamic_batching(
    clients: int,
    server: str,
    checkpoint_name: str,
    checkpoint: Checkpoint,
    quick: bool,
    measure: Measure,
    record: Record,
) -> None:
    [images] = batches(64, checkpoint.config.image_shape, count=1)
    with Purifier.from_pretrained(checkpoint_name, engine=ENGINE) as purifier:
        purified, scores = purifier(images, return_score=True)
    expected = [image.tobytes() + np.float32(score).tobytes() for image, score in zip(purified, scores, strict=True)]
    prepared = {name: [request(server, name, image) for image in images] for name in MODELS}
    seconds, rounds = (0.3, 1) if quick else (3.0, 8)
    blocks: dict[str, list[Load]] = {name: [] for name in MODELS}
    for name in MODELS:  # the first requests of a connection and of a model are slower
        drive(server, prepared[name], expected, clients, seconds / 3)
    before = {name: statistics_of(server, name) for name in MODELS}

    def turns() -> None:
        for turn in range(rounds):
            for name in list(MODELS)[:: 1 if turn % 2 else -1]:
                blocks[name].append(drive(server, prepared[name], expected, clients, seconds))

    measure(f"Triton server, {clients} clients", turns, rounds=1)
    rates = {name: statistics.median(len(load.latencies) / load.seconds for load in blocks[name]) for name in MODELS}
    for name in MODELS:
        assert sum(load.wrong for load in blocks[name]) == 0, f"{name}: results differ from a local call"
        latencies = np.array([latency for load in blocks[name] for latency in load.latencies])
        done, runs = (now - then for now, then in zip(statistics_of(server, name), before[name], strict=True))
        delay = MODELS[name]
        title = "no dynamic batching" if delay is None else f"dynamic batching, {delay} us"
        kept: Any = np.quantile(latencies, (np.arange(KEPT) + 0.5) / KEPT)
        record(
            "serving", f"Triton, {clients} clients, {title}", seconds=[float(value) for value in kept],
            clients=clients, delay_us=delay, requests_per_second=rates[name], gain=rates[name] / rates["alone"],
            p99=float(np.quantile(latencies, 0.99)), images_per_batch=done / runs, requests=len(latencies),
            engine=ENGINE, blocks=[len(load.latencies) / load.seconds for load in blocks[name]],
        )  # fmt: skip
