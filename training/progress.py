"""One progress bar for every long job: ETA, loss and images a second."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A bar of known length that shows the loss and the rate; use as a context manager."""

    def __init__(self, title: str, total: int, done: int = 0, quiet: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("eta"),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), refresh_per_second=4, disable=quiet,
        )  # fmt: skip
        self._task = self._progress.add_task(title, total=total, completed=done, note="")
        self._images = 0
        self._since = time.monotonic()

    def update(self, steps: int = 1, *, images: int = 0, loss: torch.Tensor | None = None) -> None:
        """Advance; ``loss`` is read from its device four times a second at most, so a step does not wait for it."""
        self._progress.advance(self._task, steps)
        self._images += images
        elapsed = time.monotonic() - self._since
        if elapsed < 0.25:
            return
        note = f"{self._images / elapsed:,.0f} images/s" if self._images else ""
        if loss is not None:
            note += f"  loss {float(loss.detach()):.3f}"
        self._progress.update(self._task, note=note)
        self._images, self._since = 0, time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def bar(title: str, total: int, done: int = 0, *, quiet: bool = False) -> Bar:
    """A :class:`Bar` of ``total`` steps of which ``done`` are behind us; ``quiet`` shows nothing."""
    return Bar(title, total, done, quiet)
