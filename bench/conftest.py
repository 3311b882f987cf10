"""Options, fixtures and the closing report of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import machine, timeline
from bench.plot import draw, draw_stream
from bench.report import lines, write_json
from bench.rows import Group, Results, Row
from bench.worker import Worker
from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint

_RESULTS = pytest.StashKey[Results]()
_MACHINE = pytest.StashKey[dict[str, Any]]()
_WATCH = pytest.StashKey[machine.OthersWatch]()

Measure = Callable[..., Any]
Record = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("defense_vae_fast benchmarks")
    group.addoption(
        "--bench-out", type=Path, metavar="DIR", default=Path(__file__).parent / "results",
        help="folder for latest.json and latest.png (default: bench/results)",
    )  # fmt: skip
    group.addoption("--bench-quick", action="store_true", help="few rounds and images: a trial, not a measurement")
    group.addoption(
        "--bench-checkpoint", default="fashion_mnist", metavar="NAME_OR_PATH",
        help="the purifier to measure (default: fashion_mnist)",
    )  # fmt: skip
    group.addoption(
        "--bench-precision", default="auto", metavar="NAME",
        help="precision of the engine behind the streams, int8 for instance (default: auto, as for any user)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = Results()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Open-loop load takes five minutes, as long as all the rest: it is measured when its file is named."""
    if any("test_stream" in argument for argument in config.args):
        return
    for item in items:
        if item.name.startswith("test_load["):
            item.add_marker(pytest.mark.skip(reason="takes five minutes; name the file: pytest bench/test_stream.py"))


@pytest.fixture(scope="session", autouse=True)
def watched(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> None:
    """Look for other users of the machine before the first measurement."""
    stash = request.config.stash
    stash[_WATCH] = machine.OthersWatch()
    name = Path(request.config.getoption("--bench-checkpoint")).name
    stash[_MACHINE] = {
        **machine.describe(),
        "checkpoint": f"{name}, digest {checkpoint.digest[:16]}",
        "quick": request.config.getoption("--bench-quick"),
    }


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether this is a trial with few rounds and images."""
    return bool(request.config.getoption("--bench-quick"))


@pytest.fixture(scope="session")
def checkpoint_name(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--bench-checkpoint"))


@pytest.fixture(scope="session")
def checkpoint(checkpoint_name: str) -> Checkpoint:
    return load_checkpoint(checkpoint_name)


@pytest.fixture(scope="session")
def warm_worker(checkpoint_name: str) -> Iterator[Worker]:
    """The process that times torch with the allocator warm."""
    with Worker(checkpoint_name, warm=True) as worker:
        yield worker


@pytest.fixture(scope="session")
def cold_worker(checkpoint_name: str) -> Iterator[Worker]:
    """The process that times torch as a program normally starts."""
    with Worker(checkpoint_name, warm=False) as worker:
        yield worker


@pytest.fixture
def device(request: pytest.FixtureRequest, warm_worker: Worker) -> str:
    """A device for plain torch, given by indirect parametrisation; skips where torch has no such device."""
    name = str(request.param)
    if name not in warm_worker.ask("devices")["devices"]:
        pytest.skip(f"torch sees no {name} device on this machine")
    return name


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Measure:
    """``measure(group, target, **pedantic's)``: time ``target`` and give the result of its last call."""

    def time(group: str, target: Callable[..., Any], **options: Any) -> Any:
        benchmark.group = group
        return benchmark.pedantic(target, **options)  # type: ignore[no-untyped-call]

    return time


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Record:
    """``record(group, name, batch, seconds=None, **details)``: keep a row; seconds default to the benchmark's own."""

    def keep(group: Group, name: str, batch: int = 1, seconds: list[float] | None = None, **details: Any) -> None:
        if benchmark.stats is not None:  # None with --benchmark-disable: the checks ran, nothing was timed
            row = Row(group, name, batch, tuple(seconds or benchmark.stats.stats.data), details)
            request.config.stash[_RESULTS].add(row)

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if not results.rows:
        return
    described = config.stash[_MACHINE]
    described["load"] = config.stash[_WATCH].report()
    terminalreporter.section("defense_vae_fast benchmarks")
    if described["quick"]:
        terminalreporter.write_line("a quick trial, not a measurement")
    for line in lines(results, described):
        terminalreporter.write_line(line)
    folder: Path = config.getoption("--bench-out")
    write_json(folder / "latest.json", results.record(described))
    written = ["latest.json"]
    written += ["latest.png"] if draw(folder / "latest.png", results) else []
    written += ["latest-stream.png"] if draw_stream(folder / "latest-stream.png", results) else []
    drawn = timeline.draw(folder / "latest-timeline.png", timeline.of_rows(row.to_dict() for row in results.rows))
    written += ["latest-timeline.png"] if drawn else []
    terminalreporter.write_line(f"written to {folder}: {', '.join(written)}")
