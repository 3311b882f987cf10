"""TensorRT plans: built from the ONNX graph, kept in a cache, checked before they are loaded.

One code path for three packages with the same API: ``tensorrt`` (10.3 or later, builds and runs), ``tensorrt_rtx``
(builds without any GPU, for all of its compute capabilities; runs), ``tensorrt_lean`` (runs what ``tensorrt`` built
with ``lean=True``).

A plan is three files with one stem: ``.plan``, the binary that TensorRT reads; ``.safetensors``, trial images and what
float32 makes of them; ``.json``, the header: everything that the plan depends on, and the digests of the two others.
The header is written last and read first. A plan is native code: nothing of it is loaded unless header and digests
match.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as _parse
from safetensors.numpy import save as _serialize

from defense_vae_fast import __version__, cache
from defense_vae_fast.atomic import replacing
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines.base import EngineUnavailable
from defense_vae_fast.engines.trial import trial_images

if TYPE_CHECKING:
    from defense_vae_fast.onnx_graph import ImageKind, Precision

FORMAT = 1
Target = dict[str, Any]
Progress = Callable[[str, float], None]
"""Called with the builder's phase and the share of it that is done, 0 to 1; from the builder's own threads."""
Reference = Callable[[npt.NDArray[np.float32], float], tuple[npt.NDArray[np.float32], float]]

WORKSPACE_BYTES = 1 << 30
TRUSTED_FOLDER = "DEFENSE_VAE_FAST_PLANS"
"""Environment variable: a folder of plans made elsewhere by ``defense-vae-fast export``, which the operator trusts."""

# Grey levels on average and at most. fp16 keeps 11 bits: a trained network moves by less than half a level; by 0.8 in
# int8, more in fp8, which has fewer digits. Beyond these it is broken, not rounded.
TOLERANCE = {"fp16": (0.5, 8.0), "int8": (5.0, 64.0), "fp8": (5.0, 96.0)}
GRAPHS: dict[str, Precision] = {"fp16": "fp16", "int8": "int8_fp16", "fp8": "fp8_fp16"}
"""Precision of a plan, and of the graph that it is built from."""

_MAX_HEADER_BYTES = 1 << 20
_FEW_PIXELS = 64 * 64  # larger images have one trial image instead of four: a plan's vectors stay below 40 MB

_log = logging.getLogger("defense_vae_fast.tensorrt")


class BuildError(EngineUnavailable):
    """The builder made no engine; the message holds what it said."""


class PlanRejected(ValueError):
    """A plan's files are damaged, of another build, or not for this machine; the message says which."""


@dataclass(frozen=True)
class Package:
    """One of the TensorRT packages."""

    module: str
    engine: str
    extra: str
    builds: bool
    portable: bool
    """Its plans name the compute capabilities that they are for and are finished on the GPU that loads them."""
    times: bool
    """Its builder times kernels on the GPU, and can keep the times."""

    def missing(self) -> str | None:
        """None when the package imports, otherwise what to install."""
        install = f"pip install 'defense-vae-fast[{self.extra}]'"
        if importlib.util.find_spec(self.module) is None:
            return f"the package {self.module} is not installed; install it with: {install}"
        try:
            self.load()
        except (ImportError, OSError, RuntimeError) as error:  # installed, but broken
            return f"the package {self.module} does not import ({error}); install it again with: {install}"
        return None

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


TENSORRT = Package("tensorrt", "tensorrt", "tensorrt", builds=True, portable=False, times=True)
RTX = Package("tensorrt_rtx", "tensorrt-rtx", "rtx", builds=True, portable=True, times=False)
LEAN = Package("tensorrt_lean", "tensorrt-lean", "tensorrt-lean", builds=False, portable=False, times=False)


