"""What ``bulk`` reads: image files, Parquet and WebDataset, cut into shards that are done or not done as a whole.

Nothing here touches an engine or Ray.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.files import IMAGE_FORMATS, decode_image, walk

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

Kind = Literal["files", "parquet", "webdataset"]

SHARD_IMAGES = 8192
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_ROWS = 256  # of a Parquet file, decoded at once
_LARGEST = 64 << 20  # bytes of an encoded image; a damaged tar can declare any size


class InputError(ValueError):
    """The input cannot be read as what it is taken for; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """A piece of the input that goes into one output file.

    Attributes:
        kind: how it is read.
        root: the input's absolute path; what is below is relative to it.
        names: image files, or the one Parquet file or tar.
        groups: row groups of a Parquet file, first and one past the last.
        column: the images of a Parquet file.
        key_column: the keys of a Parquet file; None for row numbers.
        images: how many, where it is known beforehand.
        identity: SHA-256 of all of this but ``root``, and of the files' sizes and times of change.
    """

    kind: Kind
    root: str
    names: tuple[str, ...]
    identity: str
    images: int | None = None
    groups: tuple[int, int] = (0, 0)
    column: str = ""
    key_column: str | None = None

    @property
    def title(self) -> str:
        """For people: what is in it."""
        first = self.names[0] or Path(self.root).name
        if self.kind == "files":
            return f"{first} and {len(self.names) - 1} more" if len(self.names) > 1 else first
        return f"{first}, row groups {self.groups[0]} to {self.groups[1] - 1}" if self.kind == "parquet" else first

    def to_json(self) -> str:
        """For the way to another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Shard:
        """What :meth:`to_json` gave."""
        fields: dict[str, Any] = json.loads(text)
        first, end = fields.pop("groups")
        return cls(names=tuple(fields.pop("names")), groups=(first, end), **fields)


class Item(NamedTuple):
    """An image of the input, or why there is none."""

    source: str
    """The file that holds it, relative to the input."""
    key: str
    """Its name in there."""
    pixels: npt.NDArray[np.uint8] | None
    """(H, W, C), checked; None where it cannot be used."""
    error: str | None
    """Why it cannot be used."""


def plan(
    source: Path, *, skip: Path, column: str = "image", key_column: str | None = None, shard_images: int = SHARD_IMAGES
) -> list[Shard]:
    """Cut the input into shards, always in the same way: a tar is a shard, a Parquet file one or more.

    Args:
        source: an image, Parquet or tar file, or a folder, which is searched to any depth; hidden entries and other
            kinds of file are passed over.
        skip: a folder that is not searched.
        column: the column of a Parquet file that holds images: encoded files as binary, the ``{bytes, path}`` of
            Hugging Face's data sets, or lists of uint8 pixels, row by row.
        key_column: a column of a Parquet file that names them; None for row numbers.
        shard_images: image files of a shard, and least rows of a shard of a Parquet file with more than that.

    Raises:
        FileNotFoundError: there is no ``source``, or nothing in it.
        InputError: a Parquet file is damaged or lacks a column.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    found: dict[Kind, list[str]] = {"files": [], "parquet": [], "webdataset": []}
    for name in _walk(source, skip):
        if (kind := _kind_of(name or source.name)) is not None:
            found[kind].append(name)
    if not any(found.values()):
        kinds = ", ".join((*IMAGE_FORMATS, ".parquet", *_TAR_SUFFIXES))
        raise FileNotFoundError(f"{source}: expected files of the kinds {kinds}, found none")
    root = str(source.resolve())
    names = found["files"]
    shards = [
        _shard("files", root, names[first : first + shard_images], images=len(names[first : first + shard_images]))
        for first in range(0, len(names), shard_images)
    ]
    for name in found["parquet"]:
        shards += _parquet_shards(root, name, column, key_column, shard_images)
    return [*shards, *(_shard("webdataset", root, [name]) for name in found["webdataset"])]


def _walk(source: Path, skip: Path) -> Iterator[str]:
    """Files below ``source``, relative to it, in a fixed order; "" for a file itself."""
    if not source.is_dir():
        yield ""
        return
    yield from (path.relative_to(source).as_posix() for path in walk(source, skip))


def _kind_of(name: str) -> Kind | None:
    lower = name.lower()
    if lower.endswith(_TAR_SUFFIXES):
        return "webdataset"
    if lower.endswith(".parquet"):
        return "parquet"
    return "files" if PurePosixPath(lower).suffix in IMAGE_FORMATS else None


def _shard(kind: Kind, root: str, names: Sequence[str], **fields: Any) -> Shard:
    shard = Shard(kind, root, tuple(names), "", **fields)
    return replace(shard, identity=_identity(shard))


def _identity(shard: Shard) -> str:
    status = [os.stat(_join(shard.root, name)) for name in shard.names]
    states = [(name, one.st_size, one.st_mtime_ns) for name, one in zip(shard.names, status, strict=True)]
    told = [shard.kind, states, shard.groups, shard.column, shard.key_column]
    return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogateescape")).hexdigest()


def _join(root: str, name: str) -> Path:
    return Path(root, name) if name else Path(root)


