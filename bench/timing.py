"""Time of work on a device, without the time of asking for it where a CUDA graph does the asking."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

L2_BYTES = 256 * 2**20  # more than any GPU's cache holds


def rotation(bytes_a_call: int) -> int:
    """How many inputs have to take turns so that none is still in a cache when its turn comes."""
    return max(2, min(64, L2_BYTES // bytes_a_call))


def seconds(call: Callable[[int], object], *, device: str, calls: int, rounds: int, graph: bool) -> list[float]:
    """Seconds of one call in each of ``rounds``, in which ``calls`` are made one after another.

    Args:
        call: the work; it is given the number of the turn.
        device: where the work is done.
        calls: calls a round.
        rounds: measurements.
        graph: capture a round as one CUDA graph.
    """
    assert not (graph and device == "cpu")
    for turn in range(3):
        call(turn)

    def one_round() -> None:
        for turn in range(calls):
            call(turn)

    if graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            one_round()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            one_round()
        run = captured.replay
    else:
        run = one_round
    run()
    return [_timed(run, device) / calls for _ in range(rounds)]


def copy_bandwidth(device: str, bytes_copied: int = 2**30) -> float:
    """Bytes a second that a copy within the device's memory reads and writes, together."""
    source = torch.empty(bytes_copied // 4, device=device)
    target = torch.empty_like(source)
    spent = seconds(lambda turn: target.copy_(source), device=device, calls=10, rounds=5, graph=False)
    return 2 * bytes_copied / sorted(spent)[2]


def same(tensor: Tensor, other: Tensor) -> float:
    """Root of the mean squared difference."""
    return float((tensor.double() - other.double()).square().mean().sqrt())


def _timed(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
