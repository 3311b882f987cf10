"""Purify more images than one machine should: ``pip install 'defense-vae-fast[ray]'``.

Ray Data hands the shards of the input to actors, one engine each, on all nodes of a cluster. Images do not pass through
Ray: an actor reads its shard from the file system, which all nodes share, and writes the part of the output that
belongs to it. Only the shards' descriptions and counts travel.

What is done is what is in the output folder. An actor or a node that dies takes the shards with it that it was working
on; these are done again, by another, and take the place that they have, so that every image comes out once. In the same
way a run that was stopped is continued by the same call.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.util.scheduling_strategies

from defense_vae_fast import __version__
from defense_vae_fast.checkpoint import load_checkpoint, save_checkpoint
from defense_vae_fast.engines.base import DEFAULT_MAX_BATCH, EngineUnavailable
from defense_vae_fast.integrations.bulk_input import SHARD_IMAGES, InputError, Item, Shard, plan, read
from defense_vae_fast.integrations.bulk_output import (
    ENCODINGS,
    Encoding,
    Part,
    finished,
    part_key,
    part_path,
    read_part,
    remove_leftovers,
    writing,
)
from defense_vae_fast.purifier import Purifier

BATCH = 512  # images read, purified and written at once; the engine cuts them up
_PASSES = 3  # passes in a row that finish nothing before giving up
_SHOWN = 5  # reasons for unusable images that a shard reports

_log = logging.getLogger("defense_vae_fast.bulk")


class BulkError(RuntimeError):
    """The work cannot be finished; what is done stays, and the same call goes on from there."""


@dataclass(frozen=True)
class Done:
    """A shard that has been dealt with.

    Attributes:
        title: what is in it.
        images: rows of its part.
        failed: images among them that could not be used; their rows say why.
        reasons: the first few of these.
        error: why there is no part at all; None where there is one.
    """

    title: str
    images: int = 0
    failed: int = 0
    reasons: tuple[str, ...] = ()
    error: str | None = None


@dataclass
class Report:
    """What came of a run.

    Attributes:
        shards: shards of the input.
        images: rows of the output, unusable images included.
        failed: unusable images; their rows have an ``error`` instead of an image.
        resumed: shards that had been done before.
        damaged: shards that could not be read, purified or written, so that nothing of them is in the output.
    """

    shards: int
    images: int = 0
    failed: int = 0
    resumed: int = 0
    damaged: list[Done] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """What every actor needs to know; plain data."""

    checkpoint: str
    out: str
    encoding: Encoding
    engine: dict[str, Any]
    fail_on_bad: bool


def bulk(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] = "fashion_mnist",
    *,
    engine: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    max_batch: int = DEFAULT_MAX_BATCH,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    encoding: Encoding = "png",
    column: str = "image",
    key_column: str | None = None,
    shard_images: int = SHARD_IMAGES,
    fail_on_bad: bool = False,
    force: bool = False,
    address: str | None = None,
    started: Callable[[Report], None] | None = None,
    advance: Callable[[Done], None] | None = None,
) -> Report:
    """Purify all images of a folder, Parquet or WebDataset into a folder of Parquet files.

    Columns of the output: ``source``, ``key``, ``image``, ``score`` and ``error``; see
    :func:`~defense_vae_fast.integrations.bulk_output.writing`. Images have to have the network's size and channels.

    Args:
        source, column, key_column, shard_images: see :func:`~defense_vae_fast.integrations.bulk_input.plan`. Every node
            has to see ``source`` and ``out`` under the same path.
        out: the output folder; made if it is not there. Parts of the same work that are in it are kept.
        checkpoint: a shipped name or a path, read here and sent to the actors.
        engine, precision, device, max_batch: of :class:`~defense_vae_fast.Purifier`. With "auto", nodes that differ may
            choose differently; each part's metadata say what made it.
        actors: engines at work; None for one a GPU, or one a node where there are none.
        gpus_per_actor: GPUs that Ray reserves for an actor; None for one, where there are any and ``device`` is not
            "cpu".
        encoding: of the output's images: "png", or "raw" for the bytes of (H, W, C).
        fail_on_bad: stop at the first image that cannot be used, instead of saying so in its row.
        force: remove parts of other work from ``out``.
        address: of a Ray cluster; "local" for a new one on this machine, for the time of the call; None for the one
            that this process is connected to, or that RAY_ADDRESS names, or that runs on this machine, or else a new
            one.
        started: called once, with what is known and done already.
        advance: called for each shard when it is done.

    Raises:
        FileNotFoundError, CheckpointError, InputError, OutputError: before anything is written.
        EngineUnavailable: the engine does not work on a node.
        BulkError: a bad image with ``fail_on_bad``, or no shard gets done any more.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if actors is not None and actors < 1:
        raise ValueError(f"actors: expected at least 1, got {actors}")
    loaded = load_checkpoint(checkpoint)
    if encoding == "png" and loaded.config.channels == 2:
        raise ValueError("encoding: expected 'raw' for two channels, which PNG does not have, got 'png'")
    folder = Path(out).resolve()
    shards = plan(Path(source), skip=folder, column=column, key_column=key_column, shard_images=shard_images)
    options = {"engine": engine, "precision": precision, "device": device}
    keys = [part_key(shard, loaded.digest, {**options, "encoding": encoding}) for shard in shards]
    pending = dict(zip(keys, shards, strict=True))
    report = Report(len(shards))

    def account(parts: dict[str, Part]) -> None:
        for key, part in parts.items():
            del pending[key]
            report.images += part.images
            report.failed += part.failed

    account(finished(folder, keys, force=force))
    report.resumed = len(shards) - len(pending)
    if started is not None:
        started(report)
    if not pending:
        return report
    folder.mkdir(parents=True, exist_ok=True)
    # In the folder, which every node sees, rather than with every actor through Ray.
    copy = folder / f".{loaded.digest}.safetensors"
    save_checkpoint(copy, loaded)
    job = _Job(str(copy), str(folder), encoding, {**options, "max_batch": max_batch}, fail_on_bad)
    with _connected(address):
        idle = 0
        while pending:
            before = len(pending)
            trouble = None
            told: set[str] = set()
            try:
                for key, done in _pass(pending, job, _actors(actors, gpus_per_actor, device)):
                    if key not in told:
                        told.add(key)
                        if done.error is not None:
                            del pending[key]
                            report.damaged.append(done)
                        if advance is not None:
                            advance(done)
            except ray.exceptions.RayError as error:
                trouble = error
                _log.warning("a pass over the shards was broken off (%s); going on with another", _first_line(error))
            # The folder, and not what actors said, is what counts: an answer can be lost with the node that gave it.
            parts = {key: part for key in pending if (part := read_part(part_path(folder, key))) is not None}
            for key, part in parts.items():
                if key not in told and advance is not None:
                    advance(Done(pending[key].title, part.images, part.failed))
            account(parts)
            idle = 0 if len(pending) < before else idle + 1
            if pending and idle == _PASSES:
                first = next(iter(pending.values())).title
                reason = _first_line(trouble) if trouble else "their actors die; look at Ray's logs"
                raise BulkError(f"{len(pending)} of {len(shards)} shards do not get done, such as {first}: {reason}")
    remove_leftovers(folder)
    return report


