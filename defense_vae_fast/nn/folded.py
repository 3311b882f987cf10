"""The network as engines run it: BatchNorm folded in, ``logvar`` left out, and each layer in its fastest form.

A layer can be computed in several ways that differ by rounding alone: convolution, bias and ReLU one after the other,
or as one cuDNN operation; a transposed convolution as it stands, or as an ordinary one whose output is shuffled. Which
is fastest depends on GPU, cuDNN and batch size (one operation in the place of two has been seen to be slower, see
https://github.com/pytorch/pytorch/issues/68506), so on CUDA they are tried, as cuDNN tries its kernels.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from defense_vae_fast.architecture import Layer
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.onnx_graph import TILE, as_convolution, fold

Step = Callable[[Tensor], Tensor]
Float64 = npt.NDArray[np.float64]

PLAIN = "plain"
"""The form that every layer has; on the CPU the only one."""
# How far from the plain form another may be, as a share of its largest value. In float32 less than TF32 would make.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_WARM_UP, _CALLS = 3, 10

_log = logging.getLogger(__name__)


class FoldedNetwork:
    """(N, C, H, W) images in [0, 1] of its dtype -> logits of the same shape and dtype, from the mean latent.

    Args:
        checkpoint: the purifier.
        dtype: of weights, activations and logits.
        device: where.
        plain: compute every layer in its plain form, on CUDA too.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, plain: bool = False
    ) -> None:
        self.dtype = dtype
        last = checkpoint.config.encoder[-1]
        bottom = (last.out_channels, last.out_size, last.out_size)
        self._steps: list[Step] = []
        self._layers: list[_Layer] = []
        for layer in checkpoint.config.layers():
            if layer.name == "logvar":
                continue
            weight, bias = fold(layer, checkpoint.tensors)
            if layer.name == "mu":
                self._steps.append(lambda x: x.flatten(1))
            tiled = layer.kind == "conv_transpose" and layer.stride == 1
            if tiled:
                layer, weight, bias = as_convolution(layer, weight, bias)
            made = forms(layer, weight, bias, dtype, device, plain=plain or device.type == "cpu")
            self._layers.append(_Layer(layer, made))
            self._steps.append(self._layers[-1])
            if tiled:
                self._steps.append(lambda x: F.pixel_shuffle(x, TILE))
            if layer.part == "decoder" and layer.kind == "linear":
                self._steps.append(lambda x: x.reshape(-1, *bottom).contiguous(memory_format=torch.channels_last))

    def __call__(self, x: Tensor) -> Tensor:
        """Images -> logits; on CUDA the first call with a batch size tries the forms, and waits for the device."""
        for step in self._steps:
            x = step(x)
        return x

    def chosen(self) -> dict[int, dict[str, str]]:
        """The forms that are not plain, by batch size and layer, of the batch sizes that were run."""
        found: dict[int, dict[str, str]] = {}
        for layer in self._layers:
            for size, form in sorted(layer.chosen.items()):
                if form != PLAIN:
                    found.setdefault(size, {})[layer.name] = form
        return found

    def settle(self) -> None:
        """Drop the weights of forms that no batch size has chosen; others than those must not come any more."""
        for layer in self._layers:
            layer.settle()


class _Layer:
    """A layer in the fastest of its forms for the batch at hand."""

    def __init__(self, layer: Layer, made: dict[str, Step]) -> None:
        self.name = layer.name
        self.chosen: dict[int, str] = {}
        self._layer, self._forms = layer, made

    def __call__(self, x: Tensor) -> Tensor:
        size = len(x)
        if size not in self.chosen:
            self.chosen[size] = PLAIN if len(self._forms) == 1 else _remembered(self._layer, self._forms, x)
        return self._forms[self.chosen[size]](x)

    def settle(self) -> None:
        used = set(self.chosen.values())
        self._forms = {name: form for name, form in self._forms.items() if name in used}


def forms(
    layer: Layer, weight: Float64, bias: Float64, dtype: torch.dtype, device: torch.device, *, plain: bool = False
) -> dict[str, Step]:
    """All forms of a folded layer by name, the plain one first; with ``plain`` that one alone.

    ``fused`` is convolution, bias and ReLU as one operation, ``sub-pixel`` a transposed convolution of stride 2 as a
    fused convolution that makes two by two pixels at once (:func:`as_subpixel`).
    """
    made = {PLAIN: _plain(layer, *_tensors(weight, bias, dtype, device))}
    if plain or layer.activation != "relu":
        return made
    if layer.kind == "conv":
        made["fused"] = _fused(layer.stride, layer.padding, *_tensors(weight, bias, dtype, device))
    elif layer.kind == "conv_transpose" and layer.stride == 2:
        padding, weight, bias = as_subpixel(layer, weight, bias)
        convolution = _fused(1, padding, *_tensors(weight, bias, dtype, device))
        made["sub-pixel"] = lambda x: _shuffle(convolution(x))
    return made


