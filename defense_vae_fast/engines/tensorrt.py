"""The TensorRT engines: plans from :mod:`plans`, run through PyCUDA by workers that each own everything they use.

A worker has a stream, pinned and device buffers, a workspace, and for each kind of images and batch bucket an execution
context with its profile chosen and two CUDA graphs: copy in, network, copy out for images in host memory; the network
alone for images on the GPU. All of it is made at load and kept. A batch is cut over the workers, so that the copies of
one piece run beside the computing of another.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from defense_vae_fast import cuda
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines import device_arrays, plans
from defense_vae_fast.engines.base import (
    DEFAULT_MAX_BATCH,
    DeviceMemoryError,
    Engine,
    EngineUnavailable,
    Images,
    Result,
    Scores,
    check_choice,
    check_count,
)
from defense_vae_fast.engines.buckets import BUCKETS, bucket_of, buckets_for, cut
from defense_vae_fast.engines.pieces import Lane, Piece, nothing, run_pieces
from defense_vae_fast.frames import FILTERS, TABLE, Filter, Frame, pack

if TYPE_CHECKING:
    from typing_extensions import Self

    from defense_vae_fast.onnx_graph import ImageKind

_STREAMS = 3  # one copies in, one computes, one copies out
_MAX_STREAMS = 16
_DTYPES: dict[ImageKind, np.dtype[Any]] = {
    "uint8": np.dtype(np.uint8),
    "float": np.dtype(np.float32),
    "half": np.dtype(np.float16),
}
_LOGITS: dict[str, np.dtype[Any]] = {"float": np.dtype(np.float32), "half": np.dtype(np.float16)}
_KIND = {dtype: kind for kind, dtype in _DTYPES.items()}
_HOST_KINDS: tuple[ImageKind, ...] = ("uint8", "float")  # what engines take; "half" is for frames, prepared when asked
# A frame to read and the frame to write, as they lie in the table that a worker copies to the GPU.
_FRAME_PAIR = np.dtype([("frame", TABLE), ("result", TABLE)])
_SCATTER_BLOCKS = 64  # threads stride over a frame's pixels, so that one captured launch serves frames of any size


class AcceptanceError(EngineUnavailable):
    """An engine's numbers differ from the stored float32 ones by more than rounding; it is not used."""


class PoisonedError(RuntimeError):
    """The GPU's context is lost to this process; nothing on it can be used again."""


