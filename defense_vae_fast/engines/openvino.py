"""The embedded CPU engine: OpenVINO on the folded graph. It needs neither a GPU nor torch.

Cost per image hardly depends on how many images a request carries (0.68 ms of one core alone, 0.64 in 8 or 64, bf16),
so every model is compiled for one fixed size: shapes stay static (5 to 10 % faster than a dynamic batch), no image is
padding, and an image goes through the same kernels in whatever company it travels. Three :class:`_Lane` do the work:

- one image asked for by ``run``: one request on all cores, for latency;
- larger batches: pieces of ``_PIECE`` images, and single ones for the rest, over one stream a core, for throughput.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines.base import (
    DEFAULT_MAX_BATCH,
    Engine,
    EngineUnavailable,
    ImageKind,
    Images,
    Result,
    Scores,
    check_choice,
    check_count,
)

if TYPE_CHECKING:
    import openvino
    from typing_extensions import Self

    from defense_vae_fast.onnx_graph import Precision

_PIECE = 8
# Grey levels, on average and at most, that a precision may differ from fp32 by; beyond these it is broken, not rounded.
# A trained network moves by about a third of a level in bf16 and by 0.8 in int8 on the fixed images.
_TOLERANCE = {"bf16": (2.0, 32), "int8": (5.0, 64)}


class OpenVINOEngine(Engine):
    """OpenVINO's CPU plugin, fp32, bf16 or int8.

    "auto" is bf16 where the CPU multiplies it natively and the purified test images agree with fp32, else fp32. int8 is
    for checkpoints with scales and has to be asked for: it keeps accuracy, not every pixel.
    """

    name = "openvino"
    devices = ("cpu",)
    precisions = ("fp32", "bf16", "int8")
    dynamic_batch = True
    differentiable = False
    extra = None

    def __init__(
        self, core: openvino.Core, checkpoint: Checkpoint, precision: str, max_batch: int, streams: int, note: str
    ) -> None:
        super().__init__(checkpoint, precision, "cpu", max_batch)
        self.streams = streams
        self._piece = min(_piece(checkpoint.config), max_batch)
        self._core = core
        self._checkpoint = checkpoint
        self._note = note
        self._models: dict[tuple[ImageKind, str], openvino.Model] = {}
        self._lanes: dict[tuple[ImageKind, int], _Lane] = {}
        self._single: dict[ImageKind, _Lane] = {}
        self._building = threading.Lock()
        self._completer = _Completer()
        # The thread holds no reference to the engine, so that a forgotten engine is collected and its thread with it.
        self._stop_completer = weakref.finalize(self, self._completer.stop)

    @classmethod
    def available(cls, device: str = "auto") -> str | None:
        """None when OpenVINO and its CPU plugin load, otherwise what is missing."""
        if device not in ("auto", *cls.devices):
            return f"it runs on {', '.join(cls.devices)}, not on {device}"
        try:
            _core().get_property("CPU", "FULL_DEVICE_NAME")
        except ImportError as error:
            return f"the package openvino does not import ({error}); install it with: pip install defense-vae-fast"
        except EngineUnavailable as error:
            return str(error)
        except RuntimeError as error:
            return f"OpenVINO has no working CPU plugin ({error}); reinstall it: pip install --force-reinstall openvino"
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
        """See :meth:`Engine.load`. ``streams`` is one a core unless given."""
        check_choice("device", device, cls.devices, cls.name)
        check_choice("precision", precision, cls.precisions, cls.name)
        check_count("max_batch", max_batch)
        cores = _cores()
        streams = cores if streams is None else check_count("streams", streams, cores)
        if reason := cls.available(device):
            raise EngineUnavailable(f"the {cls.name} engine cannot work here: {reason}")
        core = _core()
        # OpenVINO's own default is bf16 exactly where the CPU multiplies it natively (AVX512-BF16 or AMX); elsewhere
        # it would emulate bf16, slower than fp32.
        native = str(core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()) == "bf16"
        if precision == "bf16" and not native:
            raise EngineUnavailable(
                "precision 'bf16': this CPU has no bf16 arithmetic (AVX512-BF16 or AMX); use precision='fp32' or 'auto'"
            )
        if precision == "int8":
            engine = cls(core, checkpoint, precision, max_batch, streams, "as asked, and it agrees with fp32")
            if reason := engine._disagreement():
                engine.close()
                raise EngineUnavailable(f"precision 'int8': {reason} on this CPU; use precision='auto'")
            return engine
        if precision != "auto":
            return cls(core, checkpoint, precision, max_batch, streams, "as asked")
        if not native:
            return cls(core, checkpoint, "fp32", max_batch, streams, "the CPU has no bf16 arithmetic")
        engine = cls(core, checkpoint, "bf16", max_batch, streams, "the CPU has bf16 and it agrees with fp32")
        if reason := engine._disagreement():
            engine.close()
            return cls(core, checkpoint, "fp32", max_batch, streams, reason)
        return engine

    def run(self, batch: Images, out: Images | None = None) -> Result:
        """See :meth:`Engine.run`."""
        self._enter()
        try:
            kind = self._kind(batch)
            purified = self._output(batch, out)
            if len(batch) > 1:
                scores = np.empty(len(batch), np.float32)
                self._run_pieces(kind, batch, purified, scores)
                return purified, scores
            lane = self._single.get(kind) or self._single_lane(kind)
            slot = lane.free.get()
            try:
                slot.images[...] = batch
                slot.request.infer(share_outputs=True)
                purified[...] = slot.purified
                return purified, slot.scores.copy()
            finally:
                lane.free.put(slot)
        finally:
            self._leave()

    def submit(self, batch: Images) -> Future[Result]:
        """See :meth:`Engine.submit`; it waits while every request is in flight, so memory stays bounded."""
        with self._calling():
            kind = self._kind(batch)
            pieces = list(self._pieces(kind, len(batch)))
            job = _Job(np.empty_like(batch), np.empty(len(batch), np.float32), len(pieces))
            for lane, start, stop in pieces:
                slot = self._acquire(lane)
                try:
                    slot.start(batch[start:stop])
                except BaseException as error:
                    lane.free.put(slot)
                    # The pieces already under way must land before the future may be resolved.
                    job.error = job.error or error
                    self._completer.put(job, None, slice(0))
                    continue
                self._completer.put(job, (lane, slot), slice(start, stop))
            return job.future

    def close(self) -> None:
        """See :meth:`Engine.close`.

        Raises:
            RuntimeError: called from a future's callback, which would wait for itself.
        """
        if self._completer.is_current():
            raise RuntimeError("close() was called from a future's callback, which it would wait for; call it outside")
        super().close()

    def warmup(self) -> None:
        """See :meth:`Engine.warmup`; a single image, pieces for every stream and a remainder use every lane."""
        self._run_zeros(1, self._piece * self.streams + 1)

    def info(self) -> dict[str, Any]:
        """See :meth:`Engine.info`; adds streams, requests, why this precision, CPU and OpenVINO version."""
        import openvino

        return {
            **super().info(),
            "precision_reason": self._note,
            "streams": self.streams,
            "images_per_request": self._piece,
            "device_name": str(self._core.get_property("CPU", "FULL_DEVICE_NAME")).strip(),
            "versions": {"openvino": str(openvino.get_version())},
        }

    def _release(self) -> None:
        self._stop_completer()
        self._completer.join()
        self._lanes.clear()
        self._single.clear()
        self._models.clear()

    def _run_pieces(self, kind: ImageKind, batch: Images, purified: Images, scores: Scores) -> None:
        flying: deque[tuple[_Lane, _Slot, slice]] = deque()

        def land() -> None:
            lane, slot, where = flying.popleft()
            try:
                slot.finish(purified[where], scores[where])
            finally:
                lane.free.put(slot)

        try:
            for lane, start, stop in self._pieces(kind, len(batch)):
                slot = lane.try_acquire()
                # Land our own before waiting for another thread's, or two threads could wait for each other.
                while slot is None and flying:
                    land()
                    slot = lane.try_acquire()
                slot = slot or self._acquire(lane)
                flying.append((lane, slot, slice(start, stop)))
                slot.start(batch[start:stop])
            while flying:
                land()
        finally:
            for lane, slot, _ in flying:  # only after an error: nothing may write into a request that went back running
                slot.request.wait()
                lane.free.put(slot)

    def _pieces(self, kind: ImageKind, count: int) -> Iterator[tuple[_Lane, int, int]]:
        """Cut a batch: large pieces while there are enough for every stream, single images after them."""
        piece = self._piece
        large = count // piece * piece if count >= piece * self.streams else 0
        if large:
            lane = self._lane(kind, piece)
            for start in range(0, large, piece):
                yield lane, start, start + piece
        if large < count:
            lane = self._lane(kind, 1)
            for start in range(large, count):
                yield lane, start, start + 1

    def _acquire(self, lane: _Lane) -> _Slot:
        """A free request; a future's callback, on the completer's thread, gets a new one: it would wait for itself."""
        slot = lane.try_acquire()
        if slot is not None:
            return slot
        return lane.make_slot() if self._completer.is_current() else lane.free.get()

    def _single_lane(self, kind: ImageKind) -> _Lane:
        with self._building:
            if kind not in self._single:
                self._single[kind] = self._make_lane(kind, 1, self.precision, 1, requests=2)
            return self._single[kind]

    def _lane(self, kind: ImageKind, size: int) -> _Lane:
        lane = self._lanes.get((kind, size))
        if lane is None:
            with self._building:
                if (kind, size) not in self._lanes:
                    # Two requests a stream: one computes while the other is filled and emptied.
                    lane = self._make_lane(kind, size, self.precision, self.streams, requests=2 * self.streams)
                    self._lanes[kind, size] = lane
                lane = self._lanes[kind, size]
        return lane

    def _make_lane(self, kind: ImageKind, size: int, precision: str, streams: int, requests: int) -> _Lane:
        graph: Precision = "int8" if precision == "int8" else "fp32"
        if (kind, graph) not in self._models:
            from defense_vae_fast import onnx_graph

            raw = onnx_graph.build(self._checkpoint, graph, kind).SerializeToString()
            self._models[kind, graph] = self._core.read_model(raw)
        model = self._models[kind, graph].clone()
        model.reshape([size, *self._shapes[kind]])
        properties = {
            # What is not in integers in the int8 graph is in float32.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": _cores(),
            "NUM_STREAMS": streams,
            # Pinned threads of several models, or of the program around us, would share cores and leave others idle.
            "ENABLE_CPU_PINNING": False,
        }
        return _Lane(self._core.compile_model(model, "CPU", properties), requests)

    def _disagreement(self) -> str | None:
        """Why the precision is not to be trusted for this checkpoint, or None: it and fp32 on four fixed images."""
        images = _test_images(self._shapes["uint8"])
        ours = self._single_lane("uint8")
        reference = self._make_lane("uint8", 1, "fp32", 1, requests=1)
        difference = np.stack(
            [np.abs(ours.infer_one(image).astype(np.int16) - reference.infer_one(image)) for image in images[:, None]]
        )
        mean, largest = float(difference.mean()), int(difference.max())
        mean_limit, limit = _TOLERANCE[self.precision]
        if mean <= mean_limit and largest <= limit:
            return None
        return f"{self.precision} differs from fp32 by {mean:.1f} grey levels on average and {largest} at most"


class _Slot:
    """An infer request with its own buffers, bound once."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        import openvino

        self.request = compiled.create_infer_request()
        buffers = {}
        for port in (*compiled.inputs, *compiled.outputs):
            buffer = np.zeros(tuple(port.shape), port.element_type.to_dtype())
            buffers[port.any_name] = buffer
            self.request.set_tensor(port, openvino.Tensor(buffer, shared_memory=True))
        self.images: Images = buffers["images"]
        self.purified: Images = buffers["purified"]
        self.scores: Scores = buffers["score"]

    def start(self, batch: Images) -> None:
        """Copy the images in and begin."""
        self.images[...] = batch
        self.request.start_async()

    def finish(self, purified: Images, scores: Scores) -> None:
        """Wait, and copy the results out."""
        self.request.wait()
        purified[...] = self.purified
        scores[...] = self.scores