@dataclass(frozen=True)
class Key:
    """Everything that a plan depends on. Two equal keys mean the same plan.

    Attributes:
        package: module that built it.
        package_version: that module's version.
        library_version: this library's version.
        checkpoint: the checkpoint's digest, for people; the graph's covers the weights.
        graph: SHA-256 of the serialized ONNX graph: weights, precision, kind of images.
        precision: "fp16", "int8" or "fp8".
        kind: what the images are.
        buckets: batch sizes that have a profile; the largest one's profile takes any number up to it.
        workspace: most bytes of scratch memory that a kernel may use.
        lean: version-compatible, for the lean runtime.
        target: ``{"compute_capabilities": ["8.9", ...]}``, or ``{"gpu": name, "compute_capability": "9.0",
            "driver": version}``.
    """

    package: str
    package_version: str
    library_version: str
    checkpoint: str
    graph: str
    precision: str
    kind: ImageKind
    buckets: tuple[int, ...]
    workspace: int
    lean: bool
    target: Target
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the header."""
        return {**asdict(self), "buckets": list(self.buckets)}

    @property
    def stem(self) -> str:
        """Name of the plan's files in the cache."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return f"{self.package}-{self.precision}-{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class Plan:
    """A plan whose files have been checked.

    Attributes:
        data: for the runtime's ``deserialize_cuda_engine``.
        buckets: batch sizes with a profile each, in the order of the profiles.
        images: uint8 (n, H, W, C) trial images.
        purified: float32 (n, C, H, W), what OpenVINO's float32 makes of them.
        scores: float32 (n,).
        header: the whole header.
        logits: float32 (n, classes), what a classifier in the same graph makes of those; None without one.
        path: of the ``.plan`` file, None before it is stored.
    """

    data: bytes
    buckets: tuple[int, ...]
    images: npt.NDArray[np.uint8]
    purified: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    header: dict[str, Any]
    logits: npt.NDArray[np.float32] | None = None
    path: Path | None = field(default=None, compare=False)

    def trial(self, count: int) -> npt.NDArray[Any]:
        """``count`` trial images as this plan takes them: uint8 (N, H, W, C), or float32 or float16 (N, C, H, W)."""
        images: npt.NDArray[Any] = self.images[np.arange(count) % len(self.images)]
        kind = self.header["key"]["kind"]
        if kind == "uint8":
            return images
        pixels: npt.NDArray[Any] = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        return pixels.astype(np.float16) if kind == "half" else pixels

    def disagreement(
        self,
        purified: npt.NDArray[Any],
        scores: npt.NDArray[np.float32] | None,
        logits: npt.NDArray[Any] | None = None,
    ) -> str | None:
        """How the results for :meth:`trial` images differ from float32 by more than rounding, or None.

        ``scores`` is None for "half" images, whose graph makes none, ``logits`` without a classifier.
        """
        turn = np.arange(len(purified)) % len(self.images)
        expected = 255 * self.purified[turn]
        rounding = 0.0
        if purified.dtype == np.uint8:
            expected, rounding = expected.transpose(0, 2, 3, 1), 0.5
        levels = purified.astype(np.float32) * (1 if purified.dtype == np.uint8 else 255)
        error = np.abs(levels - expected)
        mean, largest = float(error.mean()), float(error.max())
        score = 0.0 if scores is None else 255 * float(np.abs(scores - self.scores[turn]).max())
        mean_limit, limit = TOLERANCE[self.header["key"]["precision"]]
        # Written so that a NaN fails.
        if mean <= mean_limit + rounding and largest <= limit + rounding and score <= mean_limit:
            if self.logits is None or logits is None:
                return None
            moved, allowed = float(np.abs(logits - self.logits[turn]).max()), self.header["logits_limit"]
            if moved <= allowed:
                return None
            return f"differs from float32 by {moved:.3g} in the logits; expected at most {allowed:.3g}"
        return (
            f"differs from float32 by {mean:.2f} grey levels on average, {largest:.1f} at most and {score:.2f} in the "
            f"score; expected at most {mean_limit}, {limit} and {mean_limit}, rounding aside"
        )


def make_key(
    package: Package,
    checkpoint: Checkpoint,
    kind: ImageKind,
    target: Target,
    buckets: Sequence[int],
    *,
    precision: str = "fp16",
    lean: bool = False,
    workspace: int = WORKSPACE_BYTES,
    graph: bytes | None = None,
) -> tuple[Key, bytes]:
    """The key of a plan, and the ONNX graph that it is built from: ``graph``, or else the purifier's own.

    Raises:
        ValueError: ``precision`` is "int8" or "fp8" and the checkpoint has no scales.
    """
    from defense_vae_fast import onnx_graph

    if graph is None:
        graph = onnx_graph.build(checkpoint, GRAPHS[precision], kind).SerializeToString()
    key = Key(
        package=package.module,
        package_version=str(package.load().__version__),
        library_version=__version__,
        checkpoint=checkpoint.digest,
        graph=hashlib.sha256(graph).hexdigest(),
        precision=precision,
        kind=kind,
        buckets=tuple(buckets),
        workspace=workspace,
        lean=lean,
        target=target,
    )
    return key, graph