class TensorRTEngine(Engine):
    """TensorRT 10.3 or later, fp16 from the image to the last layer's logits, float32 for sigmoid and score.

    "auto" is fp16. "int8" and, from compute capability 8.9 on, "fp8" are for checkpoints with scales: layers in eight
    bits, the first one and all else as with fp16.

    Batches of 1, 8, 32, 64, 128, 256 (and ``max_batch``, if larger) have a profile each; others are padded to the next.
    The first load on a machine builds the engines, which takes minutes; later ones read them from the cache.
    """

    name = "tensorrt"
    devices = ("cuda",)
    precisions = ("fp16", "int8", "fp8")
    dynamic_batch = False
    differentiable = False
    extra = "tensorrt"
    package: ClassVar[plans.Package] = plans.TENSORRT

    tensor_device: str
    """Name of the device whose torch tensors :meth:`run_tensor` takes: "cuda:0"."""
    cupy_device: int
    """Number of the device whose CuPy arrays :meth:`run_tensor` takes."""

    def __init__(
        self, checkpoint: Checkpoint, precision: str, device: cuda.Device, max_batch: int, streams: int
    ) -> None:
        super().__init__(checkpoint, precision, "cuda", max_batch)
        self.streams = streams
        self.tensor_device = f"cuda:{device.ordinal}"
        self.cupy_device = device.ordinal
        self._checkpoint = checkpoint
        self._gpu = device
        self._sizes = buckets_for(max_batch)
        self._planned = BUCKETS if max_batch <= BUCKETS[-1] else (*BUCKETS, max_batch)
        self._buckets = self._planned[: self._planned.index(bucket_of(max_batch, self._planned)) + 1]
        self._health = _Health(device)
        self._trt = self.package.load()
        self._runtime = self._trt.Runtime(plans.make_logger(self._trt))
        self._loaded: dict[ImageKind, _Loaded] = {}
        self._workers: list[_Worker] = []
        self._frame_filter: Filter | None = None
        self._preparing = threading.Lock()
        # It holds no reference to the engine, so that a forgotten engine is collected, and its memory with it.
        self._free = weakref.finalize(self, _free, device, self._workers, self._loaded)
        try:
            self._prepare()
        except BaseException:
            self._release()
            raise
        self._lane = Lane(self._workers)
        device.add_user(self)

    @classmethod
    def available(cls, device: str = "auto") -> str | None:
        """None when the package, PyCUDA and a GPU that the package serves are here, otherwise what is missing."""
        if device not in ("auto", *cls.devices):
            return f"it runs on {', '.join(cls.devices)}, not on {device}"
        if reason := cls.package.missing():
            return reason
        if importlib.util.find_spec("filelock") is None:
            return (
                f"the package filelock is not installed; install it with: pip install 'defense-vae-fast[{cls.extra}]'"
            )
        if reason := cuda.missing():
            return reason
        if cls.package.portable:
            has, listed = cuda.compute_capability(cuda.current_ordinal()), plans.compute_capabilities(cls.package)
            if has not in listed:
                return f"{cls.package.module} serves compute capability {', '.join(listed)}, and this GPU has {has}"
        return None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        precision: str = "auto",
        device: str = "auto",
        max_batch: int = DEFAULT_MAX_BATCH,
        streams: int | None = None,
    ) -> Self:
        """See :meth:`Engine.load`. ``streams`` workers, each on a stream of its own, 1 to 16 (3 by default).

        "cuda" is the device whose context is current in this thread, or the first.

        Raises:
            AcceptanceError: the engine's numbers are not those of float32.
            BuildError: no engine could be built.
            DeviceMemoryError: it does not fit into the GPU's memory.
        """
        check_choice("device", device, cls.devices, cls.name)
        check_choice("precision", precision, cls.precisions, cls.name)
        check_count("max_batch", max_batch)
        streams = check_count("streams", _STREAMS if streams is None else streams, limit=_MAX_STREAMS)
        if reason := cls.available(device):
            raise EngineUnavailable(f"the {cls.name} engine cannot work here: {reason}")
        precision = "fp16" if precision == "auto" else precision
        has = cuda.compute_capability(cuda.current_ordinal())
        if precision == "fp8" and tuple(map(int, has.split("."))) < (8, 9):
            raise EngineUnavailable(f"precision 'fp8': expected compute capability 8.9 or more, got {has}; use 'int8'")
        try:
            return cls(checkpoint, precision, cuda.Device.get(cuda.current_ordinal()), max_batch, streams)
        except PermissionError as error:
            raise EngineUnavailable(f"the {cls.name} engine has no cache: {error}") from error

    def run(self, batch: Images, out: Images | None = None) -> Result:
        """See :meth:`Engine.run`."""
        self._enter()
        try:
            self._kind(batch)
            purified = self._output(batch, out)
            scores = np.empty(len(batch), np.float32)
            run_pieces(self._pieces(len(batch)), batch, purified, scores)
            return purified, scores
        finally:
            self._leave()

    def run_tensor(self, images: Any) -> tuple[Any, Any]:
        """:meth:`run` for an array that is on the GPU already; nothing passes through the host.

        The work takes its place in the order of the caller's current stream, and this returns without waiting for it.

        Args:
            images: a torch tensor or CuPy array, C-contiguous: uint8 (N, H, W, C), or float32 (N, C, H, W) in [0, 1].

        Returns:
            Fresh arrays of the same library: purified images like ``images``, float32 (N,) scores.

        Raises:
            ValueError: a wrong device, dtype, shape or layout.
            RuntimeError: the engine is closed.
        """
        given = device_arrays.view(images)
        kind = _KIND.get(given.dtype)
        shape = None if kind is None else self._shapes["uint8" if kind == "uint8" else "float"]
        if shape is None or given.shape[1:] != shape or not given.shape[0] or given.device != self.cupy_device:
            raise ValueError(
                f"images: expected uint8 (N, {', '.join(map(str, self._shapes['uint8']))}) or float32 "
                f"(N, {', '.join(map(str, self._shapes['float']))}) on {self.tensor_device} with N at least 1, "
                f"got {given.dtype} {given.shape} on cuda:{given.device}; convert or move it"
            )
        with self._calling():
            count = given.shape[0]
            purified = device_arrays.empty(images, given.shape, given.dtype)
            scores = device_arrays.empty(images, (count,), np.dtype(np.float32))
            to, to_scores = device_arrays.view(purified).address, device_arrays.view(scores).address
            size = given.dtype.itemsize * int(np.prod(shape))
            for lane, start, stop in self._pieces(count):
                worker = lane.free.get()
                try:
                    worker.run_device(
                        given.dtype, stop - start, given.address + start * size, to + start * size,
                        to_scores + start * 4, given.stream,
                    )  # fmt: skip
                finally:
                    lane.free.put(worker)
            return purified, scores

    def prepare_frames(self, filter: Filter = "area") -> None:
        """Make :meth:`run_frames` ready: compile its kernels, build its engine and capture its graphs.

        Args:
            filter: how frames of another size than the network's are resized; see :mod:`defense_vae_fast.frames`.

        Raises:
            ValueError: an unknown filter, another one than before, or a network of two or four channels.
            BuildError, AcceptanceError, DeviceMemoryError: as :meth:`load`.
        """
        channels = self._checkpoint.config.channels
        if filter not in FILTERS or channels not in (1, 3):
            raise ValueError(
                f"filter: expected one of {', '.join(FILTERS)} and a network of 1 or 3 channels, "
                f"got {filter!r} and {channels}"
            )
        with self._calling(), self._preparing:
            if self._frame_filter == filter:
                return
            if self._frame_filter is not None:
                raise ValueError(f"filter: expected {self._frame_filter!r}, as prepared before, got {filter!r}")
            workers = [self._lane.free.get() for _ in self._workers]  # all idle, and ours
            try:
                self._load_kind("half")
                for worker in workers:
                    worker.add(self._loaded["half"], self._shapes["float"])
                    worker.add_frames(self._shapes["float"], filter)
                self._accept(self._loaded["half"])
                self._frame_filter = filter
            except cuda.CudaMemoryError as error:
                raise DeviceMemoryError(
                    f"frames do not fit into the memory of {self._gpu.name} beside the rest: {error}; free some, or "
                    "load the engine with a smaller max_batch or fewer streams"
                ) from error
            finally:
                for worker in workers:
                    self._lane.free.put(worker)

    def run_frames(self, frames: Sequence[Frame], results: Sequence[Frame] | None = None, stream: int = 0) -> Scores:
        """Purify camera frames where they lie in GPU memory: convert, resize, purify, resize back, and wait.

        Args:
            frames: any sizes, pitches and colour orders, mixed as they come.
            results: where the purified frames go, of any size and order, one for each frame; None overwrites the
                frames. A result may not overlap another frame of the call.
            stream: handle of the stream that writes the frames; they are read in its order.

        Returns:
            float32 (N,) scores, mean |x - x_hat| at the network's size in [0, 1] units.

        Raises:
            ValueError: no frames, or another number of results.
            RuntimeError: the engine is closed.
        """
        results = frames if results is None else results
        if not frames or len(frames) != len(results):
            raise ValueError(
                f"frames: expected one or more and as many results, got {len(frames)} and {len(results)}; "
                "skip empty calls"
            )
        if self._frame_filter is None:
            self.prepare_frames()
        table = np.zeros(len(frames), _FRAME_PAIR)
        table["frame"], table["result"] = pack(frames), pack(results)
        scores = np.empty(len(frames), np.float32)
        with self._calling():
            with self._gpu:
                for worker in self._workers:
                    cuda.order(stream, worker.stream.handle)
            run_pieces(self._pieces(len(frames)), table, table, scores)
        return scores

    def warmup(self) -> None:
        """See :meth:`Engine.warmup`; every graph was run at load, so this only touches the paths of the host."""
        self._run_zeros(1, self.max_batch)

    def info(self) -> dict[str, Any]:
        """See :meth:`Engine.info`; adds streams, batch buckets, GPU, driver and versions."""
        return {
            **super().info(),
            "streams": self.streams,
            "buckets": list(self._buckets),
            "device_name": self._gpu.name,
            "compute_capability": self._gpu.compute_capability,
            "cuda_driver": self._gpu.driver_version,
            "plans": {kind: loaded.plan.path.name for kind, loaded in self._loaded.items() if loaded.plan.path},
            "versions": {self.package.module: str(self._trt.__version__)},
        }

    def _pieces(self, count: int) -> Iterator[Piece]:
        for start, stop in cut(count, self._sizes, self.streams):
            yield self._lane, start, stop

    def _prepare(self) -> None:
        """Plans, memory, workers, graphs, and the comparison with float32."""
        for kind in _HOST_KINDS:
            self._load_kind(kind)
        wanted = self.streams * self._bytes_per_worker()
        free, total = self._gpu.free_memory()
        memory = DeviceMemoryError(
            f"the {self.name} engine wants {wanted} bytes of the memory of {self._gpu.name} for {self.streams} streams "
            f"and batches of up to {self._buckets[-1]}, and {free} of {total} are free; "
            "free some, or use a smaller max_batch or fewer streams"
        )
        if wanted > free:
            raise memory
        try:
            for _ in range(self.streams):
                self._workers.append(_Worker(self._gpu, self._buckets, self._health))
                for kind in _HOST_KINDS:
                    self._workers[-1].add(self._loaded[kind], self._shapes["uint8" if kind == "uint8" else "float"])
        except cuda.CudaMemoryError as error:
            raise memory from error
        for kind in _HOST_KINDS:
            self._accept(self._loaded[kind])

    def _bytes_per_worker(self) -> int:
        channels, height, width = self._shapes["float"]
        values = channels * height * width * self._buckets[-1]
        buffers = sum(2 * values * _DTYPES[kind].itemsize + 4 * self._buckets[-1] for kind in self._loaded)
        return buffers + sum(loaded.workspace(self._buckets) for loaded in self._loaded.values())

    def _load_kind(self, kind: ImageKind) -> None:
        lean = self.package is plans.LEAN
        gpu = self._gpu
        target = {"compute_capabilities": [gpu.compute_capability]} if self.package.portable else target_of(gpu)
        key, graph = plans.make_key(
            self.package, self._checkpoint, kind, target, self._planned, precision=self.precision, lean=lean
        )
        for _ in range(2):  # a plan from elsewhere that does not load is replaced by one built here
            with gpu:
                plan = plans.obtain(self.package, self._checkpoint, key, graph, self._buckets)
                engine = self._runtime.deserialize_cuda_engine(plan.data)
            if engine is not None:
                self._loaded[kind] = _Loaded(self._trt, engine, plan, kind, specialises=self.package.portable)
                return
            plans.discard(plan)
        raise plans.BuildError(f"{self.package.module} does not load the plan {plan.path}, freshly built; see its log")

    def _accept(self, loaded: _Loaded) -> None:
        """Every graph of every worker on the plan's trial images; a failing plan leaves the cache."""
        for worker in self._workers:
            worker.accept(loaded)

    def _release(self) -> None:
        self._free()


