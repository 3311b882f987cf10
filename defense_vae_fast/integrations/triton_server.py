"""Model repositories for NVIDIA Triton Inference Server: the purifier as a model that any of its clients can call.

The Python backend runs a :class:`~defense_vae_fast.Purifier` in the server (:mod:`.triton_model`), with whatever engine
works there; it needs this package in the server's Python. The stock backends ``onnxruntime`` and ``tensorrt`` run the
network's graph and need nothing. All three have one interface, and the server's dynamic batching::

    images    uint8 (N, H, W, C) in 0..255, or float32 (N, C, H, W) in [0, 1]
    purified  the same type and shape
    score     float32 (N, 1): mean |x - x_hat| of each image, in [0, 1]
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import load_checkpoint, save_checkpoint
from defense_vae_fast.engines import ENGINES
from defense_vae_fast.engines.base import DEFAULT_MAX_BATCH, check_count
from defense_vae_fast.engines.buckets import buckets_for
from defense_vae_fast.export import export
from defense_vae_fast.onnx_graph import INPUT, PURIFIED, SCORE

Backend = Literal["python", "onnx", "tensorrt"]
Kind = Literal["uint8", "float"]

BACKENDS: tuple[Backend, ...] = ("python", "onnx", "tensorrt")
KINDS: tuple[Kind, ...] = ("uint8", "float")
CHECKPOINT_FILE = "checkpoint.safetensors"
PREFERRED = (8, 16, 32, 64)  # images that the CPU engine takes at once, and its multiples
_MARK = "# Written by defense-vae-fast triton-repository."
_MODEL_FILES = ("model.py", CHECKPOINT_FILE, "model.onnx", "model.plan")
_MODEL = '''"""The purifier; the work is in the package, which the server's Python must have."""

from defense_vae_fast.integrations.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Batching:
    """How the server gathers requests.

    Attributes:
        max_batch: most images of a batch; a request with more is refused.
        preferred: sizes that are sent off at once; those above ``max_batch`` are left out.
        max_delay_us: microseconds for which a request waits for others before a batch of another size is sent off; 0
            gathers what has queued up while the model was busy, and holds nobody up.
        max_queue: requests that may wait; those beyond are refused at once. 0: any number. With a limit Triton (2.51)
            stops preparing a batch while another runs, and its batcher then overslept 4 to 11 % of the requests of a
            loaded machine by 500 ms.
    """

    max_batch: int = DEFAULT_MAX_BATCH
    preferred: tuple[int, ...] = PREFERRED
    max_delay_us: int = 0
    max_queue: int = 0

    def __post_init__(self) -> None:
        check_count("max_batch", self.max_batch)
        for size in self.preferred:
            check_count("preferred", size)
        for name, value in (("max_delay_us", self.max_delay_us), ("max_queue", self.max_queue)):
            if type(value) is not int or not 0 <= value <= 1 << 30:
                raise ValueError(f"{name}: expected an int from 0 to {1 << 30}, got {value!r}")


