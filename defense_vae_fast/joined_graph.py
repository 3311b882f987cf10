"""Purifier and classifier in one ONNX graph: frames -> purified frames, score and logits."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines.openvino import openvino_core
from defense_vae_fast.onnx_graph import OPSET, PURIFIED, SCORE, ImageKind, Precision, build

Array = npt.NDArray[Any]

LOGITS = "logits"
_PREFIX = "classifier."
_GLUE = "between."
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_MOVES = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten")
"""Operators that keep values and type of their first input."""


def join(
    checkpoint: Checkpoint,
    classifier: onnx.ModelProto | str | os.PathLike[str],
    precision: Precision = "fp32",
    image: ImageKind = "uint8",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> onnx.ModelProto:
    """One graph that computes what the purifier's graph and the classifier's compute one after the other.

    Inputs and outputs are those of :func:`onnx_graph.build <defense_vae_fast.onnx_graph.build>`, and ``logits``, the
    classifier's only output. The classifier gets exactly what comes out as ``purified``: of uint8 images the rounded
    ones. It keeps its own precision, whatever the purifier's is.

    Args:
        checkpoint: the purifier.
        classifier: an ONNX model or its file, with one input of four axes and one output. The input is uint8
            (N, H, W, C) or (N, C, H, W) in 0..255, or float32 or float16 of these shapes in [0, 1]; an axis without a
            fixed size fits any, and where both orders fit, uint8 is taken as channels last and floating as channels
            first. A fixed N is kept.
        precision: of the purifier, as in ``build``.
        image: what comes in, as in ``build``.
        mean: C numbers that a floating classifier wants subtracted, from pixels in [0, 1].
        std: C positive numbers to divide by afterwards; given with ``mean`` or not at all. A classifier of floating
            pixels in 0..255 has mean 0 and std 1/255.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ``classifier`` is no ONNX model or not as above, ``mean`` and ``std`` are not, or the two graphs
            cannot be brought to one operator set.
    """
    model = classifier if isinstance(classifier, onnx.ModelProto) else _load(classifier)
    config = checkpoint.config
    given, output = _ends(model)
    tensor = given.type.tensor_type
    last = _channels_last(tensor, config)
    as_bytes = tensor.elem_type == TensorProto.UINT8
    normalisation = _normalisation(mean, std, config, as_bytes)
    purifier, model = _same_opset(build(checkpoint, precision, image), model)
    model = onnx.compose.add_prefix(model, _PREFIX)
    # Ends meet by a common name and not by a node more, since runtimes that drop such a node show either name.
    _rename(model.graph, _PREFIX + output.name, LOGITS)

    joined = onnx.ModelProto()
    joined.CopyFrom(purifier)
    graph = joined.graph
    graph.name = f"{purifier.graph.name}_with_classifier"
    between = _Between(graph)
    x = PURIFIED
    # TensorRT knows uint8 only as the type of a network's inputs and outputs, so the same levels travel as floats where
    # the graph has them and the classifier takes them.
    levels = _float_levels(graph)
    floats = _read_as_floats(model.graph, _PREFIX + given.name) if as_bytes else None
    if image == "half" and (as_bytes or normalisation or tensor.elem_type == TensorProto.FLOAT):
        x = between.node("Cast", [x], to=TensorProto.FLOAT)
    if image == "uint8" and not as_bytes:
        x = levels or between.node("Cast", [x], to=TensorProto.FLOAT)
        x = between.node("Mul", [x, between.constant("one_255th", np.float32(1 / 255))])
    elif image == "uint8" and floats and levels:
        x = levels
        _forget_types(model.graph, floats)
    elif image != "uint8" and as_bytes:
        x = between.node("Round", [between.node("Mul", [x, between.constant("levels", np.float32(255))])])
        if floats:
            _forget_types(model.graph, floats)
        else:
            x = between.node("Cast", [x], to=TensorProto.UINT8)
    is_last = image == "uint8"
    if normalisation is not None:
        shape = (1, 1, 1, -1) if is_last else (1, -1, 1, 1)
        x = between.node("Sub", [x, between.constant("mean", normalisation[0].reshape(shape))])
        x = between.node("Div", [x, between.constant("std", normalisation[1].reshape(shape))])
    if is_last != last:
        x = between.node("Transpose", [x], perm=[0, 2, 3, 1] if last else [0, 3, 1, 2])
    if tensor.elem_type == TensorProto.FLOAT16 and (image != "half" or normalisation):
        x = between.node("Cast", [x], to=TensorProto.FLOAT16)
    _rename(model.graph, _PREFIX + given.name, x)

    graph.node.extend(model.graph.node)
    graph.initializer.extend(model.graph.initializer)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    graph.value_info.extend(model.graph.value_info)
    joined.functions.extend(model.functions)
    logits = graph.output.add()
    logits.CopyFrom(output)
    logits.name = LOGITS
    _one_batch_size(graph, tensor)
    for imported in model.opset_import:
        if imported.domain and imported.domain not in {each.domain for each in joined.opset_import}:
            joined.opset_import.append(imported)
    joined.ir_version = max(purifier.ir_version, model.ir_version)
    onnx.checker.check_model(joined)
    return joined


def reference(joined: onnx.ModelProto, images: Array, shift: float) -> tuple[Array, float]:
    """What a joined float32 graph of "float" images says of ``images``, and how far an engine may be from it.

    The classifier is taken as it is; so an engine's logits may differ by what its purified images differ. They may move
    twice as far as they do when every pixel becomes brighter, or darker, or either at random, by ``shift``.

    Args:
        joined: from :func:`join`.
        images: float32 (N, C, H, W) in [0, 1].
        shift: what a purified pixel may differ by on average, in [0, 1].

    Returns:
        float32 logits, and the largest difference.
    """
    core = openvino_core()

    def compute(model: onnx.ModelProto, given: Array) -> dict[str, Array]:
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        return {name: value for output, value in compiled(given).items() for name in output.names}

    whole = compute(joined, images)
    logits: Array = whole[LOGITS].astype(np.float32)
    after = onnx.utils.Extractor(joined).extract_model([PURIFIED], [LOGITS])
    either = np.random.default_rng(0).choice([-1, 1], images.shape)
    moved = 0.0
    for signs in (1, -1, either):
        shifted = (whole[PURIFIED] + shift * signs).clip(0, 1).astype(np.float32)
        moved = max(moved, float(np.abs(compute(after, shifted)[LOGITS] - logits).max()))
    rounding = 2.0**-10 * float(np.abs(logits).max())  # of the sums themselves, in whatever order they are made
    return logits, 2 * moved + rounding


class _Between:
    """Nodes that turn what the purifier gives into what the classifier takes."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{_GLUE}{kind.lower()}_{len(self._graph.node)}"
        self._graph.node.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: npt.NDArray[np.float32] | np.float32) -> str:
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), _GLUE + name))
        return _GLUE + name


