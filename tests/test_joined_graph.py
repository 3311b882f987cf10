"""One graph of purifier and classifier against the two run apart, and as files for every runtime."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import random_checkpoint
from onnx import TensorProto, helper, numpy_helper
from test_images import COLOUR, pixels
from torch import Tensor, nn

from defense_vae_fast import VAEConfig, cli, cuda
from defense_vae_fast.checkpoint import WEIGHTS_FOLDER, Checkpoint, load_checkpoint, save_checkpoint
from defense_vae_fast.engines import plans
from defense_vae_fast.engines.openvino import openvino_core
from defense_vae_fast.joined_graph import join, reference
from defense_vae_fast.nn.model import DefenseVAE
from defense_vae_fast.onnx_graph import build
from training.pool import CLASSIFIER_FOLDER
from training.train_classifier import load_classifier

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


def ort(model: onnx.ModelProto, images: Array, optimised: bool = True) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
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

    core = openvino_core()
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


# As a user exports it: the shipped purifier and a torch classifier that wants normalised images, as files

MEAN, STD = 0.2860, 0.3530


class Normalised(nn.Module):
    """A classifier trained on normalised images, made of one that takes them in [0, 1]."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.plain(images * STD + MEAN)
        return logits


@pytest.fixture(scope="module")
def torch_classifier() -> nn.Module:
    return Normalised(load_classifier(CLASSIFIER_FOLDER / "fashion_mnist_A.safetensors")[0]).eval()


@pytest.fixture(scope="module")
def classifier_path(torch_classifier: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "yours.onnx"
    axes = {"images": {0: "batch"}, "classes": {0: "batch"}}
    torch.onnx.export(
        torch_classifier, (torch.zeros(2, 1, 28, 28),), str(path), dynamo=False, opset_version=17,
        input_names=["images"], output_names=["classes"], dynamic_axes=axes,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def attacked() -> tuple[Array, Array]:
    """Attacked test images uint8 (N, 28, 28, 1) and their labels."""
    with np.load(WEIGHTS_FOLDER / "fashion_mnist_demo.npz") as data:
        return data["fgsm"][:40, ..., None], data["labels"][:40]


@pytest.fixture(scope="module")
def exact(torch_classifier: nn.Module, attacked: tuple[Array, Array]) -> Array:
    """Logits behind the purifier in float64."""
    images = torch.from_numpy(attacked[0]).permute(0, 3, 1, 2).double() / 255
    with torch.no_grad():
        purified = DefenseVAE.from_checkpoint(load_checkpoint("fashion_mnist")).double().purify(images).float()
        logits: Array = torch_classifier((purified - MEAN) / STD).numpy()
    return logits


def export(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["export", *map(str, words)])


def run_openvino(path: Path, images: Array) -> dict[str, Array]:
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {name: value for output, value in compiled(images).items() for name in output.names}


def rms(difference: Array) -> float:
    return float(np.sqrt(np.square(difference, dtype=np.float64).mean()))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("uint8", "fp32"), ("uint8", "fp16"), ("uint8", "int8"), ("float", "fp32"), ("float", "int8")],
)
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_exported_pair_equals_the_two_apart(
    tmp_path: Path,
    classifier_path: Path,
    torch_classifier: nn.Module,
    attacked: tuple[Array, Array],
    exact: Array,
    format: str,
    kind: str,
    precision: str,
) -> None:
    images, labels = attacked
    if kind == "float":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    words = ("fashion_mnist", "-f", format, "--images", kind, "--precision", precision)
    for extra in ((), ("--with", classifier_path, "--mean", MEAN, "--std", STD)):
        result = export(*words, *extra, "-o", tmp_path)
        assert result.exit_code == 0, result.output
    end = f"{kind}.{precision}.{'onnx' if format == 'onnx' else 'xml'}"

    def run(stem: str) -> dict[str, Array]:
        path = tmp_path / f"{stem}.{end}"
        return ort(onnx.load(path), images) if format == "onnx" else run_openvino(path, images)

    together, alone = run("fashion_mnist_with_yours"), run("fashion_mnist")
    purified = alone["purified"]
    as_floats = torch.from_numpy(purified.astype(np.float32))
    as_floats = as_floats.permute(0, 3, 1, 2) / 255 if kind == "uint8" else as_floats
    with torch.no_grad():
        logits = torch_classifier((as_floats - MEAN) / STD).numpy()

    assert set(together) >= {"purified", "score", "logits"}  # OpenVINO keeps the classifier's own name, too
    assert (together["logits"].argmax(1) == labels).mean() > 0.8
    # The rule of the library: at most twice the error of the two apart in the same precision, against float64.
    scale = np.abs(exact).max()
    assert rms(together["logits"] - exact) <= 2 * rms(logits - exact) + 1e-5 * scale
    if precision == "fp32":
        unit = 1 if kind == "uint8" else 1e-5  # OpenVINO may fuse another way, and a pixel round to the other side
        assert np.abs(together["purified"].astype(float) - purified).max() <= unit
        np.testing.assert_allclose(together["score"], alone["score"], atol=1e-5)
        same = (together["purified"] == purified).reshape(len(labels), -1).all(1) | (kind == "float")
        np.testing.assert_allclose(together["logits"][same], logits[same], atol=2e-4 * scale)
        assert same.any()


