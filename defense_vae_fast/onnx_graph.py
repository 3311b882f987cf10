"""Checkpoint -> ONNX: the one inference graph that the compiled engines share, written without torch.

BatchNorm is folded into the convolutions in float64. Precision is part of the graph (a strongly typed TensorRT network
has no other place for it), and so is the image format: float or half NCHW, or uint8 NHWC.

Eight-bit arithmetic is written as pairs of QuantizeLinear and DequantizeLinear, which engines fuse into the layers
between them. One set of scales makes an int8 graph for each kind of engine, and one in fp8. The integers differ because
x86 multiplies unsigned activations by signed weights (signed activations took 12 to 14 % longer in OpenVINO, and a ReLU
leaves half of their range unused), while TensorRT takes signed ones with zero point 0 alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from defense_vae_fast.architecture import BATCH_NORM_EPSILON, Layer, VAEConfig
from defense_vae_fast.checkpoint import Checkpoint

Precision = Literal["fp32", "fp16", "int8", "int8_fp16", "fp8_fp16"]
ImageKind = Literal["float", "uint8", "half"]

INPUT = "images"
PURIFIED = "purified"
SCORE = "score"
# Opset 17 is read by ONNX Runtime >= 1.12, OpenVINO >= 2022.2 and TensorRT >= 8.6; nothing here needs a later one.
OPSET = 17
IR_VERSION = 8
# QuantizeLinear takes fp16, and makes fp8, from opset 19 on: ONNX Runtime >= 1.15, TensorRT >= 9.
OPSET_QUANTIZED_FP16 = 19
IR_VERSION_QUANTIZED_FP16 = 9
_QUANTIZED_FP16 = ("int8_fp16", "fp8_fp16")
FLOAT8_MAX = 448  # of E4M3
TILE = 4  # every image side that VAEConfig allows is a multiple of it; one channel then fills 16 lanes

Float64 = npt.NDArray[np.float64]


def fold(layer: Layer, tensors: Mapping[str, npt.NDArray[Any]]) -> tuple[Float64, Float64]:
    """Weight and bias of a layer with its BatchNorm, if it has one, multiplied in.

    BN(Wx) = s * Wx + (b - s * mean) with s = gamma / sqrt(var + eps), from the running statistics.

    Args:
        layer: a row of the layer table.
        tensors: the checkpoint's tensors.

    Returns:
        float64 weight in ``layer.weight_shape`` and float64 bias (out_channels,).
    """
    values = {suffix: tensors[f"{layer.name}.{suffix}"].astype(np.float64) for suffix in layer.tensor_shapes()}
    weight = values["weight"]
    if not layer.batch_norm:
        return weight, values["bias"]
    scale = values["norm.weight"] / np.sqrt(values["norm.running_var"] + BATCH_NORM_EPSILON)
    shape = [1] * weight.ndim
    shape[1 if layer.kind == "conv_transpose" else 0] = layer.out_channels
    return weight * scale.reshape(shape), values["norm.bias"] - scale * values["norm.running_mean"]


def as_convolution(layer: Layer, weight: Float64, bias: Float64) -> tuple[Layer, Float64, Float64]:
    """The stride-1 transposed convolution that makes the image, as an ordinary convolution that makes it in tiles.

    A transposed convolution of stride 1 is a convolution with the kernel flipped and its channel axes swapped. With one
    to four output channels that still leaves a matrix unit 4 to 16 lanes wide mostly idle, so ``TILE`` x ``TILE``
    neighbouring pixels are made at once, as ``TILE ** 2`` channels of a convolution with stride ``TILE`` whose kernel
    holds each pixel's own kernel shifted into place. Its output goes through a pixel shuffle (depth to space, torch's
    channel order) by ``TILE``. The sums are the same; on a CPU the layer takes a quarter of the time (13.0 -> 3.4 ms
    for 64 images, bf16).

    Args:
        layer: a row of the layer table with kind ``conv_transpose`` and stride 1.
        weight: its folded weight (in, out, k, k).
        bias: its folded bias (out,).

    Returns:
        The equivalent row of kind ``conv``, its weight (out * TILE**2, in, k + TILE - 1, k + TILE - 1) and bias.
    """
    kernel = layer.kernel
    flipped = weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    side = kernel + TILE - 1
    tiled = np.zeros((layer.out_channels, TILE, TILE, layer.in_channels, side, side))
    for row, column in np.ndindex(TILE, TILE):
        tiled[:, row, column, :, row : row + kernel, column : column + kernel] = flipped
    channels = layer.out_channels * TILE**2
    convolution = replace(
        layer,
        kind="conv",
        out_channels=channels,
        out_size=layer.out_size // TILE,
        kernel=side,
        stride=TILE,
        padding=kernel - 1 - layer.padding,
    )
    return convolution, tiled.reshape(channels, layer.in_channels, side, side), bias.repeat(TILE**2)


def build(checkpoint: Checkpoint, precision: Precision = "fp32", image: ImageKind = "float") -> onnx.ModelProto:
    """The inference graph: mean latent, dynamic batch, ``logvar`` left out.

    Inputs and outputs::

        images    image="float": float32 (N, C, H, W) in [0, 1];   image="uint8": uint8 (N, H, W, C)
                  image="half": float16 (N, C, H, W) in [0, 1]
        purified  the same type and layout; uint8 is rounded to nearest
        score     float32 (N,): mean |x - x_hat| over all pixels in [0, 1] units, taken before the rounding;
                  "half" has none: its images come from the kernels in ``csrc/``, which compute it as well

    Args:
        checkpoint: the purifier.
        precision: type of the weights and of the arithmetic between the image and the last layer's logits; the sigmoid
            and the score are float32 in all. ``int8``, for OpenVINO: weights int8 by output channel, activations uint8
            by tensor (the latent int8), float32 in layers without scales. ``int8_fp16``, for TensorRT: activations
            int8, fp16 elsewhere; the first layer, with its one to four input channels, stays in fp16. ``fp8_fp16``: the
            same with 8-bit floats (E4M3), for compute capability 8.9 and up, from the same scales.
        image: what comes in and goes out.

    Raises:
        ValueError: ``precision`` or ``image`` is not one of the above, or the checkpoint has no int8 scales.
    """
    if precision not in ("fp32", "fp16", "int8", "int8_fp16", "fp8_fp16"):
        raise ValueError(f"precision: expected 'fp32', 'fp16', 'int8', 'int8_fp16' or 'fp8_fp16', got {precision!r}")
    if image not in ("float", "uint8", "half"):
        raise ValueError(f"image: expected 'float', 'uint8' or 'half', got {image!r}")
    half = precision in ("fp16", "int8_fp16", "fp8_fp16")
    if image == "half" and not half:
        raise ValueError(f"image: expected 'float' or 'uint8' with precision {precision!r}, got 'half'; use fp16")
    config = checkpoint.config
    dtype = np.dtype(np.float16 if half else np.float32)
    graph = _Graph(dtype, _quantized(checkpoint, precision), precision == "int8", precision == "fp8_fp16")

    pixels = _from_uint8(graph, config) if image == "uint8" else INPUT
    convert = half and image != "half"
    x = graph.node("Cast", [pixels], to=TensorProto.FLOAT16) if convert else pixels
    x = _network(graph, checkpoint, x)
    logits = graph.node("Cast", [x], to=TensorProto.FLOAT) if half else x
    # Sigmoid before the pixel shuffle: beside its convolution it is fused, and OpenVINO's bf16 logits stay float32.
    tiles = graph.node("Sigmoid", [logits])
    output = PURIFIED if image == "float" else None
    purified = graph.node("DepthToSpace", [tiles], output=output, blocksize=TILE, mode="CRD")
    if image == "half":
        graph.node("Cast", [purified], output=PURIFIED, to=TensorProto.FLOAT16)
        return _model(graph, checkpoint, precision, image)
    if image == "uint8":
        _to_uint8(graph, config, purified)
    error = graph.node("Abs", [graph.node("Sub", [pixels, purified])])
    axes = [1, 2, 3]
    if precision in _QUANTIZED_FP16:  # an input instead of an attribute since opset 18
        graph.node("ReduceMean", [error, graph.constant("pixels", np.array(axes))], output=SCORE, keepdims=0)
    else:
        graph.node("ReduceMean", [error], output=SCORE, axes=axes, keepdims=0)
    return _model(graph, checkpoint, precision, image)


class _Graph:
    """Nodes and constants in the order they are added."""

    def __init__(self, dtype: np.dtype[Any], amax: Mapping[str, float], unsigned: bool, fp8: bool) -> None:
        self.dtype = dtype
        self.half = dtype == np.float16
        self.amax = amax
        """Layers done in eight bits, and the largest magnitude of their input."""
        self.unsigned = unsigned
        """Whether activations after a ReLU are uint8 instead of int8."""
        self.fp8 = fp8
        """Whether the eight bits are a float."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{len(self.nodes)}", **attributes))
        return output

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        """Store a constant as it is."""
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def weight(self, name: str, value: Float64) -> str:
        """Store a weight in the graph's precision."""
        return self.constant(name, value.astype(self.dtype))

    def levels(self, name: str, value: Float64) -> str:
        """Store numbers in units of their scale as int8, or as fp8."""
        if not self.fp8:
            return self.constant(name, np.rint(value).clip(-127, 127).astype(np.int8))
        raw = float8(value)
        self.constants.append(
            helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, raw.shape, raw.tobytes(), raw=True)
        )  # fmt: skip
        return name

    @property
    def largest(self) -> int:
        """Largest number of the eight bits with a sign."""
        return FLOAT8_MAX if self.fp8 else 127


