"""The torch engine: the folded network in channels_last, for programs that already have torch or a CUDA device."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines.base import (
    DEFAULT_MAX_BATCH,
    DeviceMemoryError,
    Engine,
    EngineUnavailable,
    ImageKind,
    Images,
    Result,
    Scores,
    check_choice,
    check_count,
)
from defense_vae_fast.engines.buckets import bucket_of, buckets_for, cut
from defense_vae_fast.engines.pieces import Lane, Piece, nothing, run_pieces

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from defense_vae_fast.nn.folded import FoldedNetwork

_STREAMS = 2  # on CUDA: one copies while the other computes
_MAX_STREAMS = 16
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class TorchEngine(Engine):
    """torch on the CPU or on CUDA, BatchNorm folded, without gradients (``nn.DefenseVAE`` is the differentiable twin).

    "auto" is fp16 on CUDA, bf16 on a CPU that multiplies it natively (1.3 times as fast as fp32 for a single image, 1.6
    times for 64), and fp32 on any other.

    On CUDA each of ``streams`` workers has a stream, pinned and device buffers, and a CUDA graph for every batch
    bucket, all made at load; a large batch is spread over them, so that copies and computing overlap. Each layer is
    computed in the form that was fastest at load (:mod:`defense_vae_fast.nn.folded`): convolution, bias and ReLU as one
    cuDNN operation, or apart; a transposed convolution as it stands, or as a convolution with a shuffle.
    """

    name = "torch"
    devices = ("cpu", "cuda")
    precisions = ("fp32", "bf16", "fp16")
    dynamic_batch = True
    differentiable = False
    extra = "torch"

    tensor_device: str
    """The whole name of the device whose tensors :meth:`run_tensor` takes: "cpu", "cuda:0"."""

    def __init__(
        self, checkpoint: Checkpoint, precision: str, device: torch.device, max_batch: int, streams: int
    ) -> None:
        super().__init__(checkpoint, precision, device.type, max_batch)
        self.streams = streams
        self._device = device
        self.tensor_device = str(device)
        self._network = _network(checkpoint, precision, device)
        self._lane: Lane[_CPUSlot] | Lane[_CUDASlot]
        if device.type == "cpu":
            self._buckets: tuple[int, ...] = (max_batch,)
            # One batch at a time has all cores; more at once would only share them.
            self._lane = Lane([_CPUSlot(self._network)])
        else:
            self._buckets = buckets_for(max_batch)
            self._lane = Lane(_cuda_slots(self._network, device, self._shapes, self._buckets, streams))

    @classmethod
    def available(cls, device: str = "auto") -> str | None:
        """None when torch is installed (and, asked for "cuda", sees such a device), otherwise what is missing."""
        if device not in ("auto", *cls.devices):
            return f"it runs on {', '.join(cls.devices)}, not on {device}"
        if importlib.util.find_spec("torch") is None:
            return f"the package torch is not installed; install it with: pip install 'defense-vae-fast[{cls.extra}]'"
        try:
            import torch
        except (ImportError, OSError) as error:  # installed, but broken
            return (
                f"the package torch does not import ({error}); "
                f"install it again: pip install --force-reinstall 'defense-vae-fast[{cls.extra}]'"
            )
        if device == "cuda" and not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device; it takes a CUDA build and an NVIDIA driver"
        return None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        precision: str = "auto",
        device: str = "auto",
        max_batch: int = DEFAULT_MAX_BATCH,
        streams: int | None = None,
    ) -> Self:
        """See :meth:`Engine.load`. On the CPU one batch is worked on at a time: ``streams`` is None or 1.

        "cuda" is torch's current CUDA device at this moment, whichever is current later.
        """
        check_choice("device", device, cls.devices, cls.name)
        check_choice("precision", precision, cls.precisions, cls.name)
        check_count("max_batch", max_batch)
        if reason := cls.available(device):
            raise EngineUnavailable(f"the {cls.name} engine cannot work here: {reason}")
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if streams is None:
            streams = 1 if device == "cpu" else _STREAMS
        check_count("streams", streams, limit=1 if device == "cpu" else _MAX_STREAMS)
        if precision == "auto":
            precision = "fp16" if device == "cuda" else "bf16" if cpu_has_bf16() else "fp32"
        elif precision == "fp16" and device == "cpu":
            raise ValueError(
                "precision: expected 'auto', 'fp32' or 'bf16' on the CPU, got 'fp16'; it would be emulated"
            )
        place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        try:
            return cls(checkpoint, precision, place, max_batch, streams)
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"the {cls.name} engine does not fit into the memory of {place}: {error}; "
                "free some, or use a smaller max_batch or fewer streams"
            ) from error

    def run(self, batch: Images, out: Images | None = None) -> Result:
        """See :meth:`Engine.run`."""

        with self._calling():
            self._kind(batch)
            purified = self._output(batch, out)
            scores = np.empty(len(batch), np.float32)
            run_pieces(self._pieces(len(batch)), batch, purified, scores)
            return purified, scores

    def run_tensor(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`run` for a tensor that is on the engine's device already; nothing passes through the host.

        On CUDA the work takes its place in the order of the current stream; this returns without waiting for it.

        Args:
            images: uint8 (N, H, W, C), or float32 (N, C, H, W) in [0, 1].

        Returns:
            Fresh tensors on the same device, without gradients: purified images like ``images``, float32 (N,) scores.

        Raises:
            ValueError: a wrong device, dtype or shape.
            RuntimeError: the engine is closed.
        """
        import torch

        kind = {torch.float32: "float", torch.uint8: "uint8"}.get(images.dtype)
        shape = self._shapes["uint8" if kind == "uint8" else "float"]
        if kind is None or tuple(images.shape[1:]) != shape or len(images) == 0 or images.device != self._device:
            raise ValueError(
                f"images: expected uint8 (N, {', '.join(map(str, self._shapes['uint8']))}) or float32 "
                f"(N, {', '.join(map(str, self._shapes['float']))}) on {self._device} with N at least 1, "
                f"got {images.dtype} {tuple(images.shape)} on {images.device}; convert or move it"
            )
        with self._calling(), torch.no_grad():
            purified = torch.empty_like(images, memory_format=torch.contiguous_format)
            scores = torch.empty(len(images), device=self._device)
            for lane, start, stop in self._pieces(len(images)):
                slot = lane.free.get()
                try:
                    slot.run_tensor(images[start:stop], purified[start:stop], scores[start:stop])
                finally:
                    lane.free.put(slot)
            return purified, scores

    def info(self) -> dict[str, Any]:
        """See :meth:`Engine.info`; adds streams, batch buckets, by batch size the layers that are not
        computed in the plain form, the device's name and torch's version."""
        import torch

        on_gpu = self.device == "cuda"
        return {
            **super().info(),
            "streams": self.streams,
            "buckets": list(self._buckets),
            "forms": self._network.chosen(),
            "device_name": torch.cuda.get_device_name(self._device)
            if on_gpu
            else torch.backends.cpu.get_cpu_capability(),
            "versions": {"torch": str(torch.__version__)},
        }

    def _pieces(self, count: int) -> Iterator[Piece]:
        for start, stop in cut(count, self._buckets, self.streams):
            yield self._lane, start, stop

    def _release(self) -> None:
        while (slot := self._lane.try_acquire()) is not None:
            slot.close()
        del self._lane, self._network