def _pass(pending: dict[str, Shard], job: _Job, resources: dict[str, Any]) -> Iterator[tuple[str, Done]]:
    """Hand every pending shard out once, and yield the answers as they come; a dead actor gives none."""
    context = ray.data.DataContext.get_current()
    saved = context.max_errored_blocks, context.enable_progress_bars
    # An actor that dies must not end the pass for the others; what it was working on is left for the next pass.
    context.max_errored_blocks, context.enable_progress_bars = -1, False
    try:
        rows = [{"key": key, "shard": shard.to_json()} for key, shard in pending.items()]
        actors = min(resources.pop("actors"), len(rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)  # until 2.64, which is excluded
            answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Worker,
                fn_constructor_args=(job,),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
                # Started again where there is room, but without the task that it died with: that would wait for the
                # actor, which may wait for a node that never comes.
                max_restarts=-1,
                max_task_retries=0,
                ray_remote_args_fn=_next_node() if not resources["num_gpus"] else None,
                **resources,
            )
        for answer in answers.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for key, text in zip(answer["key"], answer["done"], strict=True):
                told = json.loads(text)
                if told.pop("unavailable"):
                    raise EngineUnavailable(told["error"])
                if told.pop("bad"):
                    raise BulkError(told["error"])
                yield str(key), Done(**{**told, "reasons": tuple(told["reasons"])})
    finally:
        context.max_errored_blocks, context.enable_progress_bars = saved


class _Bad(Exception):
    """An image that cannot be used, where that is to end the work."""