def build(
    package: Package,
    checkpoint: Checkpoint,
    key: Key,
    graph: bytes,
    progress: Progress | None = None,
    with_classifier: Reference | None = None,
) -> Plan:
    """Build a plan; seconds with TensorRT-RTX, minutes with TensorRT, with a progress bar on a terminal.

    The network is strongly typed: fp16 or int8 wherever the graph says so, float32 for the sigmoid and the score. No
    flag lets the builder choose another precision.

    Args:
        package, checkpoint, key, graph: see :func:`make_key`.
        progress: called instead of drawing the bar.
        with_classifier: of a graph with a classifier, the float32 logits for trial images as the engine with "float"
            images takes them, and how far the engine's may be from them when purified pixels differ by the shift that
            it is called with, in [0, 1].

    Raises:
        BuildError: the graph was not understood, or no engine came out.
    """
    trt = package.load()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 has no other kind of network and may drop the flag.
    typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        told = "; ".join(" ".join(str(parser.get_error(i)).split()) for i in range(parser.num_errors))
        raise BuildError(f"{package.module} does not understand the graph: {told}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # what the graph has in float32, a classifier perhaps, is to stay float32
    if key.lean:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # The runtime is the package tensorrt_lean; a copy inside each plan would be native code that comes with data.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if package.portable:
        _set_compute_capabilities(trt, config, key.target["compute_capabilities"])
    for shape in _profiles(network, key.buckets):
        profile = builder.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, *shape)
        config.add_optimization_profile(profile)
    _log.info("%s: building for %s images, batches of %s", package.module, key.kind, list(key.buckets))
    with _timing_cache(package, key, config), _shown(progress, f"{package.module}, {key.kind} images") as report:
        monitor = _make_monitor(trt, report)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        told = "; ".join(logger.errors) or "it did not say why"
        raise BuildError(f"{package.module} built no engine for {key.kind} images: {told}")
    data = bytes(plan)
    images, purified, scores = _vectors(checkpoint)
    logits, limit = None, {}
    if with_classifier is not None:
        shift = TOLERANCE[key.precision][0] + (0.5 if key.kind == "uint8" else 0.0)
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        logits, limit["logits_limit"] = with_classifier(pixels, shift / 255)
    header = {
        "key": key.to_dict(),
        "inputs": _tensors([network.get_input(i) for i in range(network.num_inputs)]),
        "outputs": _tensors([network.get_output(i) for i in range(network.num_outputs)]),
        "profiles": [[list(map(int, dims)) for dims in shape] for shape in _profiles(network, key.buckets)],
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **limit,
    }
    return Plan(data, key.buckets, images, purified, scores, header, logits)


def write(plan: Plan, path: Path) -> Path:
    """Write a plan's three files, each whole or not at all, the header last; the path of the ``.plan`` file."""
    header_path, vectors_path = path.with_suffix(".json"), path.with_suffix(".safetensors")
    arrays: dict[str, npt.NDArray[Any]] = {"images": plan.images, "purified": plan.purified, "scores": plan.scores}
    if plan.logits is not None:
        arrays["logits"] = plan.logits
    vectors = _serialize(arrays)
    header = {
        **plan.header,
        "plan_bytes": len(plan.data),
        "plan_sha256": hashlib.sha256(plan.data).hexdigest(),
        "vectors_sha256": hashlib.sha256(vectors).hexdigest(),
    }
    header_path.unlink(missing_ok=True)  # without a header the two others are nothing
    for target, content in ((path, plan.data), (vectors_path, vectors)):
        with replacing(target) as file:
            file.write(content)
    with replacing(header_path) as file:
        file.write(json.dumps(header, indent=1).encode() + b"\n")
    return path


def read(path: Path, wanted: Key) -> Plan:
    """Read a plan that fits ``wanted``; the binary is opened only when its header says so.

    Raises:
        PlanRejected: it does not fit, or its files are missing or damaged.
    """
    header = _read_header(path.with_suffix(".json"))
    key = header["key"]
    if reason := _misfit(key, wanted):
        raise PlanRejected(f"{path.name}: {reason}")
    try:
        data, vectors = path.read_bytes(), path.with_suffix(".safetensors").read_bytes()
    except OSError as error:
        raise PlanRejected(f"{path.name}: {error}") from error
    for name, content in (("plan", data), ("vectors", vectors)):
        if hashlib.sha256(content).hexdigest() != header.get(f"{name}_sha256"):
            raise PlanRejected(f"{path.name}: the {name} of {len(content)} bytes does not match its digest")
    try:
        arrays = _parse(vectors)
        return Plan(
            data, tuple(key["buckets"]), arrays["images"], arrays["purified"], arrays["scores"], header,
            arrays.get("logits"), path,
        )  # fmt: skip
    except (SafetensorError, KeyError) as error:
        raise PlanRejected(f"{path.name}: unreadable vectors: {error}") from error


