"""Ctrl-C and SIGTERM as a wish to stop, which a training grants when its state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.distributed import ALONE, Ranks


@contextmanager
def stop_signal(ranks: Ranks = ALONE) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second interrupts as usual. Only the main thread can catch them.

    With several ranks the second does not: the launcher repeats what the terminal has said, and kills who is too slow.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        event.set()
        if ranks.size == 1:
            signal.signal(number, previous[number])

    previous = {int(number): signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