def float8(value: Float64) -> npt.NDArray[np.uint8]:
    """Bits of the nearest E4M3 numbers, ties to even, beyond 448 saturated: 4 bits of exponent, 3 of mantissa."""
    magnitude = np.abs(value).clip(0, FLOAT8_MAX)
    # Below 2**-6 steps stay as they are there: subnormal numbers, and zero.
    exponent = np.where(magnitude < 2.0**-6, -6, np.frexp(magnitude)[1] - 1)
    steps = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int64)  # 8 to 16, or 0 to 8 for subnormal ones
    # Sixteen steps are eight of the next exponent, and the bits carry over by themselves.
    bits: npt.NDArray[np.int64] = (exponent + 6) * 8 + steps + 128 * np.signbit(value)
    return bits.astype(np.uint8)


def _quantized(checkpoint: Checkpoint, precision: Precision) -> Mapping[str, float]:
    """Largest input magnitude of each layer that is done in eight bits."""
    if precision in ("fp32", "fp16"):
        return {}
    if checkpoint.quantization is None:
        raise ValueError(
            f"precision {precision!r}: expected a checkpoint with int8 scales, got one without; "
            "add them with: python -m training quantize CHECKPOINT"
        )
    amax = checkpoint.quantization.amax
    if precision == "int8":
        return amax
    return {name: value for name, value in amax.items() if name != checkpoint.config.encoder[0].name}