def target_of(device: cuda.Device) -> plans.Target:
    """What a plan that is no portable one is built for."""
    return {"gpu": device.name, "compute_capability": device.compute_capability, "driver": device.driver_version}


def accept(package: plans.Package, plan: plans.Plan) -> None:
    """Run a plan on this machine's GPU, each of its batch sizes, and compare with float32.

    Raises:
        AcceptanceError: the numbers differ by more than rounding.
        BuildError: the plan does not load.
    """
    trt, device = package.load(), cuda.Device.get(cuda.current_ordinal())
    kind: ImageKind = plan.header["key"]["kind"]
    with device:
        runtime = trt.Runtime(plans.make_logger(trt))
        engine = runtime.deserialize_cuda_engine(plan.data)
    if engine is None:
        raise plans.BuildError(f"{package.module} does not load the plan that it built; see its log")
    loaded = _Loaded(trt, engine, plan, kind, specialises=package.portable)
    worker = _Worker(device, plan.buckets, _Health(device))
    try:
        worker.add(loaded, plan.trial(1).shape[1:])
        worker.accept(loaded)
    finally:
        with device:
            worker.free()


def _free(device: cuda.Device, workers: list[_Worker], loaded: dict[ImageKind, _Loaded]) -> None:
    """Give back what the workers hold, then the engines that their contexts come from."""
    with device:
        for worker in workers:
            worker.free()
        workers.clear()
        loaded.clear()


