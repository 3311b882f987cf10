"""What ``bulk`` writes: a folder of Parquet files, one for each shard of the input, whole or not at all.

A file's name follows from what it holds (the shard, the checkpoint and the options), so that the same work has the same
place, whoever does it and however often: nothing is done twice that is done, and nothing is there twice.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from defense_vae_fast.atomic import replacing
from defense_vae_fast.integrations.bulk_input import Item, Shard

Encoding = Literal["png", "raw"]

ENCODINGS: tuple[Encoding, ...] = ("png", "raw")
FORMAT = 1  # of the files; a change makes all work new
_METADATA = b"defense_vae_fast"
_PNG_LEVEL = 1  # of zlib: small images hardly shrink further


class OutputError(ValueError):
    """The output folder holds something that does not belong there."""


@dataclass(frozen=True)
class Part:
    """An output file.

    Attributes:
        key: of the work, see :func:`part_key`.
        images: rows in it, unusable images included.
        failed: unusable images among them.
    """

    key: str
    images: int
    failed: int


def part_key(shard: Shard, digest: str, options: dict[str, Any]) -> str:
    """Name of a shard's work: what goes in, the checkpoint's digest, and the options that change the result."""
    told = json.dumps([FORMAT, shard.identity, digest, sorted(options.items())])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def part_path(folder: Path, key: str) -> Path:
    """Where the output file of a key is."""
    return folder / f"part-{key}.parquet"


def read_part(path: Path) -> Part | None:
    """What is known of an output file from its end; None where it is none of ours, or damaged."""
    try:
        metadata = pq.read_metadata(path)
        told = json.loads(metadata.metadata[_METADATA])
        return Part(told["key"], metadata.num_rows, int(told["failed"]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


def finished(folder: Path, keys: Sequence[str], *, force: bool) -> dict[str, Part]:
    """The parts in ``folder`` that are done, by their keys.

    Args:
        folder: the output folder, or where it will be.
        keys: all parts of the work.
        force: remove parts of other work, such as of an input that has changed since.

    Raises:
        OutputError: there are Parquet files of something else, or parts of other work without ``force``.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: expected a folder, got a file; name a folder")
    wanted = set(keys)
    done: dict[str, Part] = {}
    others: list[Path] = []
    for path in sorted(folder.glob("*.parquet")) if folder.exists() else []:
        part = read_part(path)
        if part is None or path != part_path(folder, part.key):
            raise OutputError(f"{path}: expected what an earlier run wrote, got another file; name another folder")
        if part.key in wanted:
            done[part.key] = part
        else:
            others.append(path)
    if others and not force:
        raise OutputError(
            f"{folder}: {len(others)} of its files are of another input, checkpoint or option, such as "
            f"{others[0].name}; use --force to remove them, or name another folder"
        )
    for path in others:
        path.unlink()
    return done


def remove_leftovers(folder: Path) -> None:
    """Remove the copies of checkpoints, and what writers left that were killed. Only when none is at work."""
    for pattern in (".*.tmp", ".*.safetensors"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


class Writer:
    """Writes the rows of one part; see :func:`writing`."""

    def __init__(self, parquet: pq.ParquetWriter, schema: pa.Schema, encoding: Encoding) -> None:
        self._parquet = parquet
        self._schema = schema
        self._encoding = encoding
        self.images = 0
        self.failed = 0

    def write(self, items: Sequence[Item], purified: npt.NDArray[np.uint8], scores: npt.NDArray[np.float32]) -> None:
        """Rows of ``items``; ``purified`` and ``scores`` are of those that have pixels, in their order."""
        results = iter(zip(purified, scores, strict=True))
        rows: list[tuple[bytes | None, float | None]] = []
        for item in items:
            image, score = next(results) if item.pixels is not None else (None, None)
            rows.append((None if image is None else self._encode(image), None if score is None else float(score)))
        columns = [
            pa.array([_text(item.source) for item in items], pa.string()),
            pa.array([_text(item.key) for item in items], pa.string()),
            pa.array([image for image, _ in rows], pa.binary()),
            pa.array([score for _, score in rows], pa.float32()),
            pa.array([None if item.error is None else _text(item.error) for item in items], pa.string()),
        ]
        self._parquet.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self.images += len(items)
        self.failed += sum(item.pixels is None for item in items)

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> bytes:
        if self._encoding == "raw":
            return pixels.tobytes()
        file = io.BytesIO()
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        picture.save(file, format="PNG", compress_level=_PNG_LEVEL)
        return file.getvalue()


@contextmanager
def writing(folder: Path, key: str, encoding: Encoding, about: dict[str, Any]) -> Iterator[Writer]:
    """Write a part, which takes its place when the block ends well.

    Columns: ``source`` and ``key`` as in :class:`Item`; ``image``, a PNG file or the bytes of uint8 (H, W, C) pixels;
    ``score``; and ``error``, why there is neither.

    Args:
        folder: the output folder; made if it is not there.
        key: of the work.
        encoding: of ``image``.
        about: what else the file's metadata are to say.
    """
    schema = pa.schema(
        [
            pa.field("source", pa.string(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("image", pa.binary()),
            pa.field("score", pa.float32()),
            pa.field("error", pa.string()),
        ]
    )
    with replacing(part_path(folder, key)) as file, pq.ParquetWriter(file, schema, compression="zstd") as parquet:
        writer = Writer(parquet, schema, encoding)
        yield writer
        told = {**about, "format": FORMAT, "key": key, "encoding": encoding, "failed": writer.failed}
        parquet.add_key_value_metadata({_METADATA: json.dumps(told).encode()})


def _text(text: str) -> str:
    """Text that Parquet takes: bytes of a file's name that are not UTF-8 are written as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