def _network(graph: _Graph, checkpoint: Checkpoint, x: str) -> str:
    """Images (N, C, H, W) in the graph's precision -> logits (N, C * TILE**2, H / TILE, W / TILE)."""
    config = checkpoint.config
    bottom = config.encoder[-1]
    side, width = bottom.out_size, bottom.out_channels
    # Integer convolutions keep channels last. A latent read and written in that order spares two passes over it.
    channels_last = graph.unsigned
    layers = [layer for layer in config.layers() if layer.name != "logvar"]
    x = _quantize(graph, layers[0], x)
    for layer, following in zip(layers, (*layers[1:], None), strict=True):
        weight, bias = fold(layer, checkpoint.tensors)
        if layer.name == "mu":
            if channels_last:
                x = graph.node("Transpose", [x], perm=[0, 2, 3, 1])
                weight = weight.reshape(-1, width, side, side).transpose(0, 2, 3, 1).reshape(weight.shape)
            x = graph.node("Flatten", [x], axis=1)
        to_map = layer.part == "decoder" and layer.kind == "linear"
        if to_map and channels_last:
            weight = weight.reshape(width, side, side, -1).transpose(1, 2, 0, 3).reshape(weight.shape)
            bias = bias.reshape(width, side, side).transpose(1, 2, 0).reshape(-1)
        if layer.kind == "conv_transpose" and layer.stride == 1:
            layer, weight, bias = as_convolution(layer, weight, bias)
        x = _layer(graph, layer, weight, bias, x)
        if following is not None:  # rounded beside the layer that makes it, where engines fuse the two
            x = _quantize(graph, following, x)
        if to_map and channels_last:
            x = graph.node("Reshape", [x, graph.constant("bottom_shape", np.array([0, side, side, width]))])
            x = graph.node("Transpose", [x], perm=[0, 3, 1, 2])
        elif to_map:
            x = graph.node("Reshape", [x, graph.constant("bottom_shape", np.array([0, width, side, side]))])
    return x


def _layer(graph: _Graph, layer: Layer, weight: Float64, bias: Float64, x: str) -> str:
    inputs = [x, _weight(graph, layer, weight), graph.weight(f"{layer.name}.bias", bias)]
    if layer.kind == "linear":
        x = graph.node("Gemm", inputs, transB=1)
    else:
        x = graph.node(
            "Conv" if layer.kind == "conv" else "ConvTranspose",
            inputs,
            kernel_shape=[layer.kernel] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.padding] * 4,
        )
    return graph.node("Relu", [x]) if layer.activation == "relu" else x


