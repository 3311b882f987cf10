"""The ONNX graph against the torch module in float64, in two runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import random_checkpoint
from onnx import TensorProto, numpy_helper

from defense_vae_fast import onnx_graph
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.engines.openvino import openvino_core
from defense_vae_fast.nn.model import DefenseVAE


@dataclass(frozen=True)
class Case:
    """One network, some images and what comes out in float64."""

    config: VAEConfig

    @cached_property
    def checkpoint(self):
        return random_checkpoint(self.config, seed=3)

    @cached_property
    def model(self):
        return DefenseVAE.from_checkpoint(self.checkpoint)

    @cache  # noqa: B019 - the cases live as long as the module
    def images(self, count):
        levels = np.random.default_rng(count).integers(0, 256, (count, *self.config.image_shape), dtype=np.uint8)
        return levels, levels.astype(np.float32) / np.float32(255)

    def purify(self, images, dtype):
        model = DefenseVAE.from_checkpoint(self.checkpoint).to(dtype)
        with torch.no_grad():
            return model.purify(torch.from_numpy(images).to(dtype)).double().numpy()

    @cache  # noqa: B019
    def reference(self, count):
        return self.purify(self.images(count)[1], torch.float64)

    @cache  # noqa: B019
    def session(self, precision, image):
        raw = onnx_graph.build(self.checkpoint, precision, image).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


CASES = {name: Case(VAEConfig(*shape)) for name, shape in {"28x1": (28, 1), "32x3": (32, 3), "64x3": (64, 3)}.items()}
SHAPES = [("28x1", 1), ("28x1", 2), ("28x1", 7), ("28x1", 64), ("32x3", 1), ("32x3", 7), ("64x3", 2)]


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize(("name", "count"), SHAPES)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_error_is_at_most_twice_that_of_plain_torch(name, count, precision, dtype):
    case = CASES[name]
    images = case.images(count)[1]
    purified, _ = case.session(precision, "float").run(None, {"images": images})
    reference = case.reference(count)
    assert purified.dtype == np.float32
    assert rms(purified - reference) <= 2 * rms(case.purify(images, dtype) - reference)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_spans_a_range(name):
    reference = CASES[name].reference(2)
    assert reference.std() > 0.1
    assert np.abs(reference[0] - reference[1]).mean() > 0.02


@pytest.mark.parametrize(("name", "count"), SHAPES)
@pytest.mark.parametrize("image", ["float", "uint8"])
def test_score_is_the_mean_absolute_change(name, count, image):
    case = CASES[name]
    levels, images = case.images(count)
    fed = images if image == "float" else np.ascontiguousarray(levels.transpose(0, 2, 3, 1))
    _, score = case.session("fp32", image).run(None, {"images": fed})
    assert score.shape == (count,)
    np.testing.assert_allclose(score, np.abs(images - case.reference(count)).mean((1, 2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "count"), SHAPES)
def test_uint8_images_are_rounded_to_nearest(name, count):
    case = CASES[name]
    levels, _ = case.images(count)
    fed = np.ascontiguousarray(levels.transpose(0, 2, 3, 1))
    purified, _ = case.session("fp32", "uint8").run(None, {"images": fed})
    assert purified.dtype == np.uint8
    assert purified.shape == fed.shape
    assert np.abs(purified - 255 * case.reference(count).transpose(0, 2, 3, 1)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("image", ["float", "uint8"])
@pytest.mark.parametrize("name", CASES)
def test_openvino_and_onnxruntime_agree(name, image):
    case = CASES[name]
    levels, images = case.images(2)
    fed = images if image == "float" else np.ascontiguousarray(levels.transpose(0, 2, 3, 1))
    core = openvino_core()
    model = core.read_model(onnx_graph.build(case.checkpoint, "fp32", image).SerializeToString())
    result = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(fed)
    purified, score = case.session("fp32", image).run(None, {"images": fed})
    # Two float32 sums may fall on either side of a rounding boundary: one grey level.
    np.testing.assert_allclose(result["purified"].astype(float), purified, rtol=0, atol=1 if image == "uint8" else 1e-5)
    np.testing.assert_allclose(result["score"], score, rtol=0, atol=1e-6)


@pytest.mark.parametrize("image", ["float", "uint8"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_graph_is_valid_folded_and_in_its_precision(name, precision, image):
    case = CASES[name]
    model = onnx_graph.build(case.checkpoint, precision, image)
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith((".weight", ".bias"))}
    assert {name.split(".")[0] for name in weights} == {layer.name for layer in case.config.layers()} - {"logvar"}
    expected = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    assert {tensor.data_type for tensor in weights.values()} == {expected}

    channels, height, width = case.config.image_shape
    shape = ["batch", channels, height, width] if image == "float" else ["batch", height, width, channels]
    kind = TensorProto.FLOAT if image == "float" else TensorProto.UINT8
    ports = {port.name: port.type.tensor_type for port in (*model.graph.input, *model.graph.output)}
    assert {name: port.elem_type for name, port in ports.items()} == {
        "images": kind,
        "purified": kind,
        "score": TensorProto.FLOAT,
    }
    for name in ("images", "purified"):
        assert [side.dim_param or side.dim_value for side in ports[name].shape.dim] == shape


def test_one_channel_uint8_images_are_never_transposed():
    model = onnx_graph.build(CASES["28x1"].checkpoint, image="uint8")
    assert "Transpose" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", CASES)
def test_folded_layers_compute_what_the_torch_blocks_do(name):
    case = CASES[name]
    model = DefenseVAE.from_checkpoint(case.checkpoint).double()
    functions = {"conv": torch.nn.functional.conv2d, "conv_transpose": torch.nn.functional.conv_transpose2d}
    for layer in case.config.layers():
        weight, bias = map(torch.from_numpy, onnx_graph.fold(layer, case.checkpoint.tensors))
        assert weight.dtype == bias.dtype == torch.float64
        assert weight.shape == layer.weight_shape
        side = () if layer.kind == "linear" else (layer.in_size,) * 2
        x = torch.randn(2, layer.in_channels, *side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        if layer.kind == "linear":
            y = torch.nn.functional.linear(x, weight, bias)
        else:
            y = functions[layer.kind](x, weight, bias, layer.stride, layer.padding)
        with torch.no_grad():
            expected = model.get_submodule(layer.name)(x)
        torch.testing.assert_close(torch.relu(y) if layer.activation == "relu" else y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_tiled_convolution_equals_the_transposed_one(name):
    case = CASES[name]
    layer = case.config.layers()[-1]
    weight, bias = onnx_graph.fold(layer, case.checkpoint.tensors)
    x = torch.randn(2, 64, *(layer.in_size,) * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.conv_transpose2d(
        x, torch.from_numpy(weight), torch.from_numpy(bias), layer.stride, layer.padding
    )
    tiled, weight, bias = onnx_graph.as_convolution(layer, weight, bias)
    assert tiled.weight_shape == weight.shape
    y = torch.nn.functional.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias), tiled.stride, tiled.padding)
    assert y.shape[-1] == tiled.out_size
    torch.testing.assert_close(torch.pixel_shuffle(y, onnx_graph.TILE), expected, rtol=1e-12, atol=1e-12)


def test_weights_survive_the_file():
    case = CASES["28x1"]
    model = onnx.load_from_string(onnx_graph.build(case.checkpoint).SerializeToString())
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    mu = next(layer for layer in case.config.layers() if layer.name == "mu")
    np.testing.assert_array_equal(
        stored["mu.weight"], onnx_graph.fold(mu, case.checkpoint.tensors)[0].astype(np.float32)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int4"}, "precision: expected 'fp32', 'fp16', 'int8', 'int8_fp16' or 'fp8_fp16', got 'int4'"),
        ({"image": "bf16"}, "image: expected 'float', 'uint8' or 'half', got 'bf16'"),
    ],
)
def test_unknown_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        onnx_graph.build(CASES["28x1"].checkpoint, **arguments)
