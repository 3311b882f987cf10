"""A real Triton server with the purifier as a model: every protocol, the metrics, and requests that are no good."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from defense_vae_fast import Purifier
from defense_vae_fast.integrations import triton_launcher
from defense_vae_fast.integrations.triton_server import Batching, write_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

START_SECONDS = 90
DELAY_US = 2000
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Server:
    http: str
    grpc: str
    metrics: str
    log: Path
    process: subprocess.Popen[bytes]

    def infer(self, images: Array, model: str = "purifier", **options: Any) -> tuple[Array, Array]:
        """Over HTTP, in binary."""
        kind = {"uint8": "UINT8", "float32": "FP32"}[str(images.dtype)]
        with tritonclient.http.InferenceServerClient(self.http) as client:
            given = tritonclient.http.InferInput("images", list(images.shape), kind)
            given.set_data_from_numpy(images)
            answer = client.infer(model, [given], **options)
            return answer.as_numpy("purified"), answer.as_numpy("score")

    def post(self, body: bytes | str, model: str = "purifier", **headers: str) -> requests.Response:
        """Anything at all, over HTTP."""
        return requests.post(f"http://{self.http}/v2/models/{model}/infer", data=body, headers=headers, timeout=30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def server(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("triton") / "models"
    batching = Batching(preferred=(8,), max_delay_us=DELAY_US)
    write_model(repository, checkpoint_path, engine="openvino", batching=batching)
    write_model(repository, checkpoint_path, name="floats", kind="float", engine="openvino", precision="fp32",
                batching=Batching(max_batch=16, max_delay_us=200_000))  # fmt: skip
    write_model(repository, checkpoint_path, name="narrow", engine="openvino",
                batching=Batching(max_batch=1, preferred=(), max_queue=1))  # fmt: skip
    before = list(Path("/dev/shm").glob("defense_vae_fast_*"))
    ports = free_ports(3)
    log = repository.parent / "server.log"
    options = [
        "--exit-timeout-secs=5",  # for clients that stay connected, as the one of a test below
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        *(f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
    ]
    with log.open("wb") as file, triton_launcher.running(repository, options, log=file.fileno()) as process:
        http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
        wait_until_ready(http, process, log)
        yield Server(http, grpc, metrics, log, process)
    assert process.returncode == 0, "it ended because it was asked to"
    assert not [path for path in Path("/dev/shm").glob("defense_vae_fast_*") if path not in before]


def wait_until_ready(http: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(f"http://{http}/v2/health/ready", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.1)
    pytest.fail(f"the server is not ready (exit code {process.poll()}):\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def purifier(checkpoint_path: Path) -> Iterator[Purifier]:
    with Purifier.from_pretrained(checkpoint_path, engine="openvino") as made:
        yield made


@pytest.fixture(scope="module")
def images() -> Array:
    return np.random.default_rng(5).integers(0, 256, (97, 28, 28, 1), dtype=np.uint8)


def test_http_gives_the_bytes_of_a_local_call(server: Server, purifier: Purifier, images: Array) -> None:
    for count in (1, 2, 7, 64):
        clean, score = server.infer(images[:count])
        expected, scores = purifier(images[:count], return_score=True)
        np.testing.assert_array_equal(clean, expected)
        assert score.shape == (count, 1)
        np.testing.assert_array_equal(score[:, 0], scores)


def test_grpc_gives_the_bytes_of_a_local_call(server: Server, purifier: Purifier, images: Array) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        given = tritonclient.grpc.InferInput("images", [13, 28, 28, 1], "UINT8")
        given.set_data_from_numpy(images[:13])
        answer = client.infer("purifier", [given], client_timeout=30)
    expected, scores = purifier(images[:13], return_score=True)
    np.testing.assert_array_equal(answer.as_numpy("purified"), expected)
    np.testing.assert_array_equal(answer.as_numpy("score")[:, 0], scores)


def test_json_alone_will_do(server: Server, purifier: Purifier, images: Array) -> None:
    body = {
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 28, 28, 1], "data": images[0].ravel().tolist()}]
    }
    answer = {one["name"]: one for one in server.post(json.dumps(body)).json()["outputs"]}
    clean, score = purifier(images[0], return_score=True)
    assert answer["purified"]["data"] == clean.ravel().tolist()
    assert np.float32(answer["score"]["data"][0]) == np.float32(score)


def test_floating_images(server: Server, checkpoint_path: Path) -> None:
    images = np.random.default_rng(6).random((5, 1, 28, 28), dtype=np.float32)
    with Purifier.from_pretrained(checkpoint_path, engine="openvino", precision="fp32") as purifier:
        expected, scores = purifier(images, return_score=True)
    clean, score = server.infer(images, "floats")
    np.testing.assert_array_equal(clean, expected)
    np.testing.assert_array_equal(score[:, 0], scores)


def counters(server: Server, model: str) -> dict[str, float]:
    text = requests.get(f"http://{server.metrics}/metrics", timeout=30).text
    found = re.findall(rf'^(nv_inference_\w+)\{{model="{model}",version="1"\}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_requests_share_batches_and_get_the_bytes_of_a_local_call(
    server: Server, purifier: Purifier, images: Array
) -> None:
    """Eight clients at once, with one to three images each, in whatever company they meet."""
    before = counters(server, "purifier")
    starts = np.random.default_rng(7).integers(0, len(images) - 3, (8, 25))
    expected, scores = purifier(images, return_score=True)
    together = threading.Barrier(8)

    def client(number: int) -> int:
        done = 0
        together.wait(30)
        for start in starts[number]:
            count = 1 + (number + start) % 3
            clean, score = server.infer(images[start : start + count])
            np.testing.assert_array_equal(clean, expected[start : start + count])
            np.testing.assert_array_equal(score[:, 0], scores[start : start + count])
            done += count
        return done

    with ThreadPoolExecutor(8) as pool:
        done = sum(pool.map(client, range(8)))
    after = counters(server, "purifier")
    grown = {name: after[name] - before[name] for name in after}
    assert grown["nv_inference_request_success"] == 200
    assert grown["nv_inference_count"] == done
    assert grown["nv_inference_exec_count"] < 200, "no two requests shared a batch"


def hostile(images: Array) -> list[tuple[str, bytes | str, dict[str, str], str]]:
    """Name, body, headers, and what the answer has to speak of."""

    def body(**fields: Any) -> str:
        given = {"name": "images", "datatype": "UINT8", "shape": [1, 28, 28, 1], "data": [0] * 784, **fields}
        return json.dumps({"inputs": [given]})

    def binary(size: int, data: bytes, shape: list[int]) -> tuple[bytes, dict[str, str]]:
        given = {"name": "images", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [given]}).encode()
        return head + data, {"Inference-Header-Content-Length": str(len(head))}

    cut = binary(784, b"\0" * 100, [1, 28, 28, 1])
    huge = binary(1 << 40, b"\0" * 784, [1 << 31, 28, 28, 1])
    long = binary(784, b"\0" * 784, [2, 28, 28, 1])
    return [
        ("empty", "", {}, "size"),
        ("garbage", b"\xff\x00garbage", {}, "JSON|parse"),
        ("deep JSON", "[" * 100_000, {}, "JSON|parse|nest"),
        ("no inputs", "{}", {}, "inputs"),
        ("no images", json.dumps({"inputs": []}), {}, "input"),
        ("another input", body(name="pictures"), {}, "pictures"),
        ("another type", body(datatype="FP32"), {}, "FP32"),
        ("no type", body(datatype="U8"), {}, "U8|datatype|data-type"),
        ("no batch", body(shape=[28, 28, 1]), {}, "shape"),
        ("another size", body(shape=[1, 32, 32, 1], data=[0] * 1024), {}, "shape"),
        ("colours", body(shape=[1, 28, 28, 3], data=[0] * 2352), {}, "shape"),
        ("negative", body(shape=[-1, 28, 28, 1]), {}, "shape|negative|size"),
        ("no images in it", body(shape=[0, 28, 28, 1], data=[]), {}, "size|batch"),
        ("too many", body(shape=[65, 28, 28, 1], data=[0] * 784 * 65), {}, "batch-size must be <= 64"),
        ("too few numbers", body(data=[0] * 100), {}, "size|shape|elements"),
        ("words", body(data=["x"] * 784), {}, "parse|JSON|number|string"),
        ("cut short", *cut, "size|bytes"),
        ("declared huge", *huge, "size|batch|shape|bytes"),
        ("more declared than sent", *long, "size|bytes"),
        ("header beyond the body", b"{}", {"Inference-Header-Content-Length": "999999"}, "header|length|size"),
    ]  # fmt: skip


def test_requests_that_are_no_good_are_told_so_and_the_server_goes_on(
    server: Server, purifier: Purifier, images: Array
) -> None:
    expected = purifier(images[:3])
    answers = {}
    for name, body, headers, about in hostile(images):
        answer = server.post(body, **headers)
        answers[name] = (answer.status_code, answer.text[:200])
        # Triton calls what it cannot parse an error of its own.
        assert 400 <= answer.status_code <= 500, (name, answers[name])
        assert re.search(about, answer.json()["error"], re.IGNORECASE), (name, answers[name])
        np.testing.assert_array_equal(server.infer(images[:3])[0], expected)
    assert server.post("{}", model="nobody").status_code in (400, 404)


def test_a_length_that_never_comes_holds_nobody_up(server: Server, images: Array) -> None:
    """A client that declares a terabyte and sends a little."""
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(
            b"POST /v2/models/purifier/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1099511627776\r\n\r\n" + b"0" * 1000
        )
        assert server.infer(images[:2])[0].shape == (2, 28, 28, 1)
    assert server.process.poll() is None
    assert server.infer(images[:1])[0].shape == (1, 28, 28, 1)


def test_grpc_requests_that_are_no_good(server: Server, images: Array) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        for shape, kind, data in (
            ([1, 28, 28, 3], "UINT8", np.zeros((1, 28, 28, 3), np.uint8)),
            ([65, 28, 28, 1], "UINT8", np.zeros((65, 28, 28, 1), np.uint8)),
            ([1, 28, 28, 1], "FP32", np.zeros((1, 28, 28, 1), np.float32)),
        ):
            given = tritonclient.grpc.InferInput("images", shape, kind)
            given.set_data_from_numpy(data)
            with pytest.raises(InferenceServerException, match=r"images|batch-size"):
                client.infer("purifier", [given], client_timeout=30)
        assert client.is_model_ready("purifier")


def test_a_bad_value_fails_alone(server: Server) -> None:
    """Four requests that wait 200 ms for company, one with a NaN in it."""
    good = np.random.default_rng(8).random((2, 1, 28, 28), dtype=np.float32)
    bad = good.copy()
    bad[1, 0, 3, 3] = np.nan
    before = counters(server, "floats")
    together = threading.Barrier(4)

    def client(images: Array) -> Array | str:
        together.wait(30)
        try:
            return server.infer(images, "floats")[0]
        except InferenceServerException as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(client, [good, good, bad, good]))
    assert "expected finite values in [0, 1], got NaN" in answers[2]
    alone = server.infer(good, "floats")[0]
    for index in (0, 1, 3):
        np.testing.assert_array_equal(answers[index], alone)
    after = counters(server, "floats")
    assert after["nv_inference_exec_count"] - before["nv_inference_exec_count"] < 5


def test_an_overloaded_model_says_so(server: Server, purifier: Purifier, images: Array) -> None:
    """One image at a time and one place to wait: of sixteen clients many are sent away, and none gets rubbish."""
    together = threading.Barrier(16)

    def client(number: int) -> str:
        together.wait(30)
        try:
            clean, _ = server.infer(images[number : number + 1], "narrow")
        except InferenceServerException as error:
            return str(error)
        np.testing.assert_array_equal(clean, purifier(images[number : number + 1]))
        return ""

    with ThreadPoolExecutor(16) as pool:
        answers = [answer for _ in range(5) for answer in pool.map(client, range(16))]
    assert "" in answers
    refused = [answer for answer in answers if answer]
    assert refused
    assert all("maximum queue size" in answer for answer in refused), refused
    assert server.infer(images[:1], "narrow")[0].shape == (1, 28, 28, 1)


def test_the_log_says_which_engine(server: Server) -> None:
    assert re.search(r"purifier: openvino on cpu in (bf16|fp32), asked for by name", server.log.read_text())


@pytest.mark.parametrize("backend", ["python", "onnx"])
def test_the_configuration_is_one_that_triton_reads(tmp_path: Path, checkpoint_path: Path, backend: Any) -> None:
    written = write_model(tmp_path, checkpoint_path, backend=backend, batching=Batching(32, (4, 8), 300, 77))
    parsed = text_format.Parse((written / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (parsed.name, parsed.max_batch_size) == ("purifier", 32)
    assert parsed.backend == {"python": "python", "onnx": "onnxruntime"}[backend]
    assert list(parsed.input[0].dims) == [28, 28, 1]
    assert [output.name for output in parsed.output] == ["purified", "score"]
    batching = parsed.dynamic_batching
    assert list(batching.preferred_batch_size) == [4, 8]
    assert batching.max_queue_delay_microseconds == 300
    assert batching.default_queue_policy.max_queue_size == 77


def test_a_model_that_cannot_run_says_why(tmp_path: Path, checkpoint_path: Path) -> None:
    """Stock backends that this wheel has not, and a checkpoint that was exchanged: the server starts and names them."""
    repository = tmp_path / "models"
    write_model(repository, checkpoint_path, name="graph", backend="onnx")
    changed = write_model(repository, checkpoint_path, name="changed")
    (changed / "config.pbtxt").write_text(
        re.sub(r'("digest" value \{ string_value: )"\w+"', r'\1"0123"', (changed / "config.pbtxt").read_text())
    )
    ports = free_ports(1)
    log = tmp_path / "server.log"
    options = [
        f"--http-port={ports[0]}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false",
        "--exit-on-error=false", "--strict-readiness=false", "--exit-timeout-secs=5",
    ]  # fmt: skip
    with log.open("wb") as file, triton_launcher.running(repository, options, log=file.fileno()) as process:
        wait_until_ready(f"127.0.0.1:{ports[0]}", process, log)
        index = requests.post(f"http://127.0.0.1:{ports[0]}/v2/repository/index", timeout=30).json()
    reasons = {one["name"]: one["reason"] for one in index}
    assert "onnxruntime" in reasons["graph"], "the configuration is good, the backend is missing"
    assert "expected the checkpoint 0123, got" in reasons["changed"]


def test_the_launcher_ends_its_server_when_it_is_ended(tmp_path: Path, checkpoint_path: Path) -> None:
    write_model(tmp_path / "models", checkpoint_path, engine="openvino")
    [port] = free_ports(1)
    command = [sys.executable, "-m", "defense_vae_fast.integrations.triton_launcher", str(tmp_path / "models")]
    options = [f"--http-port={port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false"]
    options += ["--exit-timeout-secs=5"]
    log = tmp_path / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file)
        try:
            wait_until_ready(f"127.0.0.1:{port}", process, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
            process.wait()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/v2/health/live", timeout=5)