def write_model(
    repository: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] = "fashion_mnist",
    *,
    name: str = "purifier",
    backend: Backend = "python",
    kind: Kind = "uint8",
    engine: str = "auto",
    precision: str | None = None,
    batching: Batching | None = None,
    instances: int = 1,
    force: bool = False,
) -> Path:
    """Write a purifier as one model of a repository, whole or not at all.

    The model holds its own copy of the checkpoint. A model that is there stays as it is until the new one is complete.

    Args:
        repository: the folder that ``tritonserver --model-repository`` is given; made if it is not there, and other
            models in it are left alone.
        checkpoint: a shipped name or a path.
        name: of the model: letters, digits, "_", "-" and ".", a letter or digit first.
        backend: "python" for a Purifier; "onnx" for the backend ``onnxruntime``; "tensorrt" for a plan, which has to be
            built on the kind of GPU that serves it.
        kind: what images clients send, see above.
        engine: of the Purifier, or "auto"; with "python" alone.
        precision: of the Purifier, or of the graph as in :func:`~defense_vae_fast.export.export`; None for the usual.
        batching: how requests share batches.
        instances: copies of the model that the server runs. One engine uses all of a CPU.
        force: replace a model of this name that this function wrote.

    Returns:
        The model's folder.

    Raises:
        FileExistsError: there is a model of this name, and ``force`` is not given or something else made it.
        FileNotFoundError, CheckpointError: as :func:`~defense_vae_fast.checkpoint.load_checkpoint`.
        ValueError: an argument is not one of those above.
        EngineUnavailable: "tensorrt" without TensorRT or a GPU.
    """
    batching = Batching() if batching is None else batching
    _check(name, backend, kind, engine, precision, instances)
    repository = Path(repository)
    target = repository / name
    _check_target(target, force=force)
    loaded = load_checkpoint(checkpoint)
    parameters: dict[str, str] = {}
    profile = None

    repository.mkdir(parents=True, exist_ok=True)
    staging = _beside(repository) / f".{name}-{secrets.token_hex(8)}.tmp"
    try:
        version = staging / "1"
        version.mkdir(parents=True)
        if backend == "python":
            save_checkpoint(version / CHECKPOINT_FILE, loaded)
            (version / "model.py").write_text(_MODEL)
            parameters = {
                "digest": loaded.digest, "engine": engine, "precision": precision or "auto",
                "max_batch": str(batching.max_batch),
            }  # fmt: skip
        else:
            file = export(checkpoint, backend, staging, kind, precision=precision, max_batch=batching.max_batch).paths[
                0
            ]
            file.rename(version / f"model{file.suffix}")
            for other in staging.iterdir():  # what this library, and not the server, wants beside a plan
                if other.is_file():
                    other.unlink()
            profile = len(buckets_for(batching.max_batch)) - 1 if backend == "tensorrt" else None
        text = config(name, backend, loaded.config, kind, batching, instances, parameters, profile)
        (staging / "config.pbtxt").write_text(text)
        _put(staging, target, force=force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def config(
    name: str,
    backend: Backend,
    network: VAEConfig,
    kind: Kind,
    batching: Batching,
    instances: int = 1,
    parameters: dict[str, str] | None = None,
    profile: int | None = None,
) -> str:
    """The model's ``config.pbtxt``, a ``ModelConfig`` of Triton in protobuf's text format."""
    channels, height, width = network.image_shape
    dims = [height, width, channels] if kind == "uint8" else [channels, height, width]
    data_type = {"uint8": "TYPE_UINT8", "float": "TYPE_FP32"}[kind]
    runs = {"python": 'backend: "python"', "onnx": 'backend: "onnxruntime"', "tensorrt": 'backend: "tensorrt"'}[backend]
    preferred = sorted({size for size in batching.preferred if size <= batching.max_batch})
    # A Purifier takes its images from host memory and chooses its device itself.
    device = {"python": "KIND_CPU", "onnx": "KIND_AUTO", "tensorrt": "KIND_GPU"}[backend]
    lines = [
        _MARK,
        f"name: {json.dumps(name)}",
        runs,
        f"max_batch_size: {batching.max_batch}",
        f'input [ {{ name: "{INPUT}" data_type: {data_type} dims: {dims} }} ]',
        "output [",
        f'  {{ name: "{PURIFIED}" data_type: {data_type} dims: {dims} }},',
        f'  {{ name: "{SCORE}" data_type: TYPE_FP32 dims: [1] reshape: {{ shape: [] }} }}',
        "]",
        "dynamic_batching {",
        *([f"  preferred_batch_size: {preferred}"] if preferred else []),
        f"  max_queue_delay_microseconds: {batching.max_delay_us}",
        *([f"  default_queue_policy {{ max_queue_size: {batching.max_queue} }}"] if batching.max_queue else []),
        "}",
        f"instance_group [ {{ kind: {device} count: {instances}"
        + (f' profile: ["{profile}"] }} ]' if profile is not None else " } ]"),
        *(
            f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
            for key, value in (parameters or {}).items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _check(name: str, backend: str, kind: str, engine: str, precision: str | None, instances: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name: expected letters, digits, '_', '-' and '.', got {name!r}; choose a plainer one")
    choices: Sequence[tuple[str, str, Sequence[str]]] = [("backend", backend, BACKENDS), ("images", kind, KINDS)]
    if backend == "python":
        choices = [
            *choices,
            ("engine", engine, ["auto", *(each.name for each in ENGINES)]),
            ("precision", precision or "auto", ["auto", *dict.fromkeys(p for e in ENGINES for p in e.precisions)]),
        ]
    elif engine != "auto":
        raise ValueError(f"engine: expected with the backend python alone, got it with {backend}; leave it out")
    for label, value, known in choices:
        if value not in known:
            raise ValueError(f"{label}: expected one of {', '.join(known)}, got {value!r}")
    check_count("instances", instances, 1024)


def _check_target(target: Path, *, force: bool) -> None:
    """Raise unless ``target`` is free, or holds what :func:`write_model` wrote and ``force`` is given."""
    if not os.path.lexists(target):
        return
    reason = _foreign(target)
    if reason is not None:
        raise FileExistsError(f"{target}: {reason}; it is left alone, choose another name or folder")
    if not force:
        raise FileExistsError(f"{target} exists; use --force to replace it")


def _foreign(target: Path) -> str | None:
    """Why ``target`` cannot be a model that :func:`write_model` wrote; None where it can."""
    if target.is_symlink() or not target.is_dir():
        return "expected a model's folder, got something else"
    try:
        with (target / "config.pbtxt").open(encoding="utf-8", errors="replace") as file:
            mark = file.readline().rstrip("\n")
    except OSError:
        mark = ""
    if mark != _MARK:
        return "expected a model that defense-vae-fast wrote, got another"
    own = {"config.pbtxt", "1", *(f"1/{name}" for name in _MODEL_FILES)}
    for path in sorted(target.rglob("*")):
        relative = path.relative_to(target)
        if relative.as_posix() not in own and "__pycache__" not in relative.parts:
            return f"expected the files of a model that defense-vae-fast wrote, got {relative} among them"
    return None


def _beside(repository: Path) -> Path:
    """A folder on the file system of ``repository``: its parent where possible.

    Triton takes every folder of a repository for a model, hidden ones too, and one that is no model stops the server.
    """
    parent = repository.resolve().parent
    same = parent.stat().st_dev == repository.stat().st_dev
    return parent if same and os.access(parent, os.W_OK) else repository


def _put(staging: Path, target: Path, *, force: bool) -> None:
    """Rename ``staging`` to ``target``; a model that was there comes back if this fails."""
    _check_target(target, force=force)
    if not target.exists():
        staging.rename(target)
        return
    old = staging.with_suffix(".old")
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