class TensorRTRTXEngine(TensorRTEngine):
    """TensorRT for RTX: the same, with engines that any machine can build, finished on the GPU that loads them."""

    name = "tensorrt-rtx"
    extra = "rtx"
    package = plans.RTX


class TensorRTLeanEngine(TensorRTEngine):
    """The lean runtime, 44 MB, without a builder: runs what ``export --format tensorrt --lean`` made elsewhere."""

    name = "tensorrt-lean"
    extra = "tensorrt-lean"
    package = plans.LEAN


class _Health:
    """Whether the GPU's context still answers; shared by the workers of an engine."""

    def __init__(self, device: cuda.Device) -> None:
        self._device = device
        self._poison: str | None = None

    def check(self) -> None:
        """Raise PoisonedError after a sticky error."""
        if self._poison is not None:
            raise PoisonedError(self._poison)

    def diagnose(self, error: BaseException) -> None:
        """Find out whether an error stays; PoisonedError if it does."""
        try:
            sticky = self._device.sticky_error()
        except Exception as second:  # a context that cannot even be made current is lost as well
            sticky = str(second)
        if sticky is not None:
            self._poison = (
                f"the CUDA context on {self._device.name} is lost to this process after {sticky} ({error}): every "
                "later call fails, in other libraries too; start a new process"
            )
            raise PoisonedError(self._poison) from error


