"""What the tests share: networks with random weights, so that no test depends on the shipped ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defense_vae_fast import cuda
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import WEIGHTS_FOLDER, Checkpoint, save_checkpoint
from training.pool import CLASSIFIER_FOLDER
from training.train_classifier import load_classifier

INTEGRATION_FOLDER = Path(__file__).parent / "integration"
GPU_REASON = "no CUDA device, or hidden because the tests were not started with -m gpu"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite, asked for without paths or -n, runs in a process for each core, with one thread each."""
    # A test that hangs ends with its stack instead of holding up the rest; some have a limit of their own.
    os.environ.setdefault("PYTEST_TIMEOUT", "600")
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    # Servers and clusters would be in each other's way.
    if (
        whole
        and not _is_integration(config)
        and config.pluginmanager.hasplugin("xdist")
        and config.option.numprocesses is None
    ):
        config.option.numprocesses = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "logical"
        config.option.dist = "loadfile"
        # A worker that dies ends the run and is said; in place of a new one xdist has been seen to wait for ever.
        config.option.maxworkerrestart = "0"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the workers, which import torch anew


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from tests that are not about it, and from the processes that they start."""
    if "gpu" not in str(config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Triton decides when a kernel is defined whether it will be interpreted. TRITON_INTERPRET=1 in the environment asks
    # for the interpreter on a GPU too.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _is_integration(config: pytest.Config) -> bool:
    return "integration" in str(config.getoption("markexpr"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the tests that start a server or a cluster, whose packages a plain test environment has not."""
    return True if collection_path == INTEGRATION_FOLDER and not _is_integration(config) else None


def pytest_report_header(config: pytest.Config) -> str | None:
    if _is_integration(config):
        return None
    return (
        "left out: tests/integration; pip install '.[test,integration]', then pytest -m integration tests/integration"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not cuda.has_device():
            item.add_marker(pytest.mark.skip(reason=GPU_REASON))


def python_path(first: Path) -> str:
    """PYTHONPATH for a process that imports from ``first``, and else from where this one was told to."""
    return os.pathsep.join(filter(None, (str(first), os.environ.get("PYTHONPATH"))))


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what a test imported from its own folder, where another test has a module of the same name."""
    folder, path, before = str(tmp_path_factory.getbasetemp()), sys.path[:], set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]


def random_checkpoint(config: VAEConfig | None = None, seed: int = 0) -> Checkpoint:
    """A purifier with random float32 weights, made with numpy alone.

    Weights keep the signal's variance from layer to layer, and no BatchNorm statistic has its neutral value: outputs
    spread over [0, 1], and a mistake in the folding shows.
    """
    config = config or VAEConfig()
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in config.layers():
        taps = layer.in_channels * layer.kernel**2 / (layer.stride**2 if layer.kind == "conv_transpose" else 1)
        for suffix, shape in layer.tensor_shapes().items():
            if suffix == "weight":
                # The last layer's is smaller, or most pixels would be black or white.
                gain = 0.5 if layer.activation == "sigmoid" else 1.0
                value = random.normal(0.0, gain * (2 / taps) ** 0.5, shape)
            elif suffix == "norm.running_var":
                value = random.uniform(0.5, 2.0, shape)
            elif suffix == "norm.weight":
                value = random.uniform(0.75, 1.5, shape)
            else:
                value = random.normal(0.0, 0.2, shape)
            tensors[f"{layer.name}.{suffix}"] = value.astype(np.float32)
    return Checkpoint(config, tensors, dataset="random", recipe={"seed": seed})


@pytest.fixture(scope="session", name="random_checkpoint")
def random_checkpoint_function() -> Callable[[VAEConfig, int], Checkpoint]:
    """:func:`random_checkpoint`, for tests that would rather be given it than import it."""
    return random_checkpoint


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """A random 28x28 purifier."""
    return random_checkpoint()


@pytest.fixture(scope="session")
def checkpoint_path(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random 28x28 purifier as a file."""
    path = tmp_path_factory.mktemp("checkpoint") / "random28.safetensors"
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="session")
def demo_images() -> tuple[Tensor, Tensor]:
    """The packaged clean test images: uint8 (500, 1, 28, 28), and their int64 labels."""
    with np.load(WEIGHTS_FOLDER / "fashion_mnist_demo.npz") as data:
        return torch.from_numpy(data["clean"]).unsqueeze(1), torch.from_numpy(data["labels"].astype(np.int64))


@pytest.fixture(scope="session")
def classifier_d() -> nn.Module:
    """The trained multilayer perceptron of Table 5: real gradients at little cost."""
    return load_classifier(CLASSIFIER_FOLDER / "fashion_mnist_D.safetensors")[0]