def package_of(path: Path) -> Package:
    """The package that runs a plan, by its header.

    Raises:
        PlanRejected: there is no header, or of no package that is known.
    """
    key = _read_header(path.with_suffix(".json"))["key"]
    if key["lean"]:
        return LEAN
    for package in (TENSORRT, RTX):
        if key["package"] == package.module:
            return package
    raise PlanRejected(f"{path.name}: expected a plan of tensorrt or tensorrt_rtx, got {key['package']!r}")


def read_exported(path: Path, package: Package, target: Target) -> Plan:
    """Read a plan that ``export`` wrote and the caller trusts, whatever graph it is of, if it is for this machine.

    Raises:
        PlanRejected: as :func:`read`.
    """
    key = _read_header(path.with_suffix(".json"))["key"]
    here = {"package": package.module, "package_version": str(package.load().__version__), "target": target}
    return read(path, Key(**{**key, **here, "library_version": __version__, "buckets": tuple(key["buckets"])}))


def obtain(
    package: Package, checkpoint: Checkpoint, key: Key, graph: bytes, needed: Sequence[int] | None = None
) -> Plan:
    """The plan from the trusted folder or the cache; where neither has it, it is built and cached.

    Of several processes that want the same plan one builds, and the others wait for it.

    Args:
        package: what builds or runs it.
        checkpoint: the purifier.
        key: from :func:`make_key`, with the graph.
        graph: see there.
        needed: buckets that a plan made elsewhere must have; those of the key by default.

    Raises:
        BuildError: it could not be built; with the lean runtime, there is no plan and no builder.
    """
    from filelock import FileLock

    elsewhere = replace(key, buckets=key.buckets if needed is None else tuple(needed))
    if (trusted := os.environ.get(TRUSTED_FOLDER)) and (plan := _search(Path(trusted), elsewhere)):
        return plan
    folder = cache_folder()
    if not package.builds:
        if plan := _search(folder, elsewhere):
            return plan
        raise BuildError(
            f"{package.module} has no builder, and no plan for this checkpoint, GPU and version lies in {folder} or in "
            f"the folder that the environment variable {TRUSTED_FOLDER} names; on a machine with the full TensorRT and "
            "the same model of GPU make one with: defense-vae-fast export CHECKPOINT --format tensorrt --lean"
        )
    path = folder / f"{key.stem}.plan"
    with FileLock(folder / f"{key.stem}.lock"):
        if path.with_suffix(".json").exists():
            try:
                return read(path, key)
            except PlanRejected as reason:
                _log.warning("cached plan rejected, building again: %s", reason)
        plan = build(package, checkpoint, key, graph)
        write(plan, path)
        return read(path, key)


def discard(plan: Plan) -> None:
    """Remove a plan from the cache, the header first; one from the trusted folder is left where it is."""
    if plan.path is None or plan.path.parent != cache_folder():
        return
    for suffix in (".json", ".plan", ".safetensors"):
        with suppress(OSError):
            plan.path.with_suffix(suffix).unlink(missing_ok=True)


def cache_folder() -> Path:
    """The folder of cached plans; PermissionError where others than this user may write to it."""
    return cache.folder("plans")


def compute_capabilities(package: Package) -> tuple[str, ...]:
    """Compute capabilities that a portable package builds for, such as "8.9"."""
    names = package.load().ComputeCapability.__members__
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM"))


def make_logger(trt: Any) -> Any:
    """TensorRT's log through :mod:`logging`; ``errors`` keeps what it called an error."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = _LEVELS.get(severity.name, logging.DEBUG)
            if level >= logging.ERROR:
                self.errors.append(message)
            _log.log(level, "%s", message)

    return Logger()


# What TensorRT calls information is hundreds of lines a build.
_LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG,
}


def _make_monitor(trt: Any, report: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            report(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(phase_name, (step + 1) / max(1, self.steps.get(phase_name, 1)))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            report(phase_name, 1.0)

    return Monitor()


@contextmanager
def _shown(progress: Progress | None, title: str) -> Iterator[Progress]:
    """The caller's way of showing progress, or else a bar on standard error where that is a terminal."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        # Phases lie inside phases; the one that moved last is the one to look at.
        yield lambda phase, share: bar.update(task, description=f"{title}: {phase}", completed=share)