class _Loaded:
    """A deserialised engine."""

    def __init__(self, trt: Any, engine: Any, plan: plans.Plan, kind: ImageKind, *, specialises: bool) -> None:
        self.engine = engine
        self.plan = plan
        self.kind = kind
        self.scored = kind != "half"
        self.classes = () if plan.logits is None else plan.logits.shape[1:]
        self.logits = None if plan.logits is None else _LOGITS[plan.header["outputs"]["logits"]["dtype"]]
        self._trt = trt
        self._config = self._runtime_config() if specialises else None

    def workspace(self, buckets: Sequence[int]) -> int:
        """Bytes of scratch memory that the largest of these profiles wants."""
        profiles = [self.plan.buckets.index(bucket) for bucket in buckets]
        return max(int(self.engine.get_device_memory_size_for_profile_v2(profile)) for profile in profiles)

    def context(self) -> Any:
        """A fresh execution context that uses memory of ours."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self.engine.create_execution_context(strategy if self._config is None else self._config)
        if made is None:
            raise cuda.CudaMemoryError("TensorRT made no execution context")
        return made

    def _runtime_config(self) -> Any:
        """TensorRT-RTX: kernels for our batch sizes at once; compiled later, they would not be in the graphs."""
        trt, config = self._trt, self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture more than the network
        return config


class _Buffers(NamedTuple):
    """A worker's memory for one kind of images, for its largest bucket."""

    given: int
    purified: int
    scores: int
    host_given: Images
    host_purified: Images
    host_scores: Scores
    logits: int = 0
    host_logits: Images | None = None


class _Step(NamedTuple):
    """What a worker does for one kind and bucket."""

    context: Any  # kept alive: the graphs call into what it owns
    whole: cuda.Graph
    network: cuda.Graph