def as_subpixel(layer: Layer, weight: Float64, bias: Float64) -> tuple[int, Float64, Float64]:
    """A transposed convolution of stride 2 and an even kernel, as an ordinary convolution of stride 1.

    Output pixel 2q + r of an axis is a sum over inputs q + (r + padding - k) / 2, for those k for which that is whole:
    two neighbouring outputs see k / 2 + 1 neighbouring inputs between them. The convolution makes both, of both axes,
    as four times the channels; more than half of its taps are zero.

    Args:
        layer: a row of the layer table.
        weight: its folded weight (in, out, k, k).
        bias: its folded bias (out,).

    Returns:
        Padding, weight (4 * out, in, k / 2 + 1, k / 2 + 1) and bias; output channels ordered as (row, column, out).
    """
    taps = [
        (r, k, (r + layer.padding - k) // 2)
        for r in range(2)
        for k in range(layer.kernel)
        if not (r + layer.padding - k) % 2
    ]
    first = min(offset for _, _, offset in taps)
    side = layer.kernel // 2 + 1
    spread = np.zeros((2, 2, layer.out_channels, layer.in_channels, side, side))
    for row, down, y in taps:
        for column, right, x in taps:
            spread[row, column, :, :, y - first, x - first] = weight[:, :, down, right].T
    return -first, spread.reshape(-1, layer.in_channels, side, side), np.tile(bias, 4)


def _plain(layer: Layer, weight: Tensor, bias: Tensor) -> Step:
    relu = layer.activation == "relu"

    def step(x: Tensor) -> Tensor:
        if layer.kind == "linear":
            x = F.linear(x, weight, bias)
        elif layer.kind == "conv":
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding)
        else:
            x = F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding)
        return x.relu_() if relu else x

    return step


def _fused(stride: int, padding: int, weight: Tensor, bias: Tensor) -> Step:
    """Convolution, bias and ReLU as one operation where cuDNN has it; its twin on the CPU is the same in three."""
    if not weight.is_cuda:
        return lambda x: F.conv2d(x, weight, bias, stride, padding).relu_()
    strides, paddings = (stride, stride), (padding, padding)
    return lambda x: torch.cudnn_convolution_relu(x, weight, bias, strides, paddings, (1, 1), 1)


def _shuffle(x: Tensor) -> Tensor:
    """(N, (row, column, C), H, W) -> (N, C, 2H, 2W), both channels_last: whole runs of channels are copied."""
    count, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(count, height, width, 2, 2, channels // 4)
    return pixels.transpose(2, 3).reshape(count, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)


def _tensors(weight: Float64, bias: Float64, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    made = torch.from_numpy(weight).to(device, dtype)
    if made.ndim == 4:
        # With one channel ``contiguous`` finds either layout in place, and convolutions then take it for the other.
        made = torch.empty_like(made, memory_format=torch.channels_last).copy_(made)
    return made, torch.from_numpy(bias).to(device, dtype)


# Chosen once a process, so that two engines, and two streams of one, give the same bytes.
_choices: dict[Any, str] = {}
_choosing = threading.Lock()


def _remembered(layer: Layer, made: Mapping[str, Step], x: Tensor) -> str:
    key = (layer, x.dtype, x.device, x.shape, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    with _choosing:
        if key not in _choices:
            _choices[key] = fastest(layer.name, made, x)
        return _choices[key]


def fastest(
    name: str, made: Mapping[str, Step], like: Tensor, seconds: Callable[[Step, Tensor], float] | None = None
) -> str:
    """The fastest of a layer's forms among those that run and agree with the first, on random images.

    Args:
        name: the layer's, for the log.
        made: its forms, the first one the measure of the others.
        like: a tensor of the shape, dtype, layout and device of its input.
        seconds: times a form; by CUDA events where None.
    """
    # From a generator of its own: torch's random state is the caller's.
    generator = torch.Generator(like.device).manual_seed(0)
    x = torch.empty_like(like).uniform_(generator=generator)
    (first, plain), *others = made.items()
    expected = plain(x).clone()
    bound = TOLERANCES.get(x.dtype, 1e-9) * float(expected.abs().max())
    times = {first: (seconds or _cuda_seconds)(plain, x)}
    for form, step in others:
        try:
            # The memory that the allocator hands out next: cuDNN is given the output as an addend that counts nothing,
            # and NaN times 0 would be NaN.
            torch.full_like(expected, float("nan"))
            error = float((step(x) - expected).abs().max())
            if not error <= bound:
                _log.warning("%s: form %s differs by %g, more than %g; it is not used", name, form, error, bound)
                continue
            times[form] = (seconds or _cuda_seconds)(step, x)
        except RuntimeError as problem:
            _log.info("%s: form %s does not run here: %s", name, form, problem)
    _log.info("%s for %d images: %s", name, len(x), {form: f"{1e6 * spent:.1f} us" for form, spent in times.items()})
    return min(times, key=lambda form: times[form])


def _cuda_seconds(step: Step, x: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(_WARM_UP):
        step(x)
    start.record()
    for _ in range(_CALLS):
        step(x)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / _CALLS