class _CPUSlot:
    """A piece that is computed by whoever waits for it."""

    def __init__(self, network: FoldedNetwork) -> None:
        self._network = network
        self._batch: Images | None = None

    def start(self, batch: Images) -> None:
        """Keep the images; torch wants writable memory even where it only reads."""
        self._batch = batch if batch.flags.writeable else batch.copy()

    def finish(self, purified: Images, scores: Scores) -> None:
        """Compute."""
        import torch

        batch, self._batch = self._batch, None
        assert batch is not None
        with torch.no_grad():
            self.run_tensor(*map(torch.from_numpy, (batch, purified, scores)))

    def abandon(self) -> None:
        """Forget the images."""
        self._batch = None

    def close(self) -> None:
        """Nothing is held that the engine does not hold."""

    def run_tensor(self, images: torch.Tensor, purified: torch.Tensor, scores: torch.Tensor) -> None:
        """Compute from and into tensors."""
        clean, score = _purify(self._network, images)
        purified.copy_(clean)
        scores.copy_(score)


class _CUDASlot:
    """One worker: a stream, and for each kind of images and bucket its buffers and graph."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch = torch
        self._device = device
        self._stream = _idle_streams.take(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps: dict[tuple[torch.dtype, int], _GraphStep] = {}
        self._buckets: dict[torch.dtype, list[int]] = {}
        self._host: dict[np.dtype[Any], tuple[torch.Tensor, torch.Tensor]] = {}
        self._views: dict[np.dtype[Any], tuple[Images, Images]] = {}
        self._host_scores: torch.Tensor
        self._score_view: Scores
        self._flying: tuple[np.dtype[Any], int] | None = None

    def prepare(self, network: FoldedNetwork, images: torch.Tensor) -> None:
        """Warm up and capture for batches like ``images``, which become the bucket's own input buffer."""
        torch = self._torch
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(3):  # the first picks cuDNN's kernels, and captures must find everything chosen
                _purify(network, images)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and copy meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                clean, score = _purify(network, images)
        self._steps[images.dtype, len(images)] = _GraphStep(graph, images, clean, score)
        self._buckets.setdefault(images.dtype, []).append(len(images))
        pinned = [torch.empty(images.shape, dtype=images.dtype, pin_memory=True) for _ in range(2)]
        view = pinned[0].numpy()
        # Buckets come in ascending order, so the last buffers are the largest, and every bucket uses those.
        self._host[view.dtype] = (pinned[0], pinned[1])
        self._views[view.dtype] = (view, pinned[1].numpy())
        self._host_scores = torch.empty(len(images), pin_memory=True)
        self._score_view = self._host_scores.numpy()

    def start(self, batch: Images) -> None:
        """Copy the images to pinned memory and queue copy, graph and copy."""
        self._views[batch.dtype][0][: len(batch)] = batch
        self._queue(batch.dtype, len(batch))
        self._flying = (batch.dtype, len(batch))

    def _queue(self, dtype: np.dtype[Any], count: int, between: Callable[[], None] = nothing) -> None:
        torch = self._torch
        given, result = self._host[dtype]
        step = self._step(given.dtype, count)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            between()
            step.images[:count].copy_(given[:count], non_blocking=True)
            between()
            step.graph.replay()
            between()
            result[:count].copy_(step.purified[:count], non_blocking=True)
            self._host_scores[:count].copy_(step.scores[:count], non_blocking=True)
            between()

    def finish(self, purified: Images, scores: Scores) -> None:
        """Wait for the stream, and copy the results out."""
        assert self._flying is not None
        dtype, count = self._flying
        self._stream.synchronize()
        purified[...] = self._views[dtype][1][:count]
        scores[...] = self._score_view[:count]

    def abandon(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def close(self) -> None:
        """Free graphs and buffers, and leave the stream to another slot; this one is of no use any more."""
        self._steps.clear()
        _idle_streams.give(self._device, self._stream)

    def run_tensor(self, images: torch.Tensor, purified: torch.Tensor, scores: torch.Tensor) -> None:
        """Queue the work between what the caller's stream holds already and what it is given next."""
        torch, count = self._torch, len(images)
        step = self._step(images.dtype, count)
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            step.images[:count].copy_(images)
            step.graph.replay()
            purified.copy_(step.purified[:count])
            scores.copy_(step.scores[:count])
        # The caller's stream goes on after this, so memory that it frees or reuses is not touched any more.
        caller.wait_stream(self._stream)

    def _step(self, dtype: torch.dtype, count: int) -> _GraphStep:
        return self._steps[dtype, bucket_of(count, self._buckets[dtype])]


class _GraphStep(NamedTuple):
    """A captured graph and the tensors that it reads and writes; uint8 (N, H, W, C) or float32 (N, C, H, W)."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    purified: torch.Tensor
    scores: torch.Tensor


def _cuda_slots(
    network: FoldedNetwork,
    device: torch.device,
    shapes: Mapping[ImageKind, tuple[int, int, int]],
    buckets: Sequence[int],
    streams: int,
) -> list[_CUDASlot]:
    """Workers with a graph for every kind and bucket.

    All are captured by this thread, one after the other: cuDNN's choice of kernels is remembered by the thread, and
    with one choice a bucket gives the same bytes on every stream.
    """
    import torch

    slots = [_CUDASlot(device) for _ in range(streams)]
    dtypes = {"float": torch.float32, "uint8": torch.uint8}
    try:
        with torch.no_grad(), _cudnn_choice, _without_tf32 if network.dtype == torch.float32 else nullcontext():
            for kind, shape in shapes.items():
                for bucket in buckets:
                    for slot in slots:
                        slot.prepare(network, torch.zeros((bucket, *shape), dtype=dtypes[kind], device=device))
        torch.cuda.synchronize(device)
    except BaseException:
        for slot in slots:
            slot.close()
        raise
    network.settle()
    return slots


class _IdleStreams:
    """Streams that closed engines have left, for the next ones.

    cuBLAS keeps a workspace for every stream that it has ever worked on, 32 MiB on Hopper. With new streams every
    engine that is loaded and closed would cost that for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[torch.device, list[torch.cuda.Stream]] = {}

    def take(self, device: torch.device) -> torch.cuda.Stream:
        """The stream that was left last, or a new one."""
        import torch

        with self._lock:
            idle = self._idle.get(device)
            if idle:
                return idle.pop()
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def give(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """Leave a stream that nobody puts work on any more."""
        with self._lock:
            self._idle.setdefault(device, []).append(stream)


class _Setting(ABC):
    """A setting of torch's, which is the whole process's own, changed while any engine needs it and then put back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = None

    @abstractmethod
    def _change(self) -> Any:
        """Change it, and give what it was."""

    @abstractmethod
    def _restore(self, before: Any) -> None:
        """Put it back."""

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self._change()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore(self._before)


class _WithoutTF32(_Setting):
    """Convolutions and matrix products on CUDA in whole float32; torch's convolutions round to TF32 otherwise.

    A kernel is chosen when it is launched or captured, so this is needed while graphs are captured, not when they run.
    Other threads meanwhile calculate more exactly than they asked for, never less.
    """

    def _change(self) -> Any:
        settings = _fp32_settings()
        before = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = "ieee"
        return before

    def _restore(self, before: Any) -> None:
        for setting, value in zip(_fp32_settings(), before, strict=True):
            setting.fp32_precision = value


class _CuDNNChoice(_Setting):
    """cuDNN times its kernels for each shape and keeps the fastest; its guess is often a slower one."""

    def _change(self) -> Any:
        import torch

        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        return before

    def _restore(self, before: Any) -> None:
        import torch

        torch.backends.cudnn.benchmark = before


def _fp32_settings() -> tuple[Any, Any]:
    """torch's settings of convolutions and of matrix products on CUDA; its stubs lack the first."""
    import torch

    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, torch.backends.cuda.matmul


_idle_streams = _IdleStreams()
_without_tf32 = _WithoutTF32()
_cudnn_choice = _CuDNNChoice()


def _network(checkpoint: Checkpoint, precision: str, device: torch.device) -> FoldedNetwork:
    import torch

    from defense_vae_fast.nn.folded import FoldedNetwork

    return FoldedNetwork(checkpoint, getattr(torch, _DTYPES[precision]), device)


def _purify(network: FoldedNetwork, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    as_bytes = images.dtype == torch.uint8
    pixels = images.permute(0, 3, 1, 2).float().mul_(1 / 255) if as_bytes else images
    x = pixels.to(network.dtype).contiguous(memory_format=torch.channels_last)
    purified = network(x).float().sigmoid_()
    scores = (pixels - purified).abs_().mean((1, 2, 3))
    if as_bytes:
        purified = purified.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1)
    return purified.contiguous(), scores


def cpu_has_bf16() -> bool:
    """Whether torch's CPU kernels multiply bf16 natively (AVX512-BF16 or AMX)."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
