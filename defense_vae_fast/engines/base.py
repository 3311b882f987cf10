"""What an engine is: one inference backend behind one call shape."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Condition
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from defense_vae_fast.checkpoint import Checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

Images = npt.NDArray[Any]
Scores = npt.NDArray[np.float32]
Result = tuple[Images, Scores]
ImageKind = Literal["float", "uint8"]

DEFAULT_MAX_BATCH = 64
_KINDS: dict[np.dtype[Any], ImageKind] = {np.dtype(np.float32): "float", np.dtype(np.uint8): "uint8"}


class EngineUnavailable(RuntimeError):
    """The engine cannot work on this machine; the message names the missing piece and the extra that installs it."""


class DeviceMemoryError(EngineUnavailable):
    """The device's memory does not hold the engine; the message says what is wanted and what is free."""


class Engine(ABC):
    """A loaded purifier on one device.

    Many threads may call one engine; each call gets the bytes that it would get alone. A result belongs to the caller
    and is never a view of an engine's buffer.

    Class attributes say what an engine can do; whoever chooses one reads these and never its name.
    """

    name: ClassVar[str]
    """How users ask for it."""
    devices: ClassVar[tuple[str, ...]]
    """Devices it can run on."""
    precisions: ClassVar[tuple[str, ...]]
    """Arithmetic it can be asked for, besides "auto"."""
    dynamic_batch: ClassVar[bool]
    """Whether any number of images travels without padding."""
    differentiable: ClassVar[bool]
    """Whether gradients flow from the result to the images."""
    extra: ClassVar[str | None]
    """The pip extra that installs what it needs; None when a plain installation has it."""

    precision: str
    """The arithmetic in use, never "auto"."""
    device: str
    """The device in use, never "auto"."""
    batch_step: int = 1
    """Batches of a multiple of so many images cost the least an image."""

    def __init__(self, checkpoint: Checkpoint, precision: str, device: str, max_batch: int) -> None:
        channels, height, width = checkpoint.config.image_shape
        self._shapes: dict[ImageKind, tuple[int, int, int]] = {
            "float": (channels, height, width),
            "uint8": (height, width, channels),
        }
        self.precision = precision
        self.device = device
        self.max_batch = max_batch
        self._closed = False
        self._calls = 0
        self._process = os.getpid()
        self._idle = Condition()

    @classmethod
    @abstractmethod
    def available(cls, device: str = "auto") -> str | None:
        """None when the engine can work on this machine (on ``device``), otherwise what is missing."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        precision: str = "auto",
        device: str = "auto",
        max_batch: int = DEFAULT_MAX_BATCH,
        streams: int | None = None,
    ) -> Self:
        """Make the engine ready.

        Args:
            checkpoint: the purifier.
            precision: one of ``precisions``, or "auto" for the fastest whose numbers agree with float32.
            device: one of ``devices``, or "auto".
            max_batch: most images that travel through the network at once; a larger batch is cut up.
            streams: how many such batches are worked on side by side; None lets the engine choose.

        Raises:
            EngineUnavailable: something that it needs is not on this machine.
            ValueError: an argument is outside what the class attributes list.
        """

    @abstractmethod
    def run(self, batch: Images, out: Images | None = None) -> Result:
        """Purify a batch and wait for it.

        Args:
            batch: C-contiguous uint8 (N, H, W, C), or float32 (N, C, H, W) in [0, 1]; N is at least 1.
            out: where the purified images go: a C-contiguous array of the batch's shape and dtype. None makes one.

        Returns:
            Purified images of the batch's shape and dtype, and float32 (N,) scores: mean |x - x_hat| in [0, 1] units.

        Raises:
            ValueError: a wrong dtype, shape or layout.
            RuntimeError: the engine is closed.
        """

    def close(self) -> None:
        """Wait for the calls under way, then free everything. Calling it again does nothing.

        In a fork of the process that loaded the engine there is nothing to wait for or to free.
        """
        if os.getpid() != self._process:
            return
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._calls == 0)
        self._release()

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._closed

    def image_shape(self, kind: ImageKind) -> tuple[int, int, int]:
        """One image of a batch: (H, W, C) of "uint8" ones, (C, H, W) of "float" ones."""
        return self._shapes[kind]

    @abstractmethod
    def _release(self) -> None:
        """Free what the engine holds; no call is in flight any more."""

    def warmup(self) -> None:
        """Make ready whatever a later call could need, so that none pays for a first use.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._run_zeros(1, self.max_batch)

    def _run_zeros(self, *counts: int) -> None:
        """Run black images of both kinds, in batches of these sizes."""
        for dtype, kind in _KINDS.items():
            for count in counts:
                self.run(np.zeros((count, *self._shapes[kind]), dtype))

    def info(self) -> dict[str, Any]:
        """What is running: engine, device, precision, max_batch; an engine adds its own, and ``versions``."""
        return {"engine": self.name, "device": self.device, "precision": self.precision, "max_batch": self.max_batch}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Hold off :meth:`close` during a call, and refuse the call after it."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        if os.getpid() != self._process:
            # Its threads stayed behind in the parent: waiting for them would never end.
            raise forked_error(self._process)
        with self._idle:
            if self._closed:
                raise RuntimeError(f"the {self.name} engine is closed; load another one")
            self._calls += 1

    def _leave(self) -> None:
        with self._idle:
            self._calls -= 1
            if self._closed and self._calls == 0:
                self._idle.notify_all()

    def _kind(self, batch: Images) -> ImageKind:
        """Check a batch and say which of the two kinds it is."""
        kind = _KINDS.get(batch.dtype)
        if kind is None or batch.shape[1:] != self._shapes[kind] or not batch.flags.c_contiguous or len(batch) == 0:
            shapes = (f"{dtype} (N, {', '.join(map(str, self._shapes[k]))})" for dtype, k in _KINDS.items())
            layout = "" if batch.flags.c_contiguous else ", not contiguous"
            raise ValueError(
                f"batch: expected a C-contiguous {' or '.join(shapes)} array with N at least 1, "
                f"got {batch.dtype} {batch.shape}{layout}; convert it, or hand it to Purifier, which does"
            )
        return kind

    @staticmethod
    def _output(batch: Images, out: Images | None) -> Images:
        """Where the purified images of ``batch`` go."""
        if out is None:
            return np.empty_like(batch)
        if out.dtype != batch.dtype or out.shape != batch.shape or not out.flags.carray:
            raise ValueError(
                f"out: expected a writable C-contiguous {batch.dtype} array of shape {batch.shape}, "
                f"got {out.dtype} {out.shape} (C-contiguous {out.flags.c_contiguous}, writable {out.flags.writeable}); "
                "omit it to have one made"
            )
        return out


def forked_error(process: int) -> RuntimeError:
    """What a fork is told that goes on using an object of its parent, ``process``."""
    return RuntimeError(
        f"expected use in the process that made it (pid {process}), got its fork (pid {os.getpid()}); "
        "create the Purifier after the fork, or start processes with the spawn method"
    )


def check_choice(name: str, value: str, choices: Sequence[str], owner: str) -> str:
    """``value`` when it is "auto" or among ``choices``, otherwise a ValueError that lists them."""
    if value != "auto" and value not in choices:
        raise ValueError(
            f"{name}: expected 'auto' or one of {', '.join(choices)} for the {owner} engine, got {value!r}"
        )
    return value


def check_count(name: str, value: int, limit: int = 1 << 16) -> int:
    """``value`` when it is an int from 1 to ``limit``, otherwise a ValueError."""
    if type(value) is not int or not 1 <= value <= limit:
        raise ValueError(f"{name}: expected an int from 1 to {limit}, got {value!r}")
    return value
