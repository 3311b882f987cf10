"""One graph of purifier and classifier against the two run apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from conftest import random_checkpoint
from onnx import TensorProto, helper, numpy_helper
from test_images import COLOUR, pixels

from defense_vae_fast import VAEConfig
from defense_vae_fast.checkpoint import WEIGHTS_FOLDER, Checkpoint, load_checkpoint
from defense_vae_fast.joined_graph import join
from defense_vae_fast.onnx_graph import build

Array = np.ndarray[Any, Any]
SHIPPED = WEIGHTS_FOLDER / "fashion_mnist_classifier.onnx"
KINDS = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def make_classifier(
    config: VAEConfig,
    kind: str = "float32",
    last: bool = False,
    opset: int = 17,
    batch: Any = "n",
    spatial: bool = True,
) -> onnx.ModelProto:
    """A pool and a linear layer; names that the purifier's graph has too."""
    channels, side = config.channels, config.image_size
    random = np.random.default_rng(3)
    weight = random.normal(0, 1, (channels * (side // 4) ** 2, 10)).astype(np.float32)
    sizes = (side, side, channels) if last else (channels, side, side)
    shape = [batch, *(sizes if spatial else ("a", "b", "c"))]
    nodes = [helper.make_node("Cast", ["images"], ["x0"], to=TensorProto.FLOAT)]
    x = "x0"
    if last:
        nodes.append(helper.make_node("Transpose", [x], ["x1"], perm=[0, 3, 1, 2]))
        x = "x1"
    nodes += [
        helper.make_node("AveragePool", [x], ["pooled"], kernel_shape=[4, 4], strides=[4, 4], name="Conv_0"),
        helper.make_node("Flatten", ["pooled"], ["purified"], axis=1),
        helper.make_node("MatMul", ["purified", "mu.weight"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", KINDS[kind], shape)],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(weight, "mu.weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def ort(model: onnx.ModelProto, images: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


def frames(config: VAEConfig, image: str, count: int = 3) -> Array:
    channels, height, width = config.image_shape
    if image == "uint8":
        return pixels((count, height, width, channels))
    return pixels((count, channels, height, width), "f4")


def between(purified: Array, kind: str, last: bool, mean: Any, std: Any) -> Array:
    """What a user does by hand."""
    if purified.dtype == np.uint8 and kind != "uint8":
        purified = purified.astype(np.float32) * np.float32(1 / 255)
    elif purified.dtype != np.uint8 and kind == "uint8":
        purified = np.rint(purified * np.float32(255)).astype(np.uint8)
    is_last = purified.shape[-1] in (1, 3)
    if mean is not None:
        shape = (1, 1, 1, -1) if is_last else (1, -1, 1, 1)
        purified = (purified - np.float32(mean).reshape(shape)) / np.float32(std).reshape(shape)
    if is_last != last:
        purified = purified.transpose((0, 2, 3, 1) if last else (0, 3, 1, 2))
    return np.ascontiguousarray(purified.astype(kind))


@pytest.mark.parametrize("image", ["uint8", "float"])
@pytest.mark.parametrize(
    ("config", "kind", "last", "normal"),
    [
        pytest.param(VAEConfig(), "float32", False, False, id="float NCHW"),
        pytest.param(VAEConfig(), "float32", False, True, id="float NCHW normalised"),
        pytest.param(VAEConfig(), "uint8", True, False, id="uint8 NHWC"),
        pytest.param(VAEConfig(), "uint8", False, False, id="uint8 NCHW"),
        pytest.param(COLOUR, "float32", False, True, id="colour, float NCHW normalised"),
        pytest.param(COLOUR, "float16", True, True, id="colour, float16 NHWC normalised"),
    ],
)
def test_equal_to_the_two_apart(image: Any, config: VAEConfig, kind: str, last: bool, normal: bool) -> None:
    checkpoint = random_checkpoint(config, 4)
    classifier = make_classifier(config, kind, last)
    mean = np.linspace(0.3, 0.5, config.channels).tolist() if normal else None
    std = np.linspace(0.2, 0.4, config.channels).tolist() if normal else None
    images = frames(config, image)
    apart = ort(build(checkpoint, "fp32", image), images)
    logits = ort(classifier, between(apart["purified"], kind, last, mean, std))["score"]
    together = ort(join(checkpoint, classifier, "fp32", image, mean, std), images)
    assert list(together) == ["purified", "score", "logits"]
    np.testing.assert_allclose(together["purified"], apart["purified"], atol=0 if image == "uint8" else 1e-6)
    np.testing.assert_allclose(together["score"], apart["score"], atol=1e-6)
    assert np.ptp(logits) > 1
    tolerance = {"float32": 1e-4, "uint8": 1e-4, "float16": 2e-2}[kind]
    np.testing.assert_allclose(together["logits"], logits, rtol=tolerance, atol=tolerance * np.abs(logits).max())
    assert (together["logits"].argmax(1) == logits.argmax(1)).all()


def test_the_shipped_pair(tmp_path: Path) -> None:
    """The demo's accuracy, from one graph, read back from a file."""
    with np.load(WEIGHTS_FOLDER / "fashion_mnist_demo.npz") as data:
        images, labels = data["fgsm"][:100, ..., None], data["labels"][:100]
    onnx.save(join(load_checkpoint("fashion_mnist"), SHIPPED), tmp_path / "joined.onnx")
    found = ort(onnx.load(tmp_path / "joined.onnx"), images)
    apart = ort(onnx.load(SHIPPED), found["purified"])["logits"]
    np.testing.assert_array_equal(found["logits"], apart)
    assert (found["logits"].argmax(1) == labels).mean() > 0.8
    assert (ort(onnx.load(SHIPPED), images)["logits"].argmax(1) == labels).mean() < 0.1

    core = openvino.Core()
    compiled = core.compile_model(tmp_path / "joined.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for output, name in zip(compiled.outputs, ("purified", "score", "logits"), strict=True):
        assert name in output.names
    result = compiled(images)
    np.testing.assert_allclose(result["logits"], found["logits"], atol=0.05)  # a pixel may round the other way
    assert np.abs(result["purified"].astype(np.int16) - found["purified"]).max() <= 1


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
def test_operator_sets(checkpoint: Checkpoint, opset: int) -> None:
    images = frames(checkpoint.config, "float")
    joined = join(checkpoint, make_classifier(checkpoint.config, opset=opset), image="float")
    assert [each.version for each in joined.opset_import] == [max(17, opset)]
    expected = ort(join(checkpoint, make_classifier(checkpoint.config), image="float"), images)
    for name, value in ort(joined, images).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)


def test_fp16_purifier(checkpoint: Checkpoint) -> None:
    classifier = make_classifier(checkpoint.config)
    images = frames(checkpoint.config, "float")
    half = ort(join(checkpoint, classifier, "fp16", "float"), images)
    full = ort(join(checkpoint, classifier, "fp32", "float"), images)
    assert np.abs(half["purified"] - full["purified"]).max() < 0.02
    assert half["logits"].dtype == np.float32


def test_batch_sizes(checkpoint: Checkpoint) -> None:
    free = join(checkpoint, make_classifier(checkpoint.config))
    for count in (1, 5):
        assert ort(free, frames(checkpoint.config, "uint8", count))["logits"].shape == (count, 10)
    assert free.graph.output[2].type.tensor_type.shape.dim[0].dim_param == "batch"
    fixed = join(checkpoint, make_classifier(checkpoint.config, batch=4))
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in (*fixed.graph.input, *fixed.graph.output)] == [
        4
    ] * 4
    assert ort(fixed, frames(checkpoint.config, "uint8", 4))["logits"].shape == (4, 10)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_where_any_order_fits_the_librarys_own_is_taken(checkpoint: Checkpoint, kind: str) -> None:
    last = kind == "uint8"
    images = frames(checkpoint.config, "uint8")
    unknown = join(checkpoint, make_classifier(checkpoint.config, kind, last, spatial=False))
    known = join(checkpoint, make_classifier(checkpoint.config, kind, last))
    np.testing.assert_array_equal(ort(unknown, images)["logits"], ort(known, images)["logits"])


def without_input(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
    return model


GRAY = VAEConfig()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        pytest.param(
            lambda: make_classifier(VAEConfig(32, 1)), {}, r"\(N, 1, 28, 28\) or \(N, 28, 28, 1\), got float", id="size"
        ),
        pytest.param(lambda: make_classifier(VAEConfig(28, 3)), {}, "of the purifier's image size", id="channels"),
        pytest.param(lambda: without_input(make_classifier(GRAY)), {}, "one input and one output", id="two inputs"),
        pytest.param(lambda: make_classifier(GRAY), {"mean": [0.5]}, "expected both or neither", id="mean alone"),
        pytest.param(lambda: make_classifier(GRAY), {"mean": [0.5], "std": [0.0]}, "std: expected 1 pos", id="std"),
        pytest.param(lambda: make_classifier(GRAY), {"mean": [0.5] * 3, "std": [1.0] * 3}, "mean: expec", id="three"),
        pytest.param(
            lambda: make_classifier(GRAY, "uint8", True),
            {"mean": [0.5], "std": [1.0]},
            "expected none for a classifier of uint8",
            id="uint8",
        ),
    ],
)
def test_errors(checkpoint: Checkpoint, make: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join(checkpoint, make(), **options)


def test_files_that_are_no_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an ONNX file at"):
        join(checkpoint, tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x08not a model")
    with pytest.raises(ValueError, match="expected an ONNX model in"):
        join(checkpoint, tmp_path / "bad.onnx")
