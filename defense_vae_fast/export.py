"""Purifiers as files for other programs and other machines: ONNX, OpenVINO IR, TensorRT plans.

With a classifier, one graph of both; see :mod:`~defense_vae_fast.joined_graph`.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from defense_vae_fast import cuda, joined_graph, onnx_graph
from defense_vae_fast.atomic import replacing
from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint
from defense_vae_fast.engines import plans
from defense_vae_fast.engines import tensorrt as tensorrt_engine
from defense_vae_fast.engines.base import EngineUnavailable
from defense_vae_fast.engines.buckets import BUCKETS, buckets_for
from defense_vae_fast.engines.openvino import openvino_core

FORMATS = ("onnx", "openvino", "tensorrt", "tensorrt-rtx")
KINDS: tuple[onnx_graph.ImageKind, ...] = ("uint8", "float", "half")
_Join = Callable[[onnx_graph.Precision, onnx_graph.ImageKind], onnx.ModelProto]
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
    classifier: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    force: bool = False,
) -> Exported:
    """Write a purifier for one kind of images, alone or with a classifier; every file whole or not at all.

    Args:
        checkpoint: a shipped name or a path.
        format: one of ``FORMATS``.
        folder: where the files go; made if it is not there.
        kind: "uint8" (N, H, W, C), "float" (N, C, H, W) float32 or "half" the same in float16, both in [0, 1].
        precision: of weights and arithmetic in ONNX, of weights in OpenVINO IR: "fp32" (the default), "fp16", or "int8"
            for checkpoints with scales. TensorRT: "fp16" (the default), "int8" or "fp8", which takes compute capability
            8.9 or more. A classifier keeps its own, except that OpenVINO IR in "fp16" stores its weights in fp16, too.
        max_batch: largest batch of a TensorRT plan; the other formats take any.
        lean: a plan for the lean runtime; format "tensorrt" alone.
        compute_capabilities: of the GPUs that a TensorRT-RTX plan is for, such as "8.9"; all that it knows by default.
        classifier: an ONNX file whose graph follows the purifier's: images -> purified, score and logits.
        mean, std: of the images that the classifier wants, as in :func:`~defense_vae_fast.joined_graph.join`.
        force: replace files that are there.

    Raises:
        FileExistsError: a file is there and ``force`` is not given.
        FileNotFoundError, CheckpointError: as :func:`~defense_vae_fast.checkpoint.load_checkpoint`.
        ValueError: an unknown format, kind or precision, an option that the format does not have, or a classifier that
            does not fit.
        EngineUnavailable: what the format needs is missing here; BuildError, AcceptanceError: the engine is no good.
    """
    _check_options(format, kind, precision, lean, compute_capabilities)
    if not classifier and (mean is not None or std is not None):
        raise ValueError("mean and std: expected with a classifier alone, got them without; they are for its images")
    company = f"_with_{Path(classifier).stem}" if classifier else ""
    stem = f"{Path(checkpoint).stem}{company}.{kind}"
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
    join = functools.partial(joined_graph.join, loaded, classifier, mean=mean, std=std) if classifier else None
    if format in _PACKAGES:
        buckets = buckets_for(max_batch)
        plan, note = _build(
            _PACKAGES[format], loaded, kind, precision, buckets, lean, tuple(compute_capabilities), join
        )
        plans.write(plan, paths[0])
        return Exported(paths, note)
    # OpenVINO stores fp16 weights of an fp32 graph. An int8 graph with fp16 images is TensorRT's, the other x86's.
    fp32 = format == "openvino" and precision != "int8"
    chosen: dict[str, onnx_graph.Precision] = {
        "fp32": "fp32", "fp16": "fp32" if fp32 else "fp16", "int8": "int8_fp16" if kind == "half" else "int8",
        "fp8": "fp8_fp16",
    }  # fmt: skip
    make = join or functools.partial(onnx_graph.build, loaded)
    graph = make(chosen[precision], kind)
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
    join: _Join | None,
) -> tuple[plans.Plan, str]:
    if reason := package.missing():
        raise EngineUnavailable(reason)
    graph = reference = None
    if join is not None:
        joined = join(plans.GRAPHS[precision], kind)
        _check_for_plan(joined)
        graph = joined.SerializeToString()
        reference = functools.partial(joined_graph.reference, join("fp32", "float"))
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
    key, graph = plans.make_key(package, checkpoint, kind, target, buckets, precision=precision, lean=lean, graph=graph)
    try:
        plan = plans.build(package, checkpoint, key, graph, with_classifier=reference)
    except plans.BuildError as error:
        if join is None or "7.5" not in target.get("compute_capabilities", ()):
            raise
        # Seen with TensorRT-RTX 1.7 for a Gemm in float32: "FP32 GEMM is not supported" on Turing.
        raise plans.BuildError(
            f"{error}; compute capability 7.5 may take no classifier in float32: "
            "name the others with --compute-capability, or export the classifier in float16"
        ) from error
    if not here:
        owed = "every load on a GPU does that first"
        if join is not None:
            owed = "do that there with: defense-vae-fast doctor --plan FILE.plan"
        return plan, f"built, not yet compared with float32: no such GPU here; {owed}"
    tensorrt_engine.accept(package, plan)
    return plan, "agrees with float32 on this GPU"


def check_plan(path: Path) -> str:
    """Compare an exported plan, with or without a classifier, with float32 on this machine's GPU.

    A plan is native code: check one that you trust.

    Returns:
        What it was compared on.

    Raises:
        PlanRejected: its files are missing or damaged, or it is for another GPU or version.
        EngineUnavailable: there is no GPU here, or the package that runs it is missing.
        AcceptanceError: the numbers differ by more than rounding.
    """
    package = plans.package_of(path)
    if reason := package.missing() or cuda.missing():
        raise EngineUnavailable(f"{path.name} is run by {package.module}, and {reason}")
    device = cuda.Device.get(cuda.current_ordinal())
    portable = {"compute_capabilities": [device.compute_capability]}
    plan = plans.read_exported(path, package, portable if package.portable else tensorrt_engine.target_of(device))
    tensorrt_engine.accept(package, plan)
    return f"agrees with float32 on {device.name} in batches of {', '.join(map(str, plan.buckets))}"


def _check_for_plan(joined: onnx.ModelProto) -> None:
    """A plan has profiles for several batch sizes, and logits that are numbers."""
    if fixed := joined.graph.input[0].type.tensor_type.shape.dim[0].dim_value:
        raise ValueError(
            f"classifier: expected a free batch axis for a TensorRT engine, got {fixed}; export it with a dynamic one"
        )
    kind = next(value for value in joined.graph.output if value.name == joined_graph.LOGITS).type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise ValueError(
            f"classifier: expected logits of float or float16 for a TensorRT engine, got "
            f"{TensorProto.DataType.Name(kind).lower()}; cut the graph before it chooses a class"
        )


def _write_openvino(graph: bytes, paths: Sequence[Path], *, compress: bool) -> None:
    import openvino

    model = openvino_core().read_model(graph)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths[0].parent, prefix=".export-") as folder:
        made = Path(folder) / paths[0].name
        openvino.save_model(model, made, compress_to_fp16=compress)
        # The weights first: the .xml is what programs open.
        for path in reversed(paths):
            shutil.move(made.with_suffix(path.suffix), path)
