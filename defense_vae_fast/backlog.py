"""Which frame goes next: the waiting room of a stream, without threads, clock or engine.

Time is a number of seconds that the caller passes in, so every rule here can be tested by itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from typing import Any, Generic, Literal, TypeVar

from defense_vae_fast.engines.base import ImageKind, Images

WhenFull = Literal["block", "latest", "drop_oldest", "reject"]
WHEN_FULL: tuple[WhenFull, ...] = ("block", "latest", "drop_oldest", "reject")
Cause = Literal["replaced", "oldest", "rejected", "deadline", "cancelled", "stopped", "failed", "invalid"]


ItemT = TypeVar("ItemT", bound="Item")


class Source(Generic[ItemT]):
    """The frames of one camera, client or whoever else puts them, in the order of putting."""

    __slots__ = ("images", "name", "unsettled", "waiting")

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.waiting: deque[ItemT] = deque()
        self.images = 0  # in ``waiting``
        self.unsettled: deque[ItemT] = deque()  # put, and not handed out by ``Backlog.settle`` yet


class Item:
    """A frame, or a submitted batch that is not to be torn apart, on its way through a stream.

    Args:
        array: its images as an engine takes them; (count, ...).
        kind: of the array; a batch has one kind.
        since: when it was put.
        deadline: seconds after which nobody wants it any more.
    """

    __slots__ = (
        "array", "count", "deadline", "dropped", "error", "kind", "settled", "since", "slot", "source", "waited",
    )  # fmt: skip

    def __init__(self, array: Images, kind: ImageKind, since: float, deadline: float = math.inf) -> None:
        self.array = array
        self.count = len(array)
        """Images in it."""
        self.kind = kind
        self.since = since
        self.deadline = deadline
        self.waited = 0.0
        self.slot: int | None = None  # the place that ``array`` occupies, if it is one that others use after it
        self.dropped: Cause | None = None
        self.error: BaseException | None = None
        self.settled = False
        self.source: Source[Any] | None = None


class Backlog(Generic[ItemT]):
    """Frames that wait, by source.

    Sources take turns, one item each, so that a slow camera waits for a flood of another one no longer than a turn;
    what makes room is dropped from the source that has the most. All counts are in images.

    Args:
        capacity: most images that may wait; more only in one item that finds the room empty.
        max_batch: most images of a batch; more only in one item.
        max_delay: seconds that an item may wait for company, at most.
        when_full: who gives way when there is no room. "block": nobody, the caller waits; "reject": the new item;
            "drop_oldest": the oldest; "latest": all but the newest of the fullest source at once.
        step: where so many wait, a batch is a multiple of it, and the rest, which is next in turn, waits for another.
    """

    def __init__(self, capacity: int, max_batch: int, max_delay: float, when_full: WhenFull, step: int = 1) -> None:
        self.max_batch = max_batch
        self.images = 0
        self._capacity = capacity
        self.delay = self._max_delay = max_delay
        """Seconds that an item may wait for company."""
        self._alone: float | None = None
        self._when_full = when_full
        self._step = step
        self._sources: dict[Hashable, Source[ItemT]] = {}
        self._turns: deque[Source[ItemT]] = deque()  # those with something waiting, the next one first
        self.due = math.inf
        """When the first item must go even in a batch that is not full."""

    @property
    def room(self) -> int:
        """Images that fit beside those that wait; below 0 after one item that was larger than the room."""
        return self._capacity - self.images

    def has_room(self, count: int) -> bool:
        """Whether ``count`` more images fit."""
        return count <= self.room or self.images == 0

    def add(self, item: ItemT, name: Hashable) -> list[ItemT]:
        """Take an item of a source in and return what was dropped for it, which may be the item itself.

        Under "block" it is taken in whether there is room or not.
        """
        source = self.begin(item, name)
        dropped: list[ItemT] = []
        if not self.has_room(item.count) and self._when_full != "block":
            if self._when_full == "reject":
                item.dropped = "rejected"
                return [item]
            dropped = self._make_room(item)
        if not source.waiting:
            self._turns.append(source)
        source.waiting.append(item)
        source.images += item.count
        self.images += item.count
        # Half of a deadline is left for the computing; waiting it out would be in vain.
        self.due = min(self.due, item.since + min(self.delay, item.deadline / 2))
        return dropped

    def begin(self, item: ItemT, name: Hashable) -> Source[ItemT]:
        """Give an item, which is computed without having waited, its place in the order of its source."""
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = Source(name)
        item.source = source
        source.unsettled.append(item)
        return source

    def ready(self, now: float, idle: bool) -> bool:
        """Whether a batch should start: there is a full one, somebody's time is up, or the engine has been idle."""
        return self.images > 0 and (idle or self.images >= self.max_batch or now >= self.due)

    def computed_alone(self, seconds: float) -> None:
        """Have items wait no longer than half of what an image alone takes, of which ``seconds`` is a measurement.

        Company saves an image its share of what a call costs whatever its size: less than half on a CPU; on a GPU it is
        not measured.
        """
        self._alone = seconds if self._alone is None else self._alone + (seconds - self._alone) / 8
        self.delay = min(self._max_delay, self._alone / 2)

    def take(self, now: float) -> tuple[list[ItemT], list[ItemT]]:
        """The next batch, and the items on its way whose deadline has passed."""
        batch: list[ItemT] = []
        expired: list[ItemT] = []
        passed: list[Source[ItemT]] = []  # they do not fit this batch and stay first in line
        images = 0
        most = min(self.images, self.max_batch)
        most = most // self._step * self._step or self.max_batch
        while self._turns and images < most:
            source = self._turns.popleft()
            item = source.waiting[0]
            late = now - item.since >= item.deadline
            if not late and batch and (item.kind != batch[0].kind or images + item.count > most):
                passed.append(source)
                continue
            self._pop(source)
            if source.waiting:
                # A dropped frame has used no turn.
                self._turns.appendleft(source) if late else self._turns.append(source)
            if late:
                item.dropped = "deadline"
                expired.append(item)
            else:
                images += item.count
                batch.append(item)
        self._turns.extendleft(reversed(passed))
        return batch, expired

    def clear(self, cause: Cause) -> list[ItemT]:
        """Drop everything that waits."""
        dropped = []
        while self._turns:
            source = self._turns.popleft()
            while source.waiting:
                dropped.append(self._drop(source, cause))
        return dropped

    def settle(self, items: list[ItemT]) -> list[ItemT]:
        """Note that these are computed or dropped; return all whose turn has come, so that a source's keep its order.

        An item that settles before an older one of its source is held back until that one has. One that never came
        here has its turn at once.
        """
        for item in items:
            item.settled = True
        turn: list[ItemT] = []
        for item in items:
            if item.source is None:
                turn.append(item)
                continue
            unsettled = item.source.unsettled
            while unsettled and unsettled[0].settled:
                turn.append(unsettled.popleft())
            if not unsettled:
                self._sources.pop(item.source.name, None)  # sources come and go; none is remembered
        return turn

    @property
    def sources(self) -> int:
        """Sources that have something waiting or computing."""
        return len(self._sources)

    def _make_room(self, item: ItemT) -> list[ItemT]:
        dropped: list[ItemT] = []
        cause: Cause = "replaced" if self._when_full == "latest" else "oldest"
        while not self.has_room(item.count):
            fullest = max(self._turns, key=lambda source: (source.images, source is item.source))
            number = 1
            if self._when_full == "latest":
                number = max(1, len(fullest.waiting) - (fullest is not item.source))
            dropped += [self._drop(fullest, cause) for _ in range(number)]
            if not fullest.waiting:
                self._turns.remove(fullest)
        return dropped

    def _drop(self, source: Source[ItemT], cause: Cause) -> ItemT:
        item = self._pop(source)
        item.dropped = cause
        return item

    def _pop(self, source: Source[ItemT]) -> ItemT:
        item = source.waiting.popleft()
        source.images -= item.count
        self.images -= item.count
        if self.images == 0:
            self.due = math.inf
        return item
