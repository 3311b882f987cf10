"""What of the GPU path can be held without a GPU: the names that it calls exist, and what is missing is told.

The run itself is in test_gpu.py.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from defense_vae_fast import cuda
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.engines import EngineUnavailable, candidates, device_arrays, plans, select, tensorrt
from defense_vae_fast.engines.torch import TorchEngine
from defense_vae_fast.images import ImageReader

GPU_FILES = (cuda, tensorrt, plans)


def attributes_of(module, *names):
    """Attributes that a module's source takes from any of these variables."""
    tree = ast.parse(inspect.getsource(module))
    return {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in names
    }


def test_every_driver_call_is_in_nvidias_bindings():
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    used = {name for name in attributes_of(cuda, "driver", "cuda", "self._cuda") if re.match(r"cu[A-Z]|CU", name)}
    assert {"cuStreamBeginCapture", "cuGraphInstantiate", "cuGraphLaunch", "cuStreamWaitEvent"} <= used
    assert not [name for name in used if not hasattr(bindings, name)]
    for kind, member in (
        ("CUstream_flags", "CU_STREAM_NON_BLOCKING"),
        ("CUevent_flags", "CU_EVENT_DISABLE_TIMING"),
        ("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"),
        ("CUresult", "CUDA_ERROR_OUT_OF_MEMORY"),
    ):
        assert hasattr(getattr(bindings, kind), member)
    assert (
        int(bindings.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        int(bindings.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    ) == cuda._CAPABILITY_ATTRIBUTES


def test_every_tensorrt_call_of_the_run_is_in_its_python_package():
    """The three packages have one API; the one that installs without a GPU is looked at."""
    if reason := plans.RTX.missing():
        pytest.skip(reason)
    trt = plans.RTX.load()
    wanted = {
        trt.IExecutionContext: attributes_of(tensorrt, "context"),
        trt.ICudaEngine: attributes_of(tensorrt, "self.engine"),
        trt.Runtime: attributes_of(tensorrt, "self._runtime", "runtime"),
        trt.IBuilderConfig: attributes_of(plans, "config"),
        trt.Builder: attributes_of(plans, "builder"),
        trt: attributes_of(tensorrt, "trt", "self._trt") | attributes_of(plans, "trt"),
        trt.IRuntimeConfig: {
            "set_execution_context_allocation_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "cuda_graph_strategy",
        },
    }
    assert {"execute_async_v3", "set_tensor_address", "set_device_memory"} <= wanted[trt.IExecutionContext]
    missing = {owner: [name for name in names if not hasattr(owner, name)] for owner, names in wanted.items()}
    assert not any(missing.values()), missing


def without_gpu():
    if cuda.has_device():
        pytest.skip("there is a GPU here")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "tensorrt-lean"])
def test_a_named_engine_says_what_it_misses(name):
    without_gpu()
    with pytest.raises(EngineUnavailable) as error:
        select(name)
    assert re.search(r"pip install 'defense-vae-fast\[[a-z-]+\]'|driver|device", str(error.value))


def test_auto_is_as_ever_without_a_gpu():
    without_gpu()
    assert [(engine.name, device) for engine, device in candidates()] == [("openvino", "auto"), ("torch", "auto")]


def test_auto_tries_the_gpu_first(monkeypatch):
    monkeypatch.setattr(cuda, "has_device", lambda: True)
    assert [(engine.name, device) for engine, device in candidates()] == [
        ("tensorrt", "cuda"),
        ("tensorrt-rtx", "cuda"),
        ("tensorrt-lean", "cuda"),
        ("torch", "cuda"),
        ("openvino", "cpu"),
        ("torch", "cpu"),
    ]
    assert [engine.name for engine, _ in candidates(device="cpu")] == ["openvino", "torch"]
    assert "openvino" not in [engine.name for engine, _ in candidates(device="cuda")]


def test_torch_on_the_cpu_comes_after_torch_on_cuda_failed(monkeypatch):
    """A GPU without the packages for it: each is passed over with its reason, and the CPU's engine is taken."""
    without_gpu()
    monkeypatch.setattr(cuda, "has_device", lambda: True)
    selection = select()
    assert (selection.engine.name, selection.device) == ("openvino", "cpu")
    assert list(selection.skipped) == ["tensorrt", "tensorrt-rtx", "tensorrt-lean", "torch on cuda"]
    selection = select(precision="fp16", failed={"torch on cuda": "no room"})
    assert selection.engine is TorchEngine
    assert selection.device == "cpu"


def test_the_tensorrt_path_never_imports_torch(tmp_path):
    """Up to the point where a GPU is needed: the plan is built, cached and read, the kernels are compiled."""
    if reason := plans.RTX.missing():
        pytest.skip(reason)
    code = """
        import sys
        sys.modules["torch"] = None
        from defense_vae_fast import cuda
        from defense_vae_fast.checkpoint import load_checkpoint
        from defense_vae_fast.engines import plans, tensorrt
        checkpoint = load_checkpoint("fashion_mnist")
        key, graph = plans.make_key(plans.RTX, checkpoint, "half", {"compute_capabilities": ["8.9"]}, (1,))
        print(len(plans.obtain(plans.RTX, checkpoint, key, graph).data) > 5_000_000)
        print(tensorrt.TensorRTRTXEngine.available())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(cuda.__file__).parents[1],
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "True"
    assert done.stdout.splitlines()[1] != "None"


@pytest.mark.parametrize("shape", [(28, 28, 1), (3, 28, 28, 1), (1, 28, 28), (3, 1, 28, 28)], ids=str)
def test_cupy_arrays_are_read_where_they_are(shape):
    """CuPy's functions are NumPy's, so NumPy stands in for it."""
    uint8 = shape[-1] == 1
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reader = ImageReader(VAEConfig(), None, 0)
    for array in [images] if uint8 else [(images / 255).astype(dtype) for dtype in ("f2", "f4", "f8")]:
        batch = reader._read_cupy_here(np, array)
        assert batch.on_device
        assert batch.single is (len(shape) == 3)
        assert batch.array.dtype == (np.uint8 if uint8 else np.float32)
        assert batch.array.shape == (1, *shape)[-4:]
        back = batch.images(batch.array)
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(back, array, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 28, 28), np.int32), "got int32"),
        (np.zeros((28, 29, 1), np.uint8), "images: expected"),
        (np.full((1, 28, 28), np.nan, np.float32), "got NaN"),
        (np.full((1, 28, 28), 2, np.float32), "from 2.0 to 2.0"),
    ],
    ids=["dtype", "shape", "NaN", "range"],
)
def test_wrong_cupy_arrays_are_refused(array, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ImageReader(VAEConfig(), None, 0)._read_cupy_here(np, array)


def test_what_is_not_on_the_gpu_is_no_device_array():
    with pytest.raises(ValueError, match="contiguous CUDA tensor, got one on cpu"):
        device_arrays.view(torch.zeros(1, 1, 28, 28))
    with pytest.raises(TypeError, match="expected a torch tensor or a CuPy array, got numpy"):
        device_arrays.view(np.zeros((1, 1, 28, 28), np.float32))
    made = device_arrays.empty(torch.zeros(1), (2, 3), np.dtype(np.uint8))
    assert (made.dtype, tuple(made.shape)) == (torch.uint8, (2, 3))
