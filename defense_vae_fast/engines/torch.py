"""The torch engine: the folded network in channels_last, for programs that already have torch or a CUDA device."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from defense_vae_fast.architecture import Layer
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines.base import (
    DEFAULT_MAX_BATCH,
    Engine,
    EngineUnavailable,
    Images,
    Result,
    check_choice,
    check_count,
)

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    Step = Callable[[torch.Tensor], torch.Tensor]

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class TorchEngine(Engine):
    """torch on the CPU or on CUDA, BatchNorm folded, without gradients (``nn.DefenseVAE`` is the differentiable twin).

    "auto" is fp16 on CUDA, bf16 on a CPU that multiplies it natively (1.3 times as fast as fp32 for a single image, 1.6
    times for 64), and fp32 on any other.
    """

    name = "torch"
    devices = ("cpu", "cuda")
    precisions = ("fp32", "bf16", "fp16")
    dynamic_batch = True
    differentiable = False
    extra = "torch"

    tensor_device: str
    """The whole name of the device whose tensors :meth:`run_tensor` takes: "cpu", "cuda:0"."""

    def __init__(self, checkpoint: Checkpoint, precision: str, device: torch.device, max_batch: int) -> None:
        super().__init__(checkpoint, precision, device.type, max_batch)
        self._device = device
        self.tensor_device = str(device)
        self._network = _Network(checkpoint, precision, device)
        # One batch at a time has all cores, or the device; more at once would only share them.
        self._turn = threading.Lock()

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
        """See :meth:`Engine.load`. One batch is worked on at a time: ``streams`` is None or 1.

        "cuda" is torch's current CUDA device at this moment, whichever is current later.
        """
        check_choice("device", device, cls.devices, cls.name)
        check_choice("precision", precision, cls.precisions, cls.name)
        check_count("max_batch", max_batch)
        if streams is not None:
            check_count("streams", streams, limit=1)
        if reason := cls.available(device):
            raise EngineUnavailable(f"the {cls.name} engine cannot work here: {reason}")
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if precision == "auto":
            precision = "fp16" if device == "cuda" else "bf16" if _cpu_has_bf16() else "fp32"
        elif precision == "fp16" and device == "cpu":
            raise ValueError(
                "precision: expected 'auto', 'fp32' or 'bf16' on the CPU, got 'fp16'; it would be emulated"
            )
        place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        return cls(checkpoint, precision, place, max_batch)

    def run(self, batch: Images, out: Images | None = None) -> Result:
        """See :meth:`Engine.run`."""
        import torch

        with self._calling():
            self._kind(batch)
            purified = self._output(batch, out)
            scores = np.empty(len(batch), np.float32)
            with self._turn, torch.no_grad():
                # torch wants writable memory even where it only reads.
                source = torch.from_numpy(batch if batch.flags.writeable else batch.copy()).to(self._device)
                clean, score = self._purify(source)
                torch.from_numpy(purified).copy_(clean)
                torch.from_numpy(scores).copy_(score)
            return purified, scores

    def run_tensor(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`run` for a tensor that is on the engine's device already; nothing passes through the host.

        On CUDA the work is queued on the current stream.

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
        with self._calling(), self._turn, torch.no_grad():
            return self._purify(images)

    def info(self) -> dict[str, Any]:
        """See :meth:`Engine.info`; adds the device's name and torch's version."""
        import torch

        on_gpu = self.device == "cuda"
        return {
            **super().info(),
            "streams": 1,
            "device_name": torch.cuda.get_device_name(self._device)
            if on_gpu
            else torch.backends.cpu.get_cpu_capability(),
            "versions": {"torch": str(torch.__version__)},
        }

    def _purify(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        starts = range(0, len(images), self.max_batch)
        exact = self.device == "cuda" and self.precision == "fp32"
        with _without_tf32 if exact else nullcontext():
            parts = [_purify(self._network, images[start : start + self.max_batch]) for start in starts]
        if len(parts) == 1:
            return parts[0]
        clean, scores = zip(*parts, strict=True)
        return torch.cat(clean), torch.cat(scores)

    def _release(self) -> None:
        del self._network


class _WithoutTF32:
    """Convolutions and matrix products on CUDA in whole float32; torch's convolutions round to TF32 otherwise.

    torch's settings are the process's own, so they are changed while any engine is inside and put back by the last that
    leaves. Other threads meanwhile calculate more exactly than they asked for, never less. A kernel is chosen when it
    is launched, so nothing need be waited for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[str, str] = ("none", "none")

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                convolution, product = _fp32_settings()
                self._before = convolution.fp32_precision, product.fp32_precision
                convolution.fp32_precision = product.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                convolution, product = _fp32_settings()
                convolution.fp32_precision, product.fp32_precision = self._before


def _fp32_settings() -> tuple[Any, Any]:
    """torch's settings of convolutions and of matrix products on CUDA; its stubs lack the first."""
    import torch

    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, torch.backends.cuda.matmul


_without_tf32 = _WithoutTF32()


class _Network:
    """The folded network: (N, C, H, W) images in [0, 1] of its dtype -> logits of the same shape and dtype."""

    def __init__(self, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
        import torch

        from defense_vae_fast.onnx_graph import TILE, as_convolution, fold

        self.dtype: torch.dtype = getattr(torch, _DTYPES[precision])
        last = checkpoint.config.encoder[-1]
        bottom = (last.out_channels, last.out_size, last.out_size)
        self._steps: list[Step] = []
        for layer in checkpoint.config.layers():
            if layer.name == "logvar":
                continue
            weight, bias = fold(layer, checkpoint.tensors)
            if layer.name == "mu":
                self._steps.append(lambda x: x.flatten(1))
            tiled = layer.kind == "conv_transpose" and layer.stride == 1
            if tiled:
                layer, weight, bias = as_convolution(layer, weight, bias)
            self._steps.append(_step(layer, *(torch.from_numpy(v).to(device, self.dtype) for v in (weight, bias))))
            if tiled:
                self._steps.append(lambda x: torch.nn.functional.pixel_shuffle(x, TILE))
            if layer.part == "decoder" and layer.kind == "linear":
                self._steps.append(lambda x: x.reshape(-1, *bottom).contiguous(memory_format=torch.channels_last))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for step in self._steps:
            x = step(x)
        return x


def _step(layer: Layer, weight: torch.Tensor, bias: torch.Tensor) -> Step:
    import torch
    from torch.nn import functional as F

    if layer.kind != "linear":
        weight = weight.contiguous(memory_format=torch.channels_last)
    relu = layer.activation == "relu"

    def step(x: torch.Tensor) -> torch.Tensor:
        if layer.kind == "linear":
            x = F.linear(x, weight, bias)
        elif layer.kind == "conv":
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding)
        else:
            x = F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding)
        return x.relu_() if relu else x

    return step


def _purify(network: _Network, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    as_bytes = images.dtype == torch.uint8
    pixels = images.permute(0, 3, 1, 2).float().mul_(1 / 255) if as_bytes else images
    x = pixels.to(network.dtype).contiguous(memory_format=torch.channels_last)
    purified = network(x).float().sigmoid_()
    scores = (pixels - purified).abs_().mean((1, 2, 3))
    if as_bytes:
        purified = purified.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1)
    return purified.contiguous(), scores


def _cpu_has_bf16() -> bool:
    """Whether torch's CPU kernels multiply bf16 natively (AVX512-BF16 or AMX)."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