class _Worker:
    """A stream with everything that it needs; works on one piece at a time. A slot of a lane."""

    def __init__(self, device: cuda.Device, buckets: Sequence[int], health: _Health) -> None:
        self._device = device
        self._buckets = buckets
        self._health = health
        self._kinds: dict[ImageKind, _Buffers] = {}
        self._steps: dict[tuple[ImageKind, int], _Step] = {}
        self._frame_graphs: dict[int, cuda.Graph] = {}
        self._tables: list[Images] = []
        self._flying: tuple[_Buffers, int] | None = None
        with device:
            self.stream = cuda.Stream(device)
            self._memory = cuda.Memory(device, self.stream)

    def add(self, loaded: _Loaded, shape: tuple[int, ...]) -> None:
        """Prepare for images of the engine's kind and ``shape``, in host memory and in device memory."""
        with self._device:
            self._add(loaded, shape)

    def add_frames(self, shape: tuple[int, int, int], filter: Filter) -> None:
        """Prepare for frames, once the engine for "half" images is there; ``shape`` is (C, H, W)."""
        channels, size, _ = shape
        gather = self._device.kernel("gather_frames", "PPiii")
        error = self._device.kernel("reconstruction_error", "PPPi")
        scatter = self._device.kernel("scatter_frames", "PPiii")
        block, stream, chosen = (cuda.BLOCK, 1, 1), self.stream.pycuda, FILTERS.index(filter)
        driver, buffers = self._device.driver, self._kinds["half"]
        with self._device:
            largest = self._buckets[-1]
            frames, results = (self._memory.allocate(largest * TABLE.itemsize) for _ in range(2))
            self._tables = [self._memory.pinned((largest,), TABLE) for _ in range(2)]

            def whole(bucket: int) -> None:
                for address, table in zip((frames, results), self._tables, strict=True):
                    driver.memcpy_htod_async(address, table[:bucket], stream)
                blocks = -(-size * size // cuda.BLOCK)
                gather.prepared_async_call(
                    (blocks, bucket, 1), block, stream, frames, buffers.given, channels, size, chosen
                )
                self._execute(self._steps["half", bucket].context)
                error.prepared_async_call(
                    (bucket, 1, 1), block, stream, buffers.given, buffers.purified, buffers.scores, channels * size**2
                )
                scatter.prepared_async_call(
                    (_SCATTER_BLOCKS, bucket, 1), block, stream, results, buffers.purified, channels, size, chosen
                )
                driver.memcpy_dtoh_async(buffers.host_scores[:bucket], buffers.scores, stream)

            for bucket in self._buckets:
                whole(bucket)  # with empty tables: kernels are loaded at a first use, which cannot be captured
                self.stream.synchronize()
                self._frame_graphs[bucket] = self.stream.capture(functools.partial(whole, bucket))

    def accept(self, loaded: _Loaded) -> None:
        """Run every bucket on the plan's trial images; AcceptanceError, and the plan goes, if they differ."""
        plan = loaded.plan
        for bucket in self._buckets:
            given = plan.trial(bucket)
            purified, scores = np.empty_like(given), np.empty(bucket, np.float32)
            self.start(given)
            self.finish(purified, scores)
            host_logits = self._kinds[loaded.kind].host_logits
            logits = None if host_logits is None else host_logits[:bucket]
            if reason := plan.disagreement(purified, scores if loaded.scored else None, logits):
                plans.discard(plan)
                raise AcceptanceError(
                    f"the engine for {loaded.kind} images at batch {bucket} {reason}; its plan is not used"
                )

    def start(self, batch: Images) -> None:
        """Copy images, or a table of frames, to pinned memory and launch the graph."""
        self._health.check()
        count = len(batch)
        bucket = bucket_of(count, self._buckets)
        if batch.dtype == _FRAME_PAIR:
            for table, name in zip(self._tables, ("frame", "result"), strict=True):
                table[:count] = batch[name]
                table[count:bucket] = 0  # the kernels pass over empty rows
            graph = self._frame_graphs[bucket]
            self._flying = (self._kinds["half"], count)
        else:
            kind = _KIND[batch.dtype]
            self._kinds[kind].host_given[:count] = batch
            graph = self._steps[kind, bucket].whole
            self._flying = (self._kinds[kind], count)
        self._guarded(graph.launch)

    def finish(self, purified: Images, scores: Scores) -> None:
        """Wait for the stream and copy the results out; those of frames are where they belong already."""
        assert self._flying is not None
        buffers, count = self._flying
        self._guarded(self.stream.synchronize)
        if purified.dtype != _FRAME_PAIR:
            purified[...] = buffers.host_purified[:count]
        scores[...] = buffers.host_scores[:count]

    def abandon(self) -> None:
        """Wait for the stream."""
        self._guarded(self.stream.synchronize)

    def run_device(
        self, dtype: np.dtype[Any], count: int, images: int, purified: int, scores: int, caller: int
    ) -> None:
        """Queue copy, network and copy on device memory, in the order of the stream ``caller``; does not wait."""
        self._health.check()
        kind = _KIND[dtype]
        network, buffers = self._steps[kind, bucket_of(count, self._buckets)].network, self._kinds[kind]
        size = count * int(np.prod(buffers.host_given.shape[1:])) * dtype.itemsize
        copy = self._device.driver.memcpy_dtod_async

        def queue() -> None:
            cuda.order(caller, self.stream.handle)
            copy(buffers.given, images, size, self.stream.pycuda)
            network.launch()
            copy(purified, buffers.purified, size, self.stream.pycuda)
            copy(scores, buffers.scores, 4 * count, self.stream.pycuda)
            cuda.order(self.stream.handle, caller)

        self._guarded(queue)

    def free(self) -> None:
        """Give everything back; the device's context is current."""
        try:
            self.stream.synchronize()
            graphs = [graph for step in self._steps.values() for graph in (step.whole, step.network)]
            for graph in (*graphs, *self._frame_graphs.values()):
                graph.free()
            self._frame_graphs.clear()
            self._steps.clear()
            self._memory.free()
            self.stream.free()
        except (cuda.CudaError, self._device.driver.Error) as error:
            # After a sticky error nothing can be given back, and the process has been told.
            if self._device.sticky_error() is None:
                raise RuntimeError(f"freeing the buffers on {self._device.name} failed: {error}") from error

    def _guarded(self, queue: Callable[[], None]) -> None:
        try:
            with self._device:
                queue()
        except (cuda.CudaError, self._device.driver.Error) as error:
            self._health.diagnose(error)
            raise RuntimeError(f"{error} on {self._device.name}; the call may be repeated") from error

    def _add(self, loaded: _Loaded, shape: tuple[int, ...]) -> None:
        largest, dtype, memory = self._buckets[-1], _DTYPES[loaded.kind], self._memory
        full = (largest, *shape)
        size = int(np.prod(full)) * dtype.itemsize
        buffers = _Buffers(
            given=memory.allocate(size),
            purified=memory.allocate(size),
            scores=memory.allocate(4 * largest),
            host_given=memory.pinned(full, dtype),
            host_purified=memory.pinned(full, dtype),
            host_scores=memory.pinned((largest,), np.float32),
        )
        if loaded.logits is not None:
            rows = (largest, *loaded.classes)
            size = int(np.prod(rows)) * loaded.logits.itemsize
            buffers = buffers._replace(logits=memory.allocate(size), host_logits=memory.pinned(rows, loaded.logits))
        self._kinds[loaded.kind] = buffers
        # One workspace serves all buckets: a worker does one thing at a time.
        scratch = loaded.workspace(self._buckets)
        workspace = memory.allocate(scratch)
        for bucket in self._buckets:
            context = self._context(loaded, bucket, shape, buffers, workspace, scratch)
            whole = functools.partial(self._whole, context, buffers, bucket)
            whole()  # what is made at a first use cannot be captured
            self.stream.synchronize()
            self._steps[loaded.kind, bucket] = _Step(
                context,
                whole=self.stream.capture(whole),
                network=self.stream.capture(functools.partial(self._execute, context)),
            )

    def _whole(self, context: Any, buffers: _Buffers, bucket: int, between: Callable[[], None] = nothing) -> None:
        """Queue copy in, network, copy out."""
        driver, stream = self._device.driver, self.stream.pycuda
        between()
        driver.memcpy_htod_async(buffers.given, buffers.host_given[:bucket], stream)
        between()
        self._execute(context)
        between()
        driver.memcpy_dtoh_async(buffers.host_purified[:bucket], buffers.purified, stream)
        driver.memcpy_dtoh_async(buffers.host_scores[:bucket], buffers.scores, stream)
        if buffers.host_logits is not None:
            driver.memcpy_dtoh_async(buffers.host_logits[:bucket], buffers.logits, stream)
        between()

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.stream.handle):
            raise cuda.CudaError("execute_async_v3 refused; TensorRT's log says why")

    def _context(
        self,
        loaded: _Loaded,
        bucket: int,
        shape: tuple[int, ...],
        buffers: _Buffers,
        workspace: int,
        scratch: int,
    ) -> Any:
        """An execution context with everything set that can be: nothing changes afterwards."""
        context = loaded.context()
        profile = loaded.plan.buckets.index(bucket)
        done = [context.set_optimization_profile_async(profile, self.stream.handle)]
        self.stream.synchronize()
        context.set_device_memory(workspace, scratch)
        done.append(context.set_input_shape("images", (bucket, *shape)))
        addresses = {"images": buffers.given, "purified": buffers.purified}
        if loaded.scored:
            addresses["score"] = buffers.scores
        if loaded.logits is not None:
            addresses["logits"] = buffers.logits
        done += [context.set_tensor_address(name, address) for name, address in addresses.items()]
        if not all(done):
            raise cuda.CudaError(f"TensorRT refused profile, shape or addresses for batch {bucket}: {done}")
        return context
