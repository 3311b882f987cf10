"""What the ``purify`` command does once its files are settled: read, purify in batches, write, and report.

One file that fails does not stop the others.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from defense_vae_fast import files
from defense_vae_fast.atomic import replacing
from defense_vae_fast.files import Job

if TYPE_CHECKING:
    from defense_vae_fast.purifier import Purifier

Array = npt.NDArray[Any]

BATCH = 64  # pictures held at once; the engines are near their best rate from here on


@dataclass
class Report:
    """What came of a run.

    Attributes:
        files: how many files were written.
        images: how many images they hold.
        failed: the jobs that failed, with their errors.
        scores: (name, mean absolute change in [0, 1]) per image, in the order of the jobs.
    """

    files: int = 0
    images: int = 0
    failed: list[tuple[Job, Exception]] = field(default_factory=list)
    scores: list[tuple[str, float]] = field(default_factory=list)


def run(
    purifier: Purifier,
    jobs: Sequence[Job],
    *,
    advance: Callable[[float], None],
    failed: Callable[[Job, Exception], None],
) -> Report:
    """Purify every job.

    Args:
        purifier: the purifier to use.
        jobs: what to read and where to write it, from :func:`defense_vae_fast.files.plan`.
        advance: called with the number of files that have been dealt with since the last call; a large array file
            counts in fractions.
        failed: called at once with a job that failed and its error.
    """
    report = Report()

    def fail(job: Job, error: Exception) -> None:
        report.failed.append((job, error))
        failed(job, error)

    waiting: list[tuple[Job, Array]] = []
    for job in jobs:
        if job.is_array:
            _flush(purifier, waiting, report, fail, advance)
            done = 0.0
            try:
                for share in _purify_arrays(purifier, job, report):
                    advance(share)
                    done += share
            except Exception as error:  # whatever a damaged or hostile file makes numpy raise concerns this file alone
                fail(job, error)
            advance(1 - done)
            continue
        try:
            waiting.append((job, files.read_image(job.source, purifier.config)))
        except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error and more for damaged files
            fail(job, error)
            advance(1)
        if len(waiting) == BATCH:
            _flush(purifier, waiting, report, fail, advance)
    _flush(purifier, waiting, report, fail, advance)
    return report


def _flush(
    purifier: Purifier,
    waiting: list[tuple[Job, Array]],
    report: Report,
    fail: Callable[[Job, Exception], None],
    advance: Callable[[float], None],
) -> None:
    """Purify the pictures that wait, in one batch, and write them."""
    if not waiting:
        return
    cleaned, scores = purifier(np.stack([pixels for _, pixels in waiting]), return_score=True)
    for (job, _), pixels, score in zip(waiting, cleaned, scores, strict=True):
        try:
            files.write_image(job.target, pixels)
        except OSError as error:
            fail(job, error)
        else:
            report.files += 1
            report.images += 1
            report.scores.append((job.name, float(score)))
        advance(1)
    waiting.clear()


def _purify_arrays(purifier: Purifier, job: Job, report: Report) -> Iterator[float]:
    """Purify every array of one file, yielding shares of it as they are done; written when all are."""
    arrays = files.read_arrays(job.source)
    results: dict[str, Array] = {}
    scores: list[tuple[str, float]] = []
    for key, array in arrays.items():
        results[key] = result = np.empty(array.shape, array.dtype)
        title = f"{job.name}:{key}" if key else job.name
        # A batch is cut into slices for the progress bar and for memory; anything else, an empty batch and a wrong
        # shape included, goes to the purifier whole, which takes it or says what it expected.
        parts: list[Any] = [...]
        if array.ndim == 4 and len(array):
            parts = [slice(start, start + BATCH) for start in range(0, len(array), BATCH)]
        for part in parts:
            try:
                cleaned, score = purifier(np.asarray(array[part]), return_score=True)
            except (ValueError, TypeError) as error:
                raise ValueError(f"array {key!r}: {error}" if key else str(error)) from error
            result[part] = cleaned
            if array.ndim == 4:
                scores += [(f"{title}[{index}]", float(value)) for index, value in enumerate(score, part.start)]
            else:
                scores.append((title, float(score)))
            yield 1 / (len(arrays) * len(parts))
    files.write_arrays(job.target, results, compressed=files.is_compressed(job.source))
    report.files += 1
    report.images += len(scores)
    report.scores += scores


def write_scores(path: Path, scores: Sequence[tuple[str, float]]) -> None:
    """Write ``name,score`` rows as UTF-8 CSV with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "score"])
    writer.writerows((name, f"{score:.6f}") for name, score in scores)
    with replacing(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