def _parquet_shards(root: str, name: str, column: str, key_column: str | None, shard_images: int) -> Iterator[Shard]:
    path = _join(root, name)
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file, got an unreadable one ({error})") from error
    for needed in (column, *([key_column] if key_column else [])):
        if needed not in schema.names:
            listed = ", ".join(schema.names)
            raise InputError(f"{path}: expected a column {needed!r}, got {listed}; name the right one")
    kind = schema.field(column).type
    if not (_is_binary(kind) or _is_struct(kind) or _is_pixels(kind)):
        raise InputError(
            f"{path}: column {column!r}: expected binary, struct<bytes, path> or list<uint8>, got {kind}; "
            "write encoded images or uint8 pixels"
        )
    first, rows = 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows and (rows >= shard_images or group == metadata.num_row_groups - 1):
            yield _shard(
                "parquet", root, [name], images=rows, groups=(first, group + 1), column=column, key_column=key_column
            )
            first, rows = group + 1, 0


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_struct(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def _is_pixels(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and bool(pa.types.is_uint8(kind.value_type))


def read(shard: Shard, config: VAEConfig) -> Iterator[Item]:
    """Every image of a shard, in order, decoded and checked for the network; nothing is resized or converted.

    Raises:
        InputError: the file is damaged from here on, or has changed since it was planned.
        OSError: it cannot be read.
    """
    if _identity(shard) != shard.identity:
        raise InputError(f"{shard.title}: expected files that stay as they are, got changed ones; run again")
    readers = {"files": _read_files, "parquet": _read_parquet, "webdataset": _read_tar}
    yield from readers[shard.kind](shard, config)


def _read_files(shard: Shard, config: VAEConfig) -> Iterator[Item]:
    for name in shard.names:
        key = name or Path(shard.root).name
        try:
            with _join(shard.root, name).open("rb") as file:
                data = file.read(_LARGEST + 1)
        except OSError as error:
            yield Item(key, key, None, str(error))
        else:
            yield _item(key, key, data, config)


class _Member(tarfile.TarInfo):
    """A member's header; one that is not there is an error, where tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]  # not in stubs
            raise InputError("it ends without an end mark; was it cut short?") from None


def _read_tar(shard: Shard, config: VAEConfig) -> Iterator[Item]:
    """Members in the order of the tar, read once from front to back; all but images are passed over."""
    [name] = shard.names
    path = _join(shard.root, name)
    source = name or path.name
    try:
        with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
            for member in tar:
                member_path = PurePosixPath(member.name)
                if not member.isfile() or member_path.suffix.lower() not in IMAGE_FORMATS:
                    continue
                key = str(member_path.with_suffix(""))
                if member.size > _LARGEST:
                    yield Item(source, key, None, f"expected a file of at most {_LARGEST} bytes, got more")
                    continue
                file = tar.extractfile(member)
                data = file.read() if file is not None else b""
                if len(data) != member.size:
                    raise InputError(f"it ends within {member.name}; was it cut short?")
                yield _item(source, key, data, config)
            while rest := tar.fileobj.read(tarfile.RECORDSIZE):
                if rest.strip(b"\0"):
                    raise InputError("it goes on after its end mark; are these several tars in one file?")
    except (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: expected a tar, got a damaged one ({error})") from error


def _read_parquet(shard: Shard, config: VAEConfig) -> Iterator[Item]:
    [name] = shard.names
    path = _join(shard.root, name)
    source = name or path.name
    columns = [shard.column, *([shard.key_column] if shard.key_column else [])]
    try:
        with pq.ParquetFile(path) as file:
            groups = range(*shard.groups)
            row = sum(file.metadata.row_group(group).num_rows for group in range(shard.groups[0]))
            for batch in file.iter_batches(_ROWS, row_groups=list(groups), columns=columns):
                values = batch.column(shard.column)
                keys = batch.column(shard.key_column) if shard.key_column else None
                for index in range(len(batch)):
                    key = str(row + index if keys is None else keys[index].as_py())
                    yield _row(source, key, values[index], config)
                row += len(batch)
    except pa.ArrowException as error:
        raise InputError(f"{path}: expected a Parquet file, got a damaged one ({error})") from error


def _row(source: str, key: str, value: pa.Scalar, config: VAEConfig) -> Item:
    kind = value.type
    if _is_struct(kind) and value.is_valid:
        value = value["bytes"]
    if not value.is_valid:
        return Item(source, key, None, "expected an image, got null")
    if not _is_pixels(kind):
        return _item(source, key, value.as_py(), config)
    channels, height, width = config.image_shape
    pixels = value.values.to_numpy(zero_copy_only=False)
    if pixels.dtype != np.uint8 or pixels.size != channels * height * width:
        expected = f"{height} x {width} x {channels}"
        return Item(source, key, None, f"expected {expected} uint8 pixels, got {pixels.size} of {pixels.dtype}")
    return Item(source, key, pixels.reshape(height, width, channels), None)


def _item(source: str, key: str, data: bytes, config: VAEConfig) -> Item:
    if len(data) > _LARGEST:
        return Item(source, key, None, f"expected a file of at most {_LARGEST} bytes, got more")
    try:
        return Item(source, key, decode_image(data, config), None)
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error and more for damaged files
        return Item(source, key, None, " ".join(str(error).split()) or type(error).__name__)