class _Worker:
    """An actor: one engine, one shard at a time."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._unavailable: str | None = None
        try:
            self._purifier = Purifier.from_pretrained(job.checkpoint, **job.engine)
        except (EngineUnavailable, ValueError, OSError) as error:
            # Told with the first shard: Ray would start an actor whose creation fails again and again.
            self._unavailable = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = zip(batch["key"], batch["shard"], strict=True)
        answers = [self._answer(str(key), Shard.from_json(shard)) for key, shard in rows]
        return {"key": [str(key) for key in batch["key"]], "done": [json.dumps(answer) for answer in answers]}

    def _answer(self, key: str, shard: Shard) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "title": shard.title, "images": 0, "failed": 0, "reasons": [], "error": None, "bad": False,
            "unavailable": self._unavailable is not None,
        }  # fmt: skip
        if self._unavailable is not None:
            return {**answer, "error": self._unavailable}
        try:
            return {**answer, **self._purify(key, shard)}
        except _Bad as error:
            return {**answer, "error": str(error), "bad": True}
        except (InputError, OSError) as error:
            return {**answer, "error": str(error)}
        except Exception as error:  # of the engine, for instance: other shards may fare better, and a next run too
            return {**answer, "error": f"{type(error).__name__}: {error}"}

    def _purify(self, key: str, shard: Shard) -> dict[str, Any]:
        folder = Path(self._job.out)
        if (part := read_part(part_path(folder, key))) is not None:  # another actor was thought dead, and was not
            return {"images": part.images, "failed": part.failed}
        state = self._purifier.info()
        about = {
            "version": __version__, "shard": shard.title, "checkpoint": state["checkpoint"]["digest"],
            "node": ray.get_runtime_context().get_node_id(),
            "shape": [*self._purifier.config.image_shape[1:], self._purifier.config.channels],
            **{name: state[name] for name in ("engine", "precision", "device")},
        }  # fmt: skip
        reasons: list[str] = []
        with (
            writing(folder, key, self._job.encoding, about) as writer,
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as recorder,
        ):
            written: Future[None] | None = None
            for items in _read_ahead(read(shard, self._purifier.config), reader):
                bad = [_reason(item) for item in items if item.error is not None]
                if bad and self._job.fail_on_bad:
                    raise _Bad(bad[0])
                reasons += bad[: _SHOWN - len(reasons)]
                results = self._run(items)
                if written is not None:
                    written.result()
                written = recorder.submit(writer.write, items, *results)
            if written is not None:
                written.result()
        return {"images": writer.images, "failed": writer.failed, "reasons": reasons}

    def _run(self, items: Sequence[Item]) -> tuple[Any, Any]:
        pixels = [item.pixels for item in items if item.pixels is not None]
        if not pixels:
            return np.empty((0, 1, 1, 1), np.uint8), np.empty(0, np.float32)
        return self._purifier(np.stack(pixels), return_score=True)


def _reason(item: Item) -> str:
    name = item.source if item.key == item.source else f"{item.source}: {item.key}"
    return f"{name}: {item.error}"


def _read_ahead(items: Iterator[Item], reader: ThreadPoolExecutor) -> Iterator[list[Item]]:
    """Batches, of which the next is read and decoded in ``reader`` while one is worked on."""

    def take() -> list[Item]:
        return list(islice(items, BATCH))

    coming = reader.submit(take)
    while batch := coming.result():
        coming = reader.submit(take)
        yield batch


def _next_node() -> Callable[[], dict[str, Any]]:
    """Options that put one actor after another on one node after another: by what they reserve, all would fit on one.

    An actor whose node is lost goes to another.
    """
    nodes = cycle([node["NodeID"] for node in ray.nodes() if node["Alive"]])
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    return lambda: {"scheduling_strategy": affinity(next(nodes), soft=True)}


def _actors(actors: int | None, gpus: float | None, device: str) -> dict[str, Any]:
    """How many actors a pass has on what is there now, and what Ray reserves for each."""
    there = float(ray.cluster_resources().get("GPU", 0))
    if gpus is None:
        gpus = 1.0 if there >= 1 and device != "cpu" else 0.0
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    count = actors if actors is not None else max(1, int(there // gpus)) if gpus else max(1, nodes)
    # A CPU engine takes all cores of its node. Reserving none lets an actor move to a node that has one already.
    return {"actors": count, "num_cpus": 0, "num_gpus": gpus}


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Ray, as it is if this process has it, otherwise for the time of the block."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what a library starts on its own tells nobody
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise BulkError(f"no Ray cluster answers at {address or os.environ.get('RAY_ADDRESS')}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