class _Lane:
    """One compiled model of a fixed batch size and its idle requests."""

    def __init__(self, compiled: openvino.CompiledModel, requests: int) -> None:
        self._compiled = compiled
        self.free: SimpleQueue[_Slot] = SimpleQueue()
        for _ in range(requests):
            self.free.put(self.make_slot())

    def make_slot(self) -> _Slot:
        return _Slot(self._compiled)

    def try_acquire(self) -> _Slot | None:
        try:
            return self.free.get_nowait()
        except Empty:
            return None

    def infer_one(self, batch: Images) -> Images:
        slot = self.free.get()
        slot.start(batch)
        purified, scores = np.empty_like(slot.purified), np.empty_like(slot.scores)
        slot.finish(purified, scores)
        self.free.put(slot)
        return purified


class _Job:
    """A submitted batch on its way."""

    def __init__(self, purified: Images, scores: Scores, pieces: int) -> None:
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()  # it starts at once, so there is nothing left to cancel
        self.purified = purified
        self.scores = scores
        self.pieces = pieces
        self.error: BaseException | None = None


_Piece = tuple[_Job, "tuple[_Lane, _Slot] | None", slice]


class _Completer:
    """A thread that waits for submitted requests in order, hands their results out and their slots back.

    OpenVINO's own callbacks run on one thread that the next completion needs as well, so a future's callback that
    called the engine again would stop everything; this thread needs nobody but itself.
    """

    def __init__(self) -> None:
        self._flying: SimpleQueue[_Piece | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, job: _Job, request: tuple[_Lane, _Slot] | None, where: slice) -> None:
        """Follow one started piece of a job; None when the piece could not be started."""
        self._flying.put((job, request, where))
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=_complete, args=(self._flying,), name="defense_vae_fast-openvino", daemon=True
                    )
                    self._thread.start()

    def stop(self) -> None:
        """End the thread after what is already in flight."""
        self._flying.put(None)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread


def _complete(flying: SimpleQueue[_Piece | None]) -> None:
    while (piece := flying.get()) is not None:
        job, request, where = piece
        if request is not None:
            lane, slot = request
            try:
                slot.finish(job.purified[where], job.scores[where])
            except BaseException as error:  # it belongs to the future, whatever it is
                job.error = job.error or error
            lane.free.put(slot)
        job.pieces -= 1
        if job.pieces == 0:
            if job.error is None:
                job.future.set_result((job.purified, job.scores))
            else:
                job.future.set_exception(job.error)
        del piece, job, request  # a finished batch is not kept until the next one comes


def _core() -> openvino.Core:
    """OpenVINO with its plugins; loading the CPU plugin takes some 70 ms, so it is done once.

    Raises:
        EngineUnavailable: this process was forked from one that had loaded it; its threads stayed behind.
    """
    process, core = _loaded_core()
    if process != os.getpid():
        raise EngineUnavailable(
            f"OpenVINO was loaded before the fork (pid {process}) and does not work after it (pid {os.getpid()}); "
            "create the first Purifier after the fork, or start processes with the spawn method"
        )
    return core


@functools.cache
def _loaded_core() -> tuple[int, openvino.Core]:
    import openvino

    return os.getpid(), openvino.Core()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _piece(config: VAEConfig) -> int:
    """Images in one request: ``_PIECE``, fewer for large images, whose activations alone fill the caches."""
    return max(1, min(_PIECE, _PIECE * 64**2 // config.image_size**2))


def _test_images(shape: tuple[int, int, int]) -> Images:
    """Four fixed uint8 images: dark with a bright box, a ramp, that box under noise, noise alone."""
    height, width, _ = shape
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    box = np.zeros(shape, np.uint8)
    box[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 200
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], shape)
    noisy = np.clip(box + (noise.astype(np.int16) - 128) // 2, 0, 255).astype(np.uint8)
    return np.stack([box, ramp, noisy, noise])