def weighed(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, quantization=load_checkpoint("fashion_mnist").quantization)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8_fp16", "fp8_fp16"])
@pytest.mark.parametrize("image", ["uint8", "float", "half"])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float16"])
def test_no_byte_in_the_middle_of_a_graph_for_tensorrt(
    checkpoint: Checkpoint, precision: Any, image: Any, kind: str
) -> None:
    """Its uint8 is for a network's ends alone; and what is joined runs, in whatever precision it is."""
    if image == "half" and precision in ("fp32", "int8"):
        pytest.skip("half images are for graphs in half precision")
    mean, std = (None, None) if kind == "uint8" else ([0.4], [0.3])
    joined = join(weighed(checkpoint), make_classifier(checkpoint.config, kind), precision, image, mean, std)
    inferred = onnx.shape_inference.infer_shapes(joined, strict_mode=True, data_prop=True).graph
    ends = {value.name for value in (*joined.graph.input, *joined.graph.output)}
    inside = {value.name for value in inferred.value_info if value.type.tensor_type.elem_type == TensorProto.UINT8}
    if precision.endswith("fp16"):
        assert inside <= ends
        assert not any("purified" in node.input for node in joined.graph.node if image == "uint8")
    images = frames(checkpoint.config, image).astype("u1" if image == "uint8" else "f4" if image == "float" else "f2")
    found = ort(joined, images)
    handed = between(found["purified"], kind, False, mean, std)
    apart = ort(make_classifier(checkpoint.config, kind), handed)["score"]
    tolerance = 0.01 if "float16" in (kind, handed.dtype.name) else 1e-4
    np.testing.assert_allclose(found["logits"], apart, atol=tolerance * np.abs(apart).max())


@pytest.mark.parametrize("opset", [13, 19, 21])
def test_operator_sets_of_int8_graphs(checkpoint: Checkpoint, opset: int) -> None:
    images = frames(checkpoint.config, "float")
    # Unoptimised: from operator set 21 on ONNX Runtime 1.32 makes signed activations unsigned, but not their types.
    expected = ort(join(weighed(checkpoint), make_classifier(checkpoint.config), "int8_fp16", "float"), images, False)
    joined = join(weighed(checkpoint), make_classifier(checkpoint.config, opset=opset), "int8_fp16", "float")
    for name, value in ort(joined, images, False).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)


# TensorRT-RTX, whose builder needs no GPU