def _quantize(graph: _Graph, layer: Layer, x: str) -> str:
    """The input of a layer that is done in eight bits, rounded to its levels; that of any other as it is."""
    if layer.name not in graph.amax:
        return x
    # Images and what a ReLU leaves are never negative; the latent is.
    unsigned = graph.unsigned and not (layer.part == "decoder" and layer.kind == "linear")
    scale = np.array(graph.amax[layer.name] / (255 if unsigned else graph.largest))
    zero = f"{layer.name}.zero_point"
    parameters = [
        graph.weight(f"{layer.name}.scale", scale),
        graph.constant(zero, np.array(0, np.uint8)) if unsigned else graph.levels(zero, np.array(0.0)),
    ]
    return graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [x, *parameters]), *parameters])


def _weight(graph: _Graph, layer: Layer, weight: Float64) -> str:
    """A layer's weight in the graph's precision, or in eight bits with a scale for each output channel."""
    name = f"{layer.name}.weight"
    if layer.name not in graph.amax:
        return graph.weight(name, weight)
    axis = 1 if layer.kind == "conv_transpose" else 0
    others = tuple(i for i in range(weight.ndim) if i != axis)
    # The scale is rounded first, so that the levels are multiples of the number that the graph holds; a channel of
    # zeros, or of less than fp16 can scale, takes the smallest normal number.
    smallest = float(np.finfo(graph.dtype).tiny)
    scale = (np.abs(weight).max(others) / graph.largest).clip(smallest).astype(graph.dtype)
    levels = weight / np.expand_dims(scale.astype(np.float64), others)
    parameters = [
        graph.constant(f"{name}_scale", scale),
        graph.levels(f"{name}_zero_point", np.zeros(scale.shape)),
    ]
    return graph.node("DequantizeLinear", [graph.levels(name, levels), *parameters], axis=axis)


def _from_uint8(graph: _Graph, config: VAEConfig) -> str:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1]."""
    # TensorRT knows uint8 only as the type of a network's inputs and outputs: for it the cast comes first. A cast that
    # comes last is fused into OpenVINO's first int8 convolution, and a pixel is moved while it is one byte.
    x = graph.node("Cast", [INPUT], to=TensorProto.FLOAT) if graph.half else INPUT
    if config.channels == 1:  # the same values in the same order
        x = graph.node("Reshape", [x, graph.constant("nchw_shape", np.array([0, *config.image_shape]))])
    else:
        x = graph.node("Transpose", [x], perm=[0, 3, 1, 2])
    x = x if graph.half else graph.node("Cast", [x], to=TensorProto.FLOAT)
    return graph.node("Mul", [x, graph.constant("one_255th", np.array(1 / 255, dtype=np.float32))])


def _to_uint8(graph: _Graph, config: VAEConfig, purified: str) -> None:
    """float32 (N, C, H, W) in [0, 1] -> uint8 (N, H, W, C), rounded to nearest."""
    channels, height, width = config.image_shape
    x = graph.node("Mul", [purified, graph.constant("levels", np.array(255, dtype=np.float32))])
    x = graph.node("Round", [x])
    x = x if graph.half else graph.node("Cast", [x], to=TensorProto.UINT8)  # as in _from_uint8
    output = None if graph.half else PURIFIED
    if channels == 1:
        shape = graph.constant("nhwc_shape", np.array([0, height, width, 1]))
        x = graph.node("Reshape", [x, shape], output=output)
    else:
        x = graph.node("Transpose", [x], output=output, perm=[0, 2, 3, 1])
    if graph.half:
        graph.node("Cast", [x], output=PURIFIED, to=TensorProto.UINT8)


def _model(graph: _Graph, checkpoint: Checkpoint, precision: Precision, image: ImageKind) -> onnx.ModelProto:
    opset, ir_version = OPSET, IR_VERSION
    if precision in _QUANTIZED_FP16:
        opset, ir_version = OPSET_QUANTIZED_FP16, IR_VERSION_QUANTIZED_FP16
    channels, height, width = checkpoint.config.image_shape
    kind = {"float": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "half": TensorProto.FLOAT16}[image]
    size = (height, width, channels) if image == "uint8" else (channels, height, width)
    outputs = [helper.make_tensor_value_info(PURIFIED, kind, ["batch", *size])]
    if image != "half":
        outputs.append(helper.make_tensor_value_info(SCORE, TensorProto.FLOAT, ["batch"]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"defense_vae_{channels}x{height}x{width}_{precision}_{image}",
            [helper.make_tensor_value_info(INPUT, kind, ["batch", *size])],
            outputs,
            graph.constants,
        ),
        producer_name="defense_vae_fast",
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    onnx.checker.check_model(model)
    return model
