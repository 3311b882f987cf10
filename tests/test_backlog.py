"""The queue's rules by themselves: time is a number that the test passes in."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defense_vae_fast.backlog import WHEN_FULL, Backlog, Item, WhenFull
from defense_vae_fast.histogram import Histogram

IMAGE = np.zeros((1, 2, 2, 1), np.uint8)
PLAIN: dict[str, Any] = {"capacity": 100, "max_batch": 4, "max_delay": 1.0, "when_full": "block"}


def backlog(**changes: Any) -> Backlog[Item]:
    return Backlog(**{**PLAIN, **changes})


def item(since: float = 0.0, deadline: float = np.inf, count: int = 1, kind: Any = "uint8") -> Item:
    return Item(np.repeat(IMAGE, count, axis=0), kind, since, deadline)


def fill(queue: Backlog[Item], names: str, **options: Any) -> tuple[list[Item], list[Item]]:
    """Add an item of each source named; all of them, and what was dropped."""
    items, dropped = [], []
    for name in names:
        items.append(item(**options))
        dropped += queue.add(items[-1], name)
    return items, dropped


def names(items: list[Item]) -> str:
    return "".join(one.source.name for one in items)


@pytest.mark.parametrize(
    ("put", "batches"),
    [
        pytest.param("a", ["a"], id="one"),
        pytest.param("aaaaaa", ["aaaa", "aa"], id="one source"),
        pytest.param("aaaaaab", ["abaa", "aaa"], id="a late source waits for one turn"),
        pytest.param("aaabbbc", ["abca", "bab"], id="three sources"),
        pytest.param("abcdef" * 2, ["abcd", "efab", "cdef"], id="more sources than places"),
    ],
)
def test_sources_take_turns(put: str, batches: list[str]) -> None:
    queue = backlog()
    items, _ = fill(queue, put)
    taken = [queue.take(0.0)[0] for _ in batches]
    assert [names(batch) for batch in taken] == batches
    assert queue.images == 0
    for name in set(put):  # each source's in the order of putting
        assert [one for batch in taken for one in batch if one.source.name == name] == [
            one for one in items if one.source.name == name
        ]


@pytest.mark.parametrize(
    ("step", "waiting", "sizes"),
    [
        (4, 3, [3]),
        (4, 4, [4]),
        (4, 5, [4, 1]),
        (4, 11, [8, 3]),
        (4, 12, [8, 4]),
        (4, 23, [8, 8, 4, 3]),
        (16, 12, [10, 2]),
        (1, 11, [10, 1]),
    ],
)
def test_a_batch_is_a_multiple_of_the_step(step: int, waiting: int, sizes: list[int]) -> None:
    queue = backlog(max_batch=10, step=step)
    items, _ = fill(queue, ("ab" * 12)[:waiting])
    taken = [queue.take(0.0)[0] for _ in sizes]
    assert [len(batch) for batch in taken] == sizes
    assert [one for batch in taken for one in batch] == items  # whoever is left is the next one
    assert queue.images == 0


def test_when_a_batch_is_due() -> None:
    queue = backlog()
    assert not queue.ready(0.0, idle=True)
    fill(queue, "a", since=10.0)
    assert queue.ready(10.0, idle=True)
    assert not queue.ready(10.9, idle=False)
    assert queue.ready(11.0, idle=False)
    fill(queue, "b", since=10.5, deadline=0.2)  # half of it may be waited
    assert not queue.ready(10.59, idle=False)
    assert queue.ready(10.61, idle=False)
    queue.take(10.61)
    assert not queue.ready(10.61, idle=True)
    fill(queue, "aaa", since=20.0)
    assert not queue.ready(20.0, idle=False)
    fill(queue, "b", since=20.0)
    assert queue.ready(20.0, idle=False)


def test_nobody_waits_for_company_longer_than_it_can_save() -> None:
    queue = backlog()
    queue.computed_alone(0.2)
    fill(queue, "a", since=10.0)
    assert not queue.ready(10.09, idle=False)
    assert queue.ready(10.11, idle=False)
    queue.take(10.11)
    for _ in range(100):  # one measurement more or less does not decide
        queue.computed_alone(0.4)
    queue.computed_alone(0.2)
    fill(queue, "a", since=20.0)
    assert not queue.ready(20.18, idle=False)
    assert queue.ready(20.21, idle=False)
    queue.take(20.21)
    for _ in range(100):
        queue.computed_alone(60.0)
    fill(queue, "a", since=30.0)
    assert not queue.ready(30.99, idle=False)
    assert queue.ready(31.0, idle=False)  # but never longer than it was told


def test_deadlines() -> None:
    queue = backlog()
    [late, *_], _ = fill(queue, "ab", since=0.0, deadline=1.0)
    [fine], _ = fill(queue, "a", since=0.5, deadline=1.0)
    batch, expired = queue.take(1.0)
    assert (batch, names(expired)) == ([fine], "ab")
    assert late.dropped == "deadline"
    assert fine.dropped is None
    assert queue.images == 0


def test_a_batch_has_one_kind_and_nobody_is_overtaken() -> None:
    queue = backlog()
    queue.add(item(), "a")
    queue.add(item(kind="float"), "b")
    queue.add(item(), "b")
    queue.add(item(), "c")
    assert [names(queue.take(0.0)[0]) for _ in range(3)] == ["ac", "b", "b"]


def test_submitted_batches_stay_whole() -> None:
    queue = backlog()
    for count, name in ((3, "a"), (2, "b"), (1, "c"), (9, "d")):
        queue.add(item(count=count), name)
    assert [names(queue.take(0.0)[0]) for _ in range(4)] == ["ac", "b", "d", ""]


@pytest.mark.parametrize(
    ("when_full", "put", "left", "dropped"),
    [
        pytest.param("reject", "aaab", "aaa", "b", id="reject"),
        pytest.param("drop_oldest", "aaab", "aba", "a", id="drop_oldest of the fullest"),
        pytest.param("drop_oldest", "abcb", "acb", "b", id="drop_oldest of one's own at a tie"),
        pytest.param("latest", "aaab", "ab", "aa", id="latest of the flood"),
        pytest.param("latest", "aaaa", "a", "aaa", id="latest of one source"),
        pytest.param("latest", "abcd", "bcd", "a", id="latest of many sources"),
    ],
)
def test_when_full(when_full: WhenFull, put: str, left: str, dropped: str) -> None:
    queue = backlog(capacity=3, when_full=when_full)
    items, gone = fill(queue, put)
    assert names(gone) == dropped
    assert {one.dropped for one in gone} == {
        {"reject": "rejected", "drop_oldest": "oldest", "latest": "replaced"}[when_full]
    }
    batch, _ = queue.take(0.0)
    assert names(batch) == left
    for name in set(left):
        kept = [one for one in batch if one.source.name == name]
        assert kept == [one for one in items if one in kept]
    if when_full != "reject":
        assert items[-1] in batch  # the newest is never the one to go


def test_one_item_may_be_larger_than_the_room() -> None:
    queue = backlog(capacity=3)
    assert queue.has_room(10)
    queue.add(item(count=10), "a")
    assert not queue.has_room(1)


def test_settling_keeps_the_order_of_each_source() -> None:
    queue = backlog()
    (a1, b1, a2, a3), _ = fill(queue, "abaa")
    assert queue.settle([a3]) == []
    assert queue.settle([b1, a2]) == [b1]
    assert queue.sources == 1
    assert queue.settle([a1]) == [a1, a2, a3]
    assert queue.sources == 0


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abcde"), st.integers(1, 6), st.sampled_from(["uint8", "float"])),
        st.tuples(st.just("take"), st.integers(0, 3)),
        st.tuples(st.just("settle"), st.integers(0, 3)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(WHEN_FULL), st.integers(1, 8), st.integers(1, 5), OPERATIONS)
def test_every_item_comes_out_once_in_order(
    when_full: WhenFull, capacity: int, max_batch: int, operations: list[tuple[Any, ...]]
) -> None:
    queue = backlog(capacity=capacity, max_batch=max_batch, when_full=when_full)
    put: dict[str, list[Item]] = defaultdict(list)
    out: dict[str, list[Item]] = defaultdict(list)
    flying: list[list[Item]] = []
    now = 0.0

    def settle(items: list[Item]) -> None:
        for one in queue.settle(items):
            out[one.source.name].append(one)

    for operation in [*operations, *[("take", 0), ("settle", 0)] * 60]:
        now += 0.25
        if operation[0] == "put":
            _, name, count, kind = operation
            if when_full == "block" and not queue.has_room(count):
                continue
            new = item(now, 1.0 if count % 2 else np.inf, count, kind)
            put[name].append(new)
            gone = queue.add(new, name)
            assert all(one.dropped for one in gone)
            assert new not in gone or when_full == "reject"
            settle(gone)
            assert queue.images <= max(capacity, count, 6)
        elif operation[0] == "take":
            before = queue.images
            batch, expired = queue.take(now)
            assert before - queue.images == sum(one.count for one in batch + expired)
            assert sum(one.count for one in batch) <= max_batch or len(batch) == 1
            assert len({one.kind for one in batch}) <= 1
            assert all(now - one.since < one.deadline for one in batch)
            assert all(now - one.since >= one.deadline for one in expired)
            flying.append(batch)
            settle(expired)
        elif flying:
            settle(flying.pop(operation[1] % len(flying)))
    while flying:
        settle(flying.pop())
    assert put == out  # nothing lost, nothing doubled, no order changed
    assert (queue.images, queue.sources) == (0, 0)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 12), min_size=1))
def test_a_batch_is_shared_evenly(waiting: dict[str, int]) -> None:
    queue = backlog(max_batch=8)
    for name, number in waiting.items():
        fill(queue, name * number)
    got = Counter(names(queue.take(0.0)[0]))
    for name, number in waiting.items():
        assert got[name] >= min(number, max(got.values()) - 1)


# Histogram


def test_percentiles_are_at_most_a_bucket_too_high() -> None:
    times = np.random.default_rng(0).lognormal(-6, 2, 4999)
    histogram = Histogram()
    assert histogram.percentile(50) is None
    for time in times:
        histogram.add(float(time))
    for percent in (0, 1, 50, 99, 99.9, 100):
        exact = float(np.percentile(times, percent, method="inverted_cdf"))
        found = histogram.percentile(percent)
        assert found is not None
        assert exact <= found * (1 + 1e-9)
        assert found <= exact * 2 ** (1 / 16) * (1 + 1e-9)
    assert histogram.sum == pytest.approx(times.sum())
    for edge, count in histogram.within(range(5, 31)):
        assert count == (times <= edge).sum()


@pytest.mark.parametrize(("time", "expected"), [(0.0, 1e-6), (1e-6, 1e-6), (1e9, 2**31 * 1e-6)])
def test_times_outside_the_buckets(time: float, expected: float) -> None:
    histogram = Histogram()
    histogram.add(time, 3)
    assert histogram.percentile(99) == pytest.approx(expected)
    assert histogram.count == 3
