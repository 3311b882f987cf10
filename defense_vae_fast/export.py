"""Purifiers as files for other programs and other machines: ONNX, OpenVINO IR, TensorRT plans."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from defense_vae_fast import cuda, onnx_graph
from defense_vae_fast.atomic import replacing
from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint
from defense_vae_fast.engines import plans
from defense_vae_fast.engines import tensorrt as tensorrt_engine
from defense_vae_fast.engines.base import EngineUnavailable
from defense_vae_fast.engines.buckets import BUCKETS, buckets_for

FORMATS = ("onnx", "openvino", "tensorrt", "tensorrt-rtx")
KINDS: tuple[onnx_graph.ImageKind, ...] = ("uint8", "float", "half")
_PACKAGES = {"tensorrt": plans.TENSORRT, "tensorrt-rtx": plans.RTX}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        paths: every file, the one that other programs open first.
        note: what is still owed, or how the file was checked.
    """

    paths: tuple[Path, ...]
    note: str


def export(
    checkpoint: str | os.PathLike[str],
    format: str,
    folder: Path,
    kind: onnx_graph.ImageKind = "uint8",
    *,
    precision: str | None = None,
    max_batch: int = BUCKETS[-1],
    lean: bool = False,
    compute_capabilities: Sequence[str] = (),
    force: bool = False,
) -> Exported:
    """Write a purifier for one kind of images; every file whole or not at all.

    Args:
        checkpoint: a shipped name or a path.
        format: one of ``FORMATS``.
        folder: where the files go; made if it is not there.
        kind: "uint8" (N, H, W, C), "float" (N, C, H, W) float32 or "half" the same in float16, both in [0, 1].
        precision: of weights and arithmetic in ONNX, of weights in OpenVINO IR: "fp32" (the default), "fp16", or "int8"
            for checkpoints with scales. TensorRT: "fp16" (the default), "int8" or "fp8", which takes compute capability
            8.9 or more.
        max_batch: largest batch of a TensorRT plan; the other formats take any.
        lean: a plan for the lean runtime; format "tensorrt" alone.
        compute_capabilities: of the GPUs that a TensorRT-RTX plan is for, such as "8.9"; all that it knows by default.
        force: replace files that are there.

    Raises:
        FileExistsError: a file is there and ``force`` is not given.
        FileNotFoundError, CheckpointError: as :func:`~defense_vae_fast.checkpoint.load_checkpoint`.
        ValueError: an unknown format, kind or precision, or an option that the format does not have.
        EngineUnavailable: what the format needs is missing here; BuildError, AcceptanceError: the engine is no good.
    """
    _check_options(format, kind, precision, lean, compute_capabilities)
    stem = f"{Path(checkpoint).stem}.{kind}"
    precision = precision or ("fp16" if format in _PACKAGES or kind == "half" else "fp32")
    suffix = "" if precision == "fp16" else f".{precision}"
    names = {
        "onnx": (f"{stem}.{precision}.onnx",),
        "openvino": (f"{stem}.{precision}.xml", f"{stem}.{precision}.bin"),
    }.get(
        format,
        tuple(f"{stem}{suffix}.{format}{'-lean' if lean else ''}{s}" for s in (".plan", ".json", ".safetensors")),
    )
    paths = tuple(folder / name for name in names)
    if not force and (there := [path for path in paths if path.exists()]):
        raise FileExistsError(f"{there[0]} exists; use --force to replace it")
    loaded = load_checkpoint(checkpoint)
    if format in _PACKAGES:
        buckets = buckets_for(max_batch)
        plan, note = _build(_PACKAGES[format], loaded, kind, precision, buckets, lean, tuple(compute_capabilities))
        plans.write(plan, paths[0])
        return Exported(paths, note)
    # OpenVINO stores fp16 weights of an fp32 graph. An int8 graph with fp16 images is TensorRT's, the other x86's.
    fp32 = format == "openvino" and precision != "int8"
    chosen: dict[str, onnx_graph.Precision] = {
        "fp32": "fp32", "fp16": "fp32" if fp32 else "fp16", "int8": "int8_fp16" if kind == "half" else "int8",
        "fp8": "fp8_fp16",
    }  # fmt: skip
    graph = onnx_graph.build(loaded, chosen[precision], kind)
    if format == "onnx":
        with replacing(paths[0]) as file:
            file.write(graph.SerializeToString())
        return Exported(paths, "checked by onnx.checker")
    _write_openvino(graph.SerializeToString(), paths, compress=precision == "fp16")
    return Exported(paths, "read and written by OpenVINO")


def _check_options(
    format: str, kind: str, precision: str | None, lean: bool, compute_capabilities: Sequence[str]
) -> None:
    for name, value, known in (("format", format, FORMATS), ("images", kind, KINDS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if precision not in (None, "fp32", "fp16", "int8", "fp8"):
        raise ValueError(f"precision: expected fp32, fp16, int8 or fp8, got {precision!r}")
    if precision == "fp8" and format == "openvino":
        raise ValueError("precision: expected fp32, fp16 or int8 with openvino, got 'fp8'")
    if precision == "fp32" and (format in _PACKAGES or kind == "half"):
        raise ValueError(f"precision: expected fp16 or int8 with {format} and {kind} images, got 'fp32'")
    if format == "openvino" and kind == "half":
        raise ValueError("images: expected uint8 or float with openvino, got 'half'")
    if lean and format != "tensorrt":
        raise ValueError(f"lean: expected with the format tensorrt alone, got it with {format}")
    if compute_capabilities and format != "tensorrt-rtx":
        raise ValueError(f"compute capability: expected with the format tensorrt-rtx alone, got it with {format}")


def _build(
    package: plans.Package,
    checkpoint: Checkpoint,
    kind: onnx_graph.ImageKind,
    precision: str,
    buckets: tuple[int, ...],
    lean: bool,
    compute_capabilities: tuple[str, ...],
) -> tuple[plans.Plan, str]:
    if reason := package.missing():
        raise EngineUnavailable(reason)
    no_gpu = cuda.missing()
    target: plans.Target
    if package.portable:
        listed = plans.compute_capabilities(package)
        if unknown := [value for value in compute_capabilities if value not in listed]:
            raise ValueError(f"compute capability: expected one of {', '.join(listed)}, got {unknown[0]!r}")
        chosen = compute_capabilities or listed
        target = {"compute_capabilities": list(chosen)}
        here = no_gpu is None and cuda.compute_capability(cuda.current_ordinal()) in chosen
    else:
        if no_gpu is not None:
            raise EngineUnavailable(f"{package.module} builds on the GPU that the engine is for, and {no_gpu}")
        target, here = tensorrt_engine.target_of(cuda.Device.get(cuda.current_ordinal())), True
    key, graph = plans.make_key(package, checkpoint, kind, target, buckets, precision=precision, lean=lean)
    plan = plans.build(package, checkpoint, key, graph)
    if not here:
        return plan, "built, not yet compared with float32: no such GPU here; every load on a GPU does that first"
    tensorrt_engine.accept(package, plan)
    return plan, "agrees with float32 on this GPU"


def _write_openvino(graph: bytes, paths: Sequence[Path], *, compress: bool) -> None:
    import openvino

    model = openvino.Core().read_model(graph)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths[0].parent, prefix=".export-") as folder:
        made = Path(folder) / paths[0].name
        openvino.save_model(model, made, compress_to_fp16=compress)
        # The weights first: the .xml is what programs open.
        for path in reversed(paths):
            shutil.move(made.with_suffix(path.suffix), path)
