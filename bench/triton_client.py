"""Closed-loop clients of a Triton server: each sends an image, waits for the answer, sends the next.

The client shares the machine with the server, so it is as small as it can be: prepared requests over one open socket.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass
class Load:
    """What clients saw in one stretch of time."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    wrong: int = 0


def request(host: str, model: str, image: Array) -> bytes:
    """An inference request with one uint8 (H, W, C) image, binary both ways."""
    inputs = {
        "name": "images", "datatype": "UINT8", "shape": [1, *image.shape],
        "parameters": {"binary_data_size": image.nbytes},
    }  # fmt: skip
    head = json.dumps({"inputs": [inputs], "parameters": {"binary_data_output": True}}).encode()
    lines = (
        f"POST /v2/models/{model}/infer HTTP/1.1", f"Host: {host}", f"Inference-Header-Content-Length: {len(head)}",
        f"Content-Length: {len(head) + image.nbytes}", "", "",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + head + image.tobytes()


class Client:
    """One connection."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def ask(self, prepared: bytes) -> tuple[bytes, bytes]:
        """The answer's JSON and the bytes after it.

        Raises:
            RuntimeError: the server answers with an error.
        """
        self._socket.sendall(prepared)
        status = self._file.readline()
        lengths = {"content-length": 0, "inference-header-content-length": 0}
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if (known := name.decode().lower()) in lengths:
                lengths[known] = int(value)
        body = self._file.read(lengths["content-length"])
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r}: {body[:200]!r}")
        head = lengths["inference-header-content-length"]
        return body[:head], body[head:]

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


def drive(address: str, prepared: Sequence[bytes], expected: Sequence[bytes], clients: int, seconds: float) -> Load:
    """``clients`` at once for some seconds; answers are compared with ``expected``, purified image and score."""
    load = Load(seconds)
    together = threading.Barrier(clients)
    until = [0.0]
    lock = threading.Lock()

    def loop(first: int) -> None:
        client = Client(address)
        latencies, wrong, turn = [], 0, first
        together.wait(30)
        until[0] = until[0] or time.perf_counter() + seconds
        while (start := time.perf_counter()) < until[0]:
            _, answer = client.ask(prepared[turn % len(prepared)])
            latencies.append(time.perf_counter() - start)
            wrong += answer != expected[turn % len(prepared)]
            turn += clients
        client.close()
        with lock:
            load.latencies += latencies
            load.wrong += wrong

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load
