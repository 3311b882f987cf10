"""The demo's data: a classifier that runs without torch, and test images attacked on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from defense_vae_fast.atomic import replacing
from training.attacks import PAPER_TEST_ATTACKS
from training.data import Dataset
from training.pairs import attack_all

DEMO_IMAGES = 500


def classifier_graph(model: nn.Module, channels: int, size: int) -> onnx.ModelProto:
    """A plain stack of convolutions, ReLUs and linear layers (Table 5's A to E) as ONNX, weights stored as fp16.

    Args:
        model: ``nn.Sequential`` of Conv2d, ReLU, Dropout, Flatten and Linear.
        channels: image channels.
        size: image side in pixels.

    Returns:
        A model with input ``images`` uint8 (N, H, W, C) and output ``logits`` float32 (N, classes).

    Raises:
        ValueError: the classifier has a layer of another kind.
    """
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["x0"], perm=[0, 3, 1, 2]),
    ]
    tensors = [numpy_helper.from_array(np.float32(1 / 255), "scale")]
    current = "x0"
    for index, layer in enumerate(model.children(), 1):
        inputs = [current]
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            for kind, tensor in (("weight", layer.weight), ("bias", layer.bias)):
                name = f"{kind}{index}"
                tensors.append(numpy_helper.from_array(tensor.detach().cpu().half().numpy(), f"{name}.fp16"))
                nodes.append(helper.make_node("Cast", [f"{name}.fp16"], [name], to=TensorProto.FLOAT))
                inputs.append(name)
        if isinstance(layer, nn.Dropout):
            continue
        output = f"x{index}"
        if isinstance(layer, nn.Conv2d):
            node = helper.make_node(
                "Conv",
                inputs,
                [output],
                strides=list(layer.stride),
                pads=[int(p) for p in (*layer.padding, *layer.padding)],
            )
        elif isinstance(layer, nn.Linear):
            node = helper.make_node("Gemm", inputs, [output], transB=1)
        elif isinstance(layer, nn.ReLU):
            node = helper.make_node("Relu", inputs, [output])
        elif isinstance(layer, nn.Flatten):
            node = helper.make_node("Flatten", inputs, [output])
        else:
            raise ValueError(
                f"classifier layer: expected Conv2d, ReLU, Dropout, Flatten or Linear, got {type(layer).__name__}"
            )
        nodes.append(node)
        current = output
    nodes.append(helper.make_node("Identity", [current], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", size, size, channels])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", None])],
        tensors,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    return proto


def write_demo_data(data: Dataset, classifier: nn.Module, folder: Path) -> None:
    """Write ``DATASET_classifier.onnx`` and ``DATASET_demo.npz`` for ``defense-vae-fast demo``.

    The images are the first 500 of the test set, attacked on the bare classifier with the paper's three attacks and
    rounded to 8 bits.
    """
    part = data.test.first(DEMO_IMAGES)
    _, channels, size, _ = part.images.shape
    arrays = {
        "labels": part.labels.numpy().astype(np.uint8),
        "class_names": np.array(data.class_names),
        "clean": part.images.numpy(),
    }
    for name, attack in PAPER_TEST_ATTACKS.items():
        arrays[name] = attack_all(attack, classifier, part, title=name).numpy()
    arrays = {
        name: np.ascontiguousarray(
            array.transpose(0, 2, 3, 1).squeeze(-1) if channels == 1 else array.transpose(0, 2, 3, 1)
        )
        if array.ndim == 4
        else array
        for name, array in arrays.items()
    }
    with torch.no_grad():
        proto = classifier_graph(classifier, channels, size)
    with replacing(folder / f"{data.name}_demo.npz") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    with replacing(folder / f"{data.name}_classifier.onnx") as file:
        file.write(proto.SerializeToString())
