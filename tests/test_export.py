"""Export and doctor, as a user runs them."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from conftest import random_checkpoint

from defense_vae_fast import Purifier, checkpoint, cli, cuda, doctor
from defense_vae_fast.engines import plans
from defense_vae_fast.engines.buckets import BUCKETS
from defense_vae_fast.engines.openvino import OpenVINOEngine, openvino_core


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def expected(checkpoint_path):
    levels = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    with Purifier.from_pretrained(checkpoint_path, precision="fp32") as purifier:
        return levels, purifier(levels)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1), ("fp16", 3)])
def test_onnx_runs_elsewhere(tmp_path, checkpoint_path, expected, precision, limit):
    result = run(
        "export", checkpoint_path, "-f", "onnx", "-o", tmp_path / "out", "--images", "uint8", "--precision", precision
    )
    assert result.exit_code == 0, result.output
    assert names(tmp_path / "out") == [f"random28.uint8.{precision}.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / f"random28.uint8.{precision}.onnx")
    levels, purified = expected
    got, _ = session.run(None, {"images": levels})
    assert np.abs(got.astype(int) - purified).max() <= limit


def test_openvino_runs_elsewhere(tmp_path, checkpoint_path, expected):
    result = run(
        "export", checkpoint_path, "-f", "openvino", "-o", tmp_path, "--precision", "fp16", "--images", "uint8"
    )
    assert result.exit_code == 0, result.output
    assert [name for name in names(tmp_path) if "random" in name] == [
        "random28.uint8.fp16.bin",
        "random28.uint8.fp16.xml",
    ]
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    levels, purified = expected
    compiled = openvino_core().compile_model(
        tmp_path / "random28.uint8.fp16.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    assert np.abs(compiled(levels)["purified"].astype(int) - purified).max() <= 3


def test_an_rtx_engine_is_made_on_a_machine_without_gpu(tmp_path, checkpoint_path, monkeypatch):
    if reason := plans.RTX.missing():
        pytest.skip(reason)
    words = ("export", checkpoint_path, "-f", "tensorrt-rtx", "-o", tmp_path / "out", "--images", "uint8")
    result = run(*words, "--max-batch", 8, "--compute-capability", "8.9", "--compute-capability", "7.5")
    assert result.exit_code == 0, result.output
    assert "not yet compared with float32" in result.stdout
    stem = "random28.uint8.tensorrt-rtx"
    assert names(tmp_path / "out") == [f"{stem}.json", f"{stem}.plan", f"{stem}.safetensors"]
    header = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert header["key"]["target"] == {"compute_capabilities": ["8.9", "7.5"]}

    # The machine with the GPU finds it there, and neither builds nor writes.
    loaded = checkpoint.load_checkpoint(checkpoint_path)
    monkeypatch.setenv(plans.TRUSTED_FOLDER, str(tmp_path / "out"))
    monkeypatch.setattr(plans, "build", None)
    key, graph = plans.make_key(plans.RTX, loaded, "uint8", {"compute_capabilities": ["8.9"]}, BUCKETS)
    assert plans.obtain(plans.RTX, loaded, key, graph, (1, 8)).path.name == f"{stem}.plan"

    again = run(*words)
    assert again.exit_code == 2
    assert "exists; use --force to replace it" in again.stderr


@pytest.mark.parametrize("format", ["onnx", "openvino", "tensorrt-rtx"])
def test_nothing_is_overwritten_without_force(tmp_path, checkpoint_path, format):
    end = {"onnx": "fp32.onnx", "openvino": "fp32.bin", "tensorrt-rtx": "tensorrt-rtx.json"}[format]
    there = tmp_path / f"random28.uint8.{end}"
    there.write_text("mine")
    result = run("export", checkpoint_path, "-f", format, "-o", tmp_path, "--images", "uint8")
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert there.read_text() == "mine"
    assert names(tmp_path) == [there.name]
    if format == "onnx":
        assert (
            run("export", checkpoint_path, "-f", format, "-o", tmp_path, "--images", "uint8", "--force").exit_code == 0
        )
        assert there.stat().st_size > 1e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-f", "onnx", "--lean"), "lean: expected with the format tensorrt alone"),
        (("-f", "onnx", "--compute-capability", "8.9"), "compute capability: expected with the format tensorrt-rtx"),
        (("-f", "tensorrt-rtx", "--compute-capability", "9.0"), "compute capability: expected one of 7.5, "),
        (("-f", "tensorrt-rtx", "--precision", "fp32"), "precision: expected fp16"),
        (("-f", "openvino", "--precision", "fp8"), "expected fp32, fp16 or int8 with openvino"),
        (("-f", "openvino", "--images", "half"), "expected uint8 or float with openvino"),
        (("-f", "onnx", "--images", "half", "--precision", "fp32"), "precision: expected fp16"),
        (("-f", "onnx", "--precision", "int8"), "expected a checkpoint with int8 scales"),
        (("-f", "tensorrt-rtx", "--precision", "int8"), "expected a checkpoint with int8 scales"),
        (("-f", "pickle"), "pickle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_impossible_exports_are_refused(tmp_path, checkpoint_path, words, message):
    if "tensorrt-rtx" in words and (reason := plans.RTX.missing()):
        pytest.skip(reason)
    result = run("export", checkpoint_path, "-o", tmp_path, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert names(tmp_path) == []


def test_tensorrt_names_what_is_missing(tmp_path, checkpoint_path):
    if plans.TENSORRT.missing() is None and cuda.missing() is None:
        pytest.skip("TensorRT works here")
    result = run("export", checkpoint_path, "-f", "tensorrt", "-o", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'defense-vae-fast[tensorrt]'" in result.stderr or "GPU" in result.stderr


def test_doctor_tries_every_engine(checkpoint_path):
    result = run("doctor", "-c", checkpoint_path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for name in ("GPU", "OpenVINO", "PyTorch", "Triton", "TensorRT", "TensorRT-RTX", "PyCUDA", "NVRTC"):
        assert sum(line.startswith(f"{name}: ") for line in lines) == 1
    assert any(line.startswith("engine openvino: ok: works in ") for line in lines)
    assert any(line.startswith("engine torch: ok: works in ") for line in lines)
    assert lines[-1] == "the automatic engine works: openvino"
    for line in lines:
        assert "not found" not in line or "pip install" in line or line.startswith("GPU")


def test_doctor_fails_with_an_engine_whose_numbers_are_wrong(checkpoint_path, monkeypatch):
    right = OpenVINOEngine.run

    def wrong(self, batch, out=None):
        purified, scores = right(self, batch, out)
        return (255 - purified if self.precision != "fp32" or self.max_batch > 1 else purified), scores

    monkeypatch.setattr(OpenVINOEngine, "run", wrong)
    result = run("doctor", "-c", checkpoint_path)
    assert result.exit_code == 1
    assert "engine openvino: FAILED: differs from float32 by" in result.stdout
    assert result.stdout.splitlines()[-1] == "the automatic engine does not work"


def test_doctor_tells_an_engine_that_breaks_and_one_that_is_missing(monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(OpenVINOEngine, "load", broken)
    assert doctor.check(OpenVINOEngine, "cpu", random_checkpoint()) == doctor.Check(
        "openvino", False, "MemoryError: no room"
    )
    monkeypatch.setattr(OpenVINOEngine, "available", classmethod(lambda *_: "gone"))
    missing = doctor.check(OpenVINOEngine, "cpu", random_checkpoint())
    assert missing == doctor.Check("openvino", None, "gone")
    assert doctor.automatic([missing]) is None