def _profiles(network: Any, buckets: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Smallest, usual and largest shape for each bucket: one batch size, except that the last starts at one image."""
    image = tuple(network.get_input(0).shape)[1:]
    for bucket in buckets:
        smallest = 1 if bucket == buckets[-1] else bucket
        yield (smallest, *image), (bucket, *image), (bucket, *image)


def _tensors(tensors: Sequence[Any]) -> dict[str, Any]:
    return {
        tensor.name: {"dtype": tensor.dtype.name.lower(), "shape": list(map(int, tensor.shape))} for tensor in tensors
    }


def _set_compute_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = f"SM{capability.replace('.', '')}"
        # A GPU that the package does not list is tried as the current one.
        config.set_compute_capability(getattr(trt.ComputeCapability, name, trt.ComputeCapability.CURRENT), index)


@contextmanager
def _timing_cache(package: Package, key: Key, config: Any) -> Iterator[None]:
    """Kernel times from earlier builds by the same version on the same GPU, kept for later ones."""
    if not package.times:
        yield
        return
    target = hashlib.sha256(json.dumps([key.package_version, key.target], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"{key.package}-{target}.timing"
    known = path.read_bytes() if path.exists() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    with replacing(path) as file:
        file.write(bytes(config.get_timing_cache().serialize()))


def _vectors(
    checkpoint: Checkpoint,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Trial images and what the float32 reference engine makes of them."""
    from defense_vae_fast.engines.openvino import OpenVINOEngine

    channels, height, width = checkpoint.config.image_shape
    images = trial_images((height, width, channels))
    if height * width > _FEW_PIXELS:
        images = images[2:3]
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    with OpenVINOEngine.load(checkpoint, "fp32", max_batch=1) as reference:
        purified, scores = reference.run(pixels)
    return images, purified, scores


def _search(folder: Path, wanted: Key) -> Plan | None:
    """The first plan in a folder that fits; those that do not are passed over, with the reason in the log."""
    return next(filter(None, (_read_or_pass(path, wanted) for path in sorted(folder.glob("*.json")))), None)


def _read_or_pass(header: Path, wanted: Key) -> Plan | None:
    try:
        return read(header.with_suffix(".plan"), wanted)
    except PlanRejected as reason:
        _log.debug("plan passed over: %s", reason)
        return None


def _read_header(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_HEADER_BYTES:
            raise PlanRejected(f"{path.name}: larger than any header")
        header = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PlanRejected(f"{path.name}: unreadable header: {error}") from error
    key = header.get("key") if isinstance(header, dict) else None
    if not isinstance(key, dict) or set(key) != set(Key.__dataclass_fields__):
        raise PlanRejected(f"{path.name}: not the header of a plan of this library")
    buckets = key["buckets"]
    if not isinstance(buckets, list) or not buckets or not all(type(bucket) is int for bucket in buckets):
        raise PlanRejected(f"{path.name}: expected a list of batch sizes, got {buckets!r}")
    return dict(header)


def _misfit(key: dict[str, Any], wanted: Key) -> str | None:
    """Why a plan with ``key`` does not do for ``wanted``, or None."""
    want = wanted.to_dict()
    lean = wanted.package == LEAN.module
    if lean:
        want["package"] = TENSORRT.module
    for name in ("format", "package", "library_version", "precision", "graph", "kind", "workspace", "lean"):
        if key[name] != want[name]:
            return f"{name}: expected {want[name]!r}, got {key[name]!r}"
    if lean and not _runs_later(key["package_version"], wanted.package_version):
        return f"built by {key['package_version']}, which the lean runtime {wanted.package_version} does not run"
    if not lean and key["package_version"] != wanted.package_version:
        return f"package_version: expected {wanted.package_version!r}, got {key['package_version']!r}"
    if not set(wanted.buckets) <= set(key["buckets"]):
        return f"buckets: expected {list(wanted.buckets)} among them, got {key['buckets']}"
    return _wrong_target(key["target"], wanted.target, lean=lean)


def _wrong_target(target: Any, wanted: Target, *, lean: bool) -> str | None:
    if not isinstance(target, dict):
        return f"target: expected a dictionary, got {target!r}"
    if "compute_capabilities" in wanted:
        got = target.get("compute_capabilities")
        fits = isinstance(got, list) and set(wanted["compute_capabilities"]) <= set(got)
        return None if fits else f"target: expected compute capability {wanted}, got {target}"
    # A version-compatible plan is made to outlive drivers; it is for one model of GPU all the same.
    ignored = {"driver"} if lean else set()
    differs = [name for name in wanted if name not in ignored and target.get(name) != wanted[name]]
    return f"target: expected {wanted}, got {target}" if differs else None


def _runs_later(built_by: Any, runtime: str) -> bool:
    """Whether a version-compatible plan of version ``built_by`` runs on ``runtime``: the same major, not older."""
    try:
        built, runs = (tuple(map(int, str(version).split(".")[:2])) for version in (built_by, runtime))
    except ValueError:
        return False
    return built[0] == runs[0] and built <= runs
