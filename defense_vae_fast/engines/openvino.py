"""The embedded CPU engine: OpenVINO on the folded graph. It needs neither a GPU nor torch.

Every model is compiled for one fixed size: shapes stay static (5 to 10 % faster than a dynamic batch), no image is
padding, and an image goes through the same kernels in whatever company it travels. A :class:`_Lane` is one such model:

- pieces of ``_PIECE`` images over one stream a core, for throughput, as long as there are enough for every stream;
- for the rest, and for small batches, requests of ``_TOGETHER`` images on all cores, one after the other, for latency.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
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
from defense_vae_fast.engines.pieces import Lane, Piece, run_pieces
from defense_vae_fast.engines.trial import trial_images

if TYPE_CHECKING:
    import openvino
    from typing_extensions import Self

    from defense_vae_fast.onnx_graph import Precision

_PIECE = 8
# Images of a request on all cores. Single images side by side, one a core, read all weights for every image: with int8
# on two cores with AVX2 alone, 3 took 2.5 ms together and 3.1 to 3.5 that way, 4 took 3.0 and 3.7, 12 took 6.0 and 7.3.
_TOGETHER = (8, 4, 3, 2, 1)
# Three at once have other last bits than one in fp32 with AVX-512 (openvino 2026.4), so that a pixel could change its
# grey level with the company. Two and one have the same, and take 1.2 times as long.
_TOGETHER_IN_FP32 = (8, 4, 2, 1)
# Of more than so many, which only wide machines have left after their pieces, each goes to a core of its own.
_MOST_TOGETHER = 2 * _PIECE
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
        # By the number of images that are left: how many of them make the next request on all cores.
        sizes = _TOGETHER_IN_FP32 if precision == "fp32" else _TOGETHER
        self._together = [max(size for size in sizes if size <= left) for left in range(1, self._piece + 1)]
        self.batch_step = self._piece * streams  # in any other number some streams have one piece more to do
        self._core = core
        self._checkpoint = checkpoint
        self._note = note
        self._models: dict[tuple[ImageKind, str], openvino.Model] = {}
        self._lanes: dict[tuple[ImageKind, int, int], _Lane] = {}
        self._building = threading.Lock()

    @classmethod
    def available(cls, device: str = "auto") -> str | None:
        """None when OpenVINO and its CPU plugin load, otherwise what is missing."""
        if device not in ("auto", *cls.devices):
            return f"it runs on {', '.join(cls.devices)}, not on {device}"
        try:
            openvino_core().get_property("CPU", "FULL_DEVICE_NAME")
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
        core = openvino_core()
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
            scores = np.empty(len(batch), np.float32)
            start = 0
            if len(batch) > 1 and (start := self._spread(len(batch))):
                run_pieces(self._pieces(kind, start), batch, purified, scores)
            while start < len(batch):
                size = self._together[min(len(batch) - start, self._piece) - 1]
                where = slice(start, start + size)
                self._lane(kind, size, 1).infer(batch[where], purified[where], scores[where])
                start += size
            return purified, scores
        finally:
            self._leave()

    def warmup(self) -> None:
        """See :meth:`Engine.warmup`; these counts use every lane."""
        self._run_zeros(*set(self._together), _MOST_TOGETHER + 1, self.batch_step)

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
        self._lanes.clear()
        self._models.clear()

    def _spread(self, count: int) -> int:
        """Images of a batch that go over the streams: all that fill every stream, and more than a few after them."""
        full = count // self.batch_step * self.batch_step
        return count if count - full > _MOST_TOGETHER else full

    def _pieces(self, kind: ImageKind, count: int) -> Iterator[Piece]:
        """Cut what goes over the streams: large pieces while there are enough for every stream, then single images."""
        full = count // self.batch_step * self.batch_step
        for start in range(0, full, self._piece):
            yield self._lane(kind, self._piece, self.streams), start, start + self._piece
        for start in range(full, count):
            yield self._lane(kind, 1, self.streams), start, start + 1

    def _lane(self, kind: ImageKind, size: int, streams: int) -> _Lane:
        lane = self._lanes.get((kind, size, streams))
        if lane is None:
            with self._building:
                lane = self._lanes.get((kind, size, streams))
                if lane is None:
                    # Two requests a stream: one computes while the other is filled and emptied.
                    lane = self._make_lane(kind, size, self.precision, streams, requests=2 * streams)
                    self._lanes[kind, size, streams] = lane
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
        images = trial_images(self._shapes["uint8"])
        ours, reference = np.empty_like(images), np.empty_like(images)
        score = np.empty(1, np.float32)
        for lane, purified in (
            (self._lane("uint8", 1, 1), ours),
            (self._make_lane("uint8", 1, "fp32", 1, requests=1), reference),
        ):
            for number in range(len(images)):
                one = slice(number, number + 1)
                lane.infer(images[one], purified[one], score)
        difference = np.abs(ours.astype(np.int16) - reference)
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

    def abandon(self) -> None:
        """Wait, and leave the results."""
        self.request.wait()

    def infer(self, batch: Images, purified: Images, scores: Scores) -> None:
        """From beginning to end, on this thread too: sooner there than by starting it and waiting."""
        self.images[...] = batch
        self.request.infer(share_outputs=True)
        purified[...] = self.purified
        scores[...] = self.scores


class _Lane(Lane[_Slot]):
    """One compiled model of a fixed batch size and its idle requests."""

    def __init__(self, compiled: openvino.CompiledModel, requests: int) -> None:
        super().__init__(_Slot(compiled) for _ in range(requests))

    def infer(self, batch: Images, purified: Images, scores: Scores) -> None:
        """Images of one request, from beginning to end."""
        slot = self.free.get()
        try:
            slot.infer(batch, purified, scores)
        finally:
            self.free.put(slot)


def openvino_core() -> openvino.Core:
    """OpenVINO with its plugins, the only one of this process, and kept until its end.

    Loading the CPU plugin takes some 70 ms. And a core that goes can take the process along: with its plugin a core
    gives the thread a stack for signal handlers, and one that ends in another thread, or before a later one, leaves
    that thread with memory that is no longer there (openvino 2026.4). The next Ctrl-C is a segmentation fault then.

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