def _load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"classifier: expected an ONNX file at {os.fspath(path)}, found none")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's own kinds, among them some that are no ValueError
        raise ValueError(
            f"classifier: expected an ONNX model in {os.fspath(path)}, got the error {error}; export it again"
        ) from error
    return model


def _ends(model: onnx.ModelProto) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]:
    """The classifier's only input and its only output."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        names = [value.name for value in inputs], [value.name for value in outputs]
        raise ValueError(
            f"classifier: expected one input and one output, got {names[0]} and {names[1]}; cut it to those"
        )
    return inputs[0], outputs[0]


def _channels_last(tensor: onnx.TypeProto.Tensor, config: VAEConfig) -> bool:
    """Check the classifier's input; whether its channels come last."""
    sizes = [axis.dim_value or None for axis in tensor.shape.dim]  # None: any
    channels, height, width = config.image_shape
    orders = {True: (height, width, channels), False: (channels, height, width)}
    fits = {
        last
        for last, order in orders.items()
        if len(sizes) == 4 and all(size in (None, wanted) for size, wanted in zip(sizes[1:], order, strict=True))
    }
    as_bytes = tensor.elem_type == TensorProto.UINT8
    if not fits or (not as_bytes and tensor.elem_type not in _FLOATS):
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        shape = [axis.dim_value or axis.dim_param or "?" for axis in tensor.shape.dim]
        raise ValueError(
            f"classifier: expected an input of uint8, float or float16 (N, {channels}, {height}, {width}) or "
            f"(N, {height}, {width}, {channels}), got {kind} {shape}; take a classifier of the purifier's image size"
        )
    return as_bytes if len(fits) == 2 else fits.pop()


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, config: VAEConfig, as_bytes: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError("mean and std: expected both or neither, got one of them")
    if as_bytes:
        raise ValueError("mean and std: expected none for a classifier of uint8 images, got some; it has its own")
    for name, values in (("mean", mean), ("std", std)):
        good = len(values) == config.channels and all(math.isfinite(value) for value in values)
        if not good or (name == "std" and min(values) <= 0):
            kind = "positive " if name == "std" else ""
            raise ValueError(f"{name}: expected {config.channels} {kind}finite number(s), one a channel, got {values}")
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def _same_opset(purifier: onnx.ModelProto, classifier: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Both models with the later of their two operator sets."""
    own, other = (
        next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), OPSET)
        for model in (purifier, classifier)
    )
    try:
        if other > own:
            return onnx.version_converter.convert_version(purifier, other), classifier
        if other < own:
            return purifier, onnx.version_converter.convert_version(classifier, own)
    except Exception as error:  # the converter's own kinds are RuntimeErrors of several names
        raise ValueError(
            f"classifier: expected an operator set that can be brought to {own} or that the purifier can be brought "
            f"to, got {other} and the error {error}; export it with operator set {own}"
        ) from error
    return purifier, classifier


def _float_levels(graph: onnx.GraphProto) -> str | None:
    """The float tensor of which ``purified`` is the bytes, where the graph makes them in its last step."""
    maker = next(node for node in graph.node if PURIFIED in node.output)
    to = next((attribute.i for attribute in maker.attribute if attribute.name == "to"), None)
    return maker.input[0] if to == TensorProto.UINT8 else None


def _read_as_floats(graph: onnx.GraphProto, name: str) -> list[str] | None:
    """The tensor and those that only move it, if everything else that takes them casts them first; otherwise None."""
    tensors = [name]
    for tensor in tensors:
        for node in graph.node:
            if any(attribute.type in _GRAPHS for attribute in node.attribute):
                return None  # what happens inside of branches and loops is not looked at
            if tensor not in node.input or node.op_type == "Cast":
                continue
            if node.op_type not in _MOVES or node.input[0] != tensor:
                return None
            tensors.append(node.output[0])
    return tensors


def _forget_types(graph: onnx.GraphProto, tensors: Sequence[str]) -> None:
    known = [value for value in graph.value_info if value.name not in tensors]
    del graph.value_info[:]
    graph.value_info.extend(known)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Give a tensor another name wherever nodes make or take it, inner graphs included."""
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, old, new)


def _one_batch_size(graph: onnx.GraphProto, tensor: onnx.TypeProto.Tensor) -> None:
    """A classifier for a fixed number of images fixes it for the whole graph; otherwise the logits' is the frames'."""
    batch = tensor.shape.dim[0]
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        if batch.dim_value and value.name in (graph.input[0].name, PURIFIED, SCORE):
            axes[0].dim_value = batch.dim_value
        elif not batch.dim_value and value.name == LOGITS and len(axes):
            axes[0].dim_param = graph.input[0].type.tensor_type.shape.dim[0].dim_param