def export_rtx(folder: Path, classifier: Path, *words: str) -> Result:
    if reason := plans.RTX.missing():
        pytest.skip(reason)
    only = () if "--compute-capability" in words else ("--compute-capability", "8.9")
    return export(
        "fashion_mnist", "-f", "tensorrt-rtx", "--with", classifier, "--mean", str(MEAN), "--std", str(STD),
        "--max-batch", "8", *only, *words, "-o", folder,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(classifier_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of an engine of both, for uint8 images."""
    folder = tmp_path_factory.mktemp("engine")
    result = export_rtx(folder, classifier_path, "--images", "uint8")
    assert result.exit_code == 0, result.output
    assert "doctor --plan" in result.stdout
    [path] = folder.glob("*.plan")
    return path


@pytest.mark.parametrize(("kind", "precision"), [("uint8", "fp16"), ("float", "int8"), ("half", "fp16")])
def test_one_engine_of_both(
    tmp_path: Path, classifier_path: Path, kind: str, precision: str, request: pytest.FixtureRequest
) -> None:
    if kind == "uint8":
        tmp_path = request.getfixturevalue("engine").parent
    else:
        result = export_rtx(tmp_path, classifier_path, "--images", kind, "--precision", precision)
        assert result.exit_code == 0, result.output
    stem = f"fashion_mnist_with_yours.{kind}{'' if precision == 'fp16' else '.int8'}.tensorrt-rtx"
    path = tmp_path / f"{stem}.plan"
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"{stem}.{s}" for s in ("json", "plan", "safetensors")]
    header = json.loads(path.with_suffix(".json").read_text())
    assert set(header["outputs"]) == {"purified", "logits"} | ({"score"} if kind != "half" else set())
    assert header["outputs"]["logits"] == {"dtype": "float", "shape": [-1, 10]}
    assert path.stat().st_size > load_checkpoint("fashion_mnist").config.weight_bytes(1) + 4 * 1.6e6  # both are in it

    # The acceptance that a GPU runs, with the same graph in ONNX Runtime in the GPU's place.
    plan = plans.read_exported(path, plans.RTX, {"compute_capabilities": ["8.9"]})
    model = join(load_checkpoint("fashion_mnist"), classifier_path, plans.GRAPHS[precision], kind, [MEAN], [STD])  # type: ignore[arg-type]
    found = ort(model, plan.trial(5))
    scores = found.get("score")
    assert plan.disagreement(found["purified"], scores, found["logits"]) is None
    moved = np.abs(found["logits"] - plan.logits[np.arange(5) % 4]).max()  # type: ignore[index]
    assert plan.header["logits_limit"] < np.ptp(plan.logits) / 2  # type: ignore[arg-type]
    for wrong in (
        found["logits"][:, ::-1],
        found["logits"] * 1.5,
        found["logits"] * np.nan,
        np.roll(found["logits"], 1, 0),
    ):
        assert "in the logits" in str(plan.disagreement(found["purified"], scores, wrong)), moved
    assert "grey levels" in str(plan.disagreement(found["purified"][::-1], scores, found["logits"]))


def test_a_gpu_that_cannot_take_the_classifier_is_named(tmp_path: Path, classifier_path: Path) -> None:
    result = export_rtx(tmp_path, classifier_path, "--images", "uint8", "--compute-capability", "7.5")
    if result.exit_code == 0:
        pytest.skip("this TensorRT-RTX compiles float32 products for 7.5")
    assert result.exit_code == 2
    assert "name the others with --compute-capability, or export the classifier in float16" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_engine_for_the_purifier_alone_is_another(engine: Path) -> None:
    """A Purifier that searches the folder passes over an engine with a classifier in it."""
    loaded = load_checkpoint("fashion_mnist")
    key, _ = plans.make_key(plans.RTX, loaded, "uint8", {"compute_capabilities": ["8.9"]}, (1, 8))
    with pytest.raises(plans.PlanRejected, match="graph: expected"):
        plans.read(engine, key)


def test_doctor_compares_a_plan_on_the_gpu_that_it_is_for(tmp_path: Path, engine: Path) -> None:
    for part in engine.parent.iterdir():
        shutil.copy(part, tmp_path)
    path = tmp_path / engine.name
    if cuda.missing() is not None:
        result = CliRunner().invoke(cli.main, ["doctor", "--plan", str(path)])
        assert result.exit_code == 2
        assert f"{path.name} is run by tensorrt_rtx, and " in result.stderr
    with pytest.raises(plans.PlanRejected, match="target: expected"):
        plans.read_exported(path, plans.RTX, {"compute_capabilities": ["12.0"]})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(plans.PlanRejected, match="does not match its digest"):
        plans.read_exported(path, plans.RTX, {"compute_capabilities": ["8.9"]})
    path.with_suffix(".json").unlink()
    result = CliRunner().invoke(cli.main, ["doctor", "--plan", str(path)])
    assert result.exit_code == 2
    assert "unreadable header" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("kind", ["uint8", "float", "half"])
@pytest.mark.parametrize("format", ["tensorrt", "tensorrt-rtx"])
def test_a_joined_engine_agrees_on_the_gpu(
    tmp_path: Path, classifier_path: Path, format: str, kind: str, precision: str
) -> None:
    package = {"tensorrt": plans.TENSORRT, "tensorrt-rtx": plans.RTX}[format]
    if reason := package.missing():
        pytest.skip(reason)
    capability, options = cuda.compute_capability(cuda.current_ordinal()), []
    if package.portable:
        if capability not in plans.compute_capabilities(package):
            pytest.skip(f"{package.module} builds nothing for compute capability {capability}")
        options = ["--compute-capability", capability]
    result = export(
        "fashion_mnist", "-f", format, "--with", classifier_path, "--mean", MEAN, "--std", STD, "--max-batch", 8,
        "--images", kind, "--precision", precision, *options, "-o", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "agrees with float32 on this GPU" in result.stdout
    [path] = tmp_path.glob("*.plan")
    checked = CliRunner().invoke(cli.main, ["doctor", "--plan", str(path)])
    assert checked.exit_code == 0, checked.output
    assert "in batches of 1, 8" in checked.stdout


def test_numbers_for_each_channel(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(COLOUR, 4)
    save_checkpoint(tmp_path / "colour.safetensors", checkpoint)
    onnx.save(make_classifier(COLOUR), tmp_path / "yours.onnx")
    result = export(
        tmp_path / "colour.safetensors", "--with", tmp_path / "yours.onnx", "--mean", "0.485,0.456,0.406",
        "--std", "0.229,0.224,0.225", "-f", "onnx", "--images", "float", "-o", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = join(
        checkpoint, make_classifier(COLOUR), image="float", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    assert onnx.load(tmp_path / "colour_with_yours.float.fp32.onnx") == expected


def test_the_limit_of_logits_grows_with_the_classifier(checkpoint: Checkpoint) -> None:
    images = frames(checkpoint.config, "float", 4)
    joined = join(checkpoint, make_classifier(checkpoint.config), image="float")
    logits, limit = reference(joined, images, 1 / 255)
    np.testing.assert_allclose(logits, ort(joined, images)["logits"], rtol=1e-4, atol=1e-4)
    # A linear classifier: brighter by a level moves the logits by the column sums of its weights; twice that is meant.
    weight = numpy_helper.to_array(make_classifier(checkpoint.config).graph.initializer[0])
    most = 2 * np.abs(weight.sum(0)).max() / 255
    assert 0.5 * most < limit < 2 * most + 0.01 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mean", "0.5", "--std", "0.5"), "expected with a classifier alone"),
        (("--with", "NONE"), "expected an ONNX file at"),
        (("--with", "YOURS", "--mean", "0.5"), "mean and std: expected both or neither"),
        (("--with", "YOURS", "--mean", "0.5,x", "--std", "1"), "expected numbers with commas between them"),
        (("--with", "YOURS", "--mean", "1,2,3", "--std", "1,1,1"), "mean: expected 1 finite number"),
        (("--with", "FIXED", "-f", "tensorrt-rtx"), "expected a free batch axis for a TensorRT engine, got 4"),
        (("--with", "LABELS", "-f", "tensorrt-rtx"), "expected logits of float or float16"),
        (("--with", "LARGE"), "take a classifier of the purifier's image size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_impossible_pairs_are_refused(tmp_path: Path, checkpoint: Checkpoint, words: Any, message: str) -> None:
    if "tensorrt-rtx" in words and (reason := plans.RTX.missing()):
        pytest.skip(reason)
    save_checkpoint(tmp_path / "mine.safetensors", checkpoint)
    labels = make_classifier(checkpoint.config)
    labels.graph.node.append(helper.make_node("ArgMax", ["score"], ["label"], axis=1, keepdims=0))
    labels.graph.output[0].CopyFrom(helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]))
    files = {
        "YOURS": make_classifier(checkpoint.config),
        "FIXED": make_classifier(checkpoint.config, batch=4),
        "LARGE": make_classifier(VAEConfig(32, 1)),
        "LABELS": labels,
    }
    for name, model in files.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
    named = [tmp_path / f"{word}.onnx" if word in (*files, "NONE") else word for word in words]
    result = export(tmp_path / "mine.safetensors", "-f", "onnx", *named, "-o", tmp_path / "out", "--images", "uint8")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
