"""The library's front: images in, purified images of the same kind out."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload
from weakref import WeakSet

import numpy as np

from defense_vae_fast import __version__, regions_on_gpu
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.backlog import WhenFull
from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint, variant_name
from defense_vae_fast.engines import device_arrays, label, select
from defense_vae_fast.engines.base import DEFAULT_MAX_BATCH, EngineUnavailable
from defense_vae_fast.images import ImageReader
from defense_vae_fast.regions import Method, Regions, Tiles, purify_regions, purify_tiles
from defense_vae_fast.stream import Result, Stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from defense_vae_fast.nn.defended import PurifiedClassifier

Images = TypeVar("Images")


class Purifier:
    """A Defense-VAE ready to purify: one forward pass through encoder (mean latent) and decoder.

    Takes and gives back NumPy arrays, torch tensors, CuPy arrays, PIL images, a list of PIL images, or anything with
    DLPack or ``__cuda_array_interface__``: uint8 (H, W), (H, W, C), (N, H, W, C) in 0..255, or floating (C, H, W),
    (N, C, H, W) in [0, 1]; see :mod:`defense_vae_fast.images`. Images in GPU memory travel through host memory and come
    back to their device, except on the device of an engine that takes them there: torch tensors with the torch engine
    on CUDA, torch tensors, CuPy arrays and what these can read with TensorRT.

    Deterministic, and safe to call from many threads. A context manager; it holds threads and memory until closed.

    Args:
        checkpoint: what to run; :meth:`from_pretrained` reads it from a file.
        engine: an engine's name, or "auto" for the first that works here.
        precision: what the engine calculates in, or "auto" for the fastest whose numbers agree with float32.
        device: where it runs, or "auto".
        max_batch: most images that pass through the network at once; larger batches are cut up.
        streams: how many batches are worked on side by side; None lets the engine choose.

    Raises:
        ValueError: an option is not one that the engine has.
        EngineUnavailable: a named engine misses something here; the message names it and the extra that installs it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        engine: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        max_batch: int = DEFAULT_MAX_BATCH,
        streams: int | None = None,
        name: str = "",
    ) -> None:
        failed: dict[str, str] = {}
        while True:
            chosen = select(engine, device, precision, failed)
            try:
                self._engine = chosen.engine.load(checkpoint, precision, chosen.device, max_batch, streams)
                break
            except EngineUnavailable as error:
                if engine != "auto":
                    raise
                failed[label(chosen.engine, chosen.device)] = str(error)
        self._checkpoint = checkpoint
        self._name = name
        self._why = "asked for by name" if engine != "auto" else "the first in the list that works here"
        self._skipped = dict(chosen.skipped)
        self._run = self._engine.run
        # An engine that takes arrays of a GPU's memory spares those on its device the way through the host.
        self._run_tensor = getattr(self._engine, "run_tensor", None)
        self._reader = ImageReader(checkpoint.config)  # brings everything to the host, where frames wait
        self._read = ImageReader(
            checkpoint.config,
            getattr(self._engine, "tensor_device", None),
            getattr(self._engine, "cupy_device", None),
        ).read
        self._closed = False
        self._streams: WeakSet[Stream] = WeakSet()
        self._submissions = self.stream()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        engine: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        max_batch: int = DEFAULT_MAX_BATCH,
        streams: int | None = None,
    ) -> Purifier:
        """Load a shipped checkpoint by name (see :func:`~defense_vae_fast.list_pretrained`), or one's own by path.

        Args:
            name_or_path: the name or the path.
            variant: of a shipped name: ``e2e`` is the purifier that learnt together with its classifier (equation 5),
                which :func:`~defense_vae_fast.pretrained_classifier` gives. For your own classifier take none.
            engine, precision, device, max_batch, streams: those of the class.

        Raises:
            FileNotFoundError: there is no such file, shipped name or variant.
            CheckpointError: the file is damaged, hostile, or not a Defense-VAE checkpoint.
            ValueError, EngineUnavailable: as the class.
        """
        if variant is not None:
            name_or_path = variant_name(name_or_path, variant)
        return cls(
            load_checkpoint(name_or_path),
            engine=engine,
            precision=precision,
            device=device,
            max_batch=max_batch,
            streams=streams,
            name=Path(name_or_path).stem,
        )

    @overload
    def __call__(self, images: Images, return_score: Literal[False] = False) -> Images: ...

    @overload
    def __call__(self, images: Images, return_score: Literal[True]) -> tuple[Images, Any]: ...

    @overload
    def __call__(self, images: Images, return_score: bool) -> Images | tuple[Images, Any]: ...

    def __call__(self, images: Any, return_score: bool = False) -> Any:
        """Purify one image or a batch.

        Args:
            images: see the class; the caller's object is only read.
            return_score: also give the detector signal, mean |x - x_hat| over an image's pixels, in [0, 1].

        Returns:
            The purified images in the kind, dtype, shape and device of ``images``, owned by the caller; with
            ``return_score`` a tuple of these and the score: a float for one image, for a batch float32 (N,) in the
            caller's kind and device (a NumPy array for PIL images).

        Raises:
            TypeError: the kind or dtype of ``images`` is not one of those.
            ValueError: a wrong size, shape or layout, an empty batch, a NaN, a value outside [0, 1], or a tensor that
                requires a gradient, which would be lost here (see :meth:`defend`).
            RuntimeError: the Purifier is closed.
        """
        if self._closed:
            raise _closed_error()
        array, single, to_images, to_scores, on_device = self._read(images)
        purified, scores = self._run_tensor(array) if on_device and self._run_tensor else self._run(array)
        if not return_score:
            return to_images(purified)
        return to_images(purified), float(scores[0]) if single else to_scores(scores)

    @overload
    def submit(self, images: Images, return_score: Literal[False] = False) -> Future[Images]: ...

    @overload
    def submit(self, images: Images, return_score: Literal[True]) -> Future[tuple[Images, Any]]: ...

    @overload
    def submit(self, images: Images, return_score: bool) -> Future[Images] | Future[tuple[Images, Any]]: ...

    def submit(self, images: Any, return_score: bool = False) -> Future[Any]:
        """Queue one image or a batch and return at once; the future holds what calling the Purifier returns.

        ``images`` are checked and copied before this returns, so their memory may be reused. What was submitted cannot
        be cancelled. When the queue is full this waits for room in it. All calls share one :meth:`stream` with the
        defaults, whose batches hold what several callers submitted: an engine that chooses its kernels by the size of a
        batch (torch) may round in another way than when it is called.

        Raises:
            TypeError, ValueError, RuntimeError: as calling the Purifier, at once and not in the future.
        """
        if self._closed:
            raise _closed_error()
        return self._submissions._submit(images, return_score)

    def stream(
        self,
        *,
        max_batch: int | None = None,
        max_delay_ms: float | None = None,
        queue: int = 256,
        when_full: WhenFull = "block",
        callback: Callable[[Result], object] | None = None,
        iterate: bool = False,
    ) -> Stream:
        """A :class:`~defense_vae_fast.stream.Stream` for live frames of many sources, a context manager.

        ::

            with purifier.stream(when_full="latest", callback=show) as stream:
                stream.put(frame, source="cam3", deadline_ms=20)

        Args:
            max_batch: most frames of a batch; None for that of the Purifier.
            max_delay_ms, queue, when_full, callback, iterate: see the class.

        Raises:
            ValueError, TypeError: an option is none that the class has.
            RuntimeError: the Purifier is closed.
        """
        if self._closed:
            raise _closed_error()
        stream = Stream(
            self._engine,
            self._reader,
            max_batch=self._engine.max_batch if max_batch is None else max_batch,
            max_delay_ms=max_delay_ms,
            queue=queue,
            when_full=when_full,
            callback=callback,
            iterate=iterate,
        )
        self._streams.add(stream)
        return stream

    def regions(
        self,
        frame: Any,
        boxes: Any,
        *,
        size: int | tuple[int, int] | None = None,
        resize: Method = "area",
        paste: bool = False,
    ) -> Regions:
        """Purify what a detector's boxes show: cut out, resized to the network's size, purified in one batch.

        Resizing costs accuracy where a box is much larger or smaller than the network's images; docs/embedding.md says
        how much.

        Args:
            frame: uint8 (H, W) or (H, W, C) in 0..255, with the network's channels; only read. A NumPy array, or a
                torch tensor or CuPy array on a GPU, where it then stays: images, scores and frame come back as such
                arrays, made in the order of the caller's stream, and rows may lie apart (extra ``nvrtc``).
            boxes: (N, 4) numbers (left, top, right, bottom) in pixels; widened to whole pixels and cut at the frame's
                edge. N may be 0.
            size: side, or (height, width), of the images that come back, a classifier's for instance; None for the
                network's own.
            resize: "area" averages along an axis that shrinks and interpolates along one that grows; "bilinear"
                interpolates along both.
            paste: also give a copy of the frame with the purified boxes put back in their place.

        Raises:
            TypeError: ``frame`` is no uint8 array.
            ValueError: a wrong shape, or a box without a pixel in the frame.
            RuntimeError: the Purifier is closed, or the kernels for a frame on a GPU cannot be compiled.
        """
        if device_arrays.on_gpu(frame):
            return regions_on_gpu.purify_regions(
                self._purify_scored, self.config, frame, boxes, size, resize, paste
            )  # fmt: skip
        return purify_regions(self._purify_scored, self.config, frame, boxes, size, resize, paste)

    def tiles(self, frame: Any, *, overlap: int | None = None) -> Tiles:
        """Purify a whole frame at its own scale, in overlapping tiles of the network's size whose seams are blended.

        Args:
            frame: uint8 (H, W) or (H, W, C) in 0..255, with the network's channels, at least a tile large; only read.
                On a GPU as in :meth:`regions`.
            overlap: pixels that neighbouring tiles share, at most half a tile; None for a quarter.

        Raises:
            TypeError: ``frame`` is no uint8 array.
            ValueError: a wrong shape or overlap.
            RuntimeError: as :meth:`regions`.
        """
        if device_arrays.on_gpu(frame):
            return regions_on_gpu.purify_tiles(self._purify_scored, self.config, frame, overlap)
        return purify_tiles(self._purify_scored, self.config, frame, overlap)

    def _purify_scored(self, images: Any) -> tuple[Any, Any]:
        purified, scores = self(images, return_score=True)
        return purified, scores

    def warmup(self) -> None:
        """Compile and run whatever a later call could need, so that none pays for a first use.

        Raises:
            RuntimeError: the Purifier is closed.
        """
        if self._closed:
            raise _closed_error()
        self._engine.warmup()

    def info(self) -> dict[str, Any]:
        """What runs here and why, as a dictionary that JSON can hold.

        Its keys are ``checkpoint`` (name, digest, dataset, recipe, accuracies, versions, quantization),
        ``architecture``, ``engine``, ``why``, ``skipped`` (engine: reason), ``precision``, ``device``, ``max_batch``,
        ``versions``, and what the engine adds.
        """
        checkpoint, config = self._checkpoint, self.config
        engine = self._engine.info()
        return {
            **engine,
            "why": self._why,
            "skipped": dict(self._skipped),
            "checkpoint": {
                "name": self._name,
                "digest": checkpoint.digest,
                "dataset": checkpoint.dataset,
                "recipe": dict(checkpoint.recipe),
                "accuracies": dict(checkpoint.accuracies),
                "versions": dict(checkpoint.versions),
                "quantization": checkpoint.quantization.to_dict() if checkpoint.quantization else None,
            },
            "architecture": {
                **config.to_dict(),
                "parameters": config.parameter_count(),
                "multiply_adds": config.multiply_adds(),
            },
            "versions": {
                "defense-vae-fast": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                **engine.get("versions", {}),
            },
        }

    def defend(
        self, classifier: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> PurifiedClassifier:
        """A torch module that computes ``classifier(normalise(purify(x)))``, differentiable from end to end.

        It runs the plain float32 network in torch, whatever engine this Purifier has, on the classifier's device.

        Args:
            classifier: takes (N, C, H, W) images and gives (N, classes) logits.
            mean: C numbers that the classifier expects to be subtracted per channel, after purification.
            std: C positive numbers to divide by afterwards; given with ``mean`` or not at all.

        Raises:
            TypeError: ``classifier`` is no module, or ``mean`` or ``std`` no sequence of numbers.
            ValueError: ``mean`` and ``std`` are not as above.
            ImportError: torch is not installed.
        """
        try:
            from defense_vae_fast.nn.defended import PurifiedClassifier, device_of
            from defense_vae_fast.nn.model import DefenseVAE
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError("defend: torch is not installed; pip install 'defense-vae-fast[torch]'") from error
        device = device_of(classifier)
        vae = DefenseVAE.from_checkpoint(self._checkpoint).to(device)
        return PurifiedClassifier(vae, classifier, mean, std)

    @property
    def config(self) -> VAEConfig:
        """The network's shape: image size, channels, latent size."""
        return self._checkpoint.config

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of floating images."""
        return self._checkpoint.bounds

    def close(self) -> None:
        """Finish what was submitted and what waits in streams, and free the engine. Calling it again does nothing.

        Raises:
            RuntimeError: called from a future's or a stream's callback, which it would wait for.
        """
        for stream in list(self._streams):
            stream.close()
        self._engine.close()
        self._closed = True

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "expected a Purifier to stay in the process that made it, got a request to pickle or copy it; "
            "pass its checkpoint's path, and create a Purifier from it there"
        )

    def __enter__(self) -> Purifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        config, engine = self.config, self._engine
        size = f"{config.image_size}x{config.image_size}x{config.channels}"
        return f"<Purifier {self._name or 'unnamed'} {size} on {engine.name} ({engine.device}, {engine.precision})>"


def _closed_error() -> RuntimeError:
    return RuntimeError("expected an open Purifier, got a closed one; make another with Purifier.from_pretrained")
