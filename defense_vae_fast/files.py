"""Files for the ``purify`` command: what is read, where each result goes, and writing without leaving halves behind.

Nothing here touches an engine. :func:`plan` settles every output name before any work is done; readers and writers
handle one file each.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.atomic import replacing

Array = npt.NDArray[Any]

# Suffix -> Pillow's name of the format. Only these decoders are tried, whatever a file claims to be.
IMAGE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".pgm": "PPM",
    ".ppm": "PPM",
}
ARRAY_SUFFIXES = (".npy", ".npz")
# WebP is lossless on request; JPEG never is, so it gets the highest quality that Pillow's manual recommends.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
# Pillow has no gray WebP: each is decoded as RGB, and a lossy one's channels differ by one where they are rounded.
_GRAY_WEBP_SPREAD = 1
_MODES = {1: ("L", "8-bit gray"), 3: ("RGB", "8-bit RGB"), 4: ("RGBA", "8-bit RGBA")}


class PlanError(ValueError):
    """The outputs cannot be laid out safely; nothing has been read or written."""


@dataclass(frozen=True)
class Job:
    """One file to purify.

    Attributes:
        source: the file to read.
        target: the file to write.
        name: ``target`` relative to the output folder, with forward slashes; what reports call it.
    """

    source: Path
    target: Path
    name: str

    @property
    def is_array(self) -> bool:
        """Whether the file holds numpy arrays and not one picture."""
        return self.source.suffix.lower() in ARRAY_SUFFIXES


@dataclass(frozen=True)
class Problem:
    """An input that cannot be used, and why."""

    path: Path
    reason: str


def plan(inputs: Sequence[Path], output: Path, *, force: bool) -> tuple[list[Job], list[Problem]]:
    """Lay out every output before any work.

    A file keeps its name, a file found in a folder its path relative to that folder. Folders are searched to any depth;
    hidden entries, other kinds of file, folders behind symbolic links and ``output`` itself are passed over.

    Args:
        inputs: image files, ``.npy``/``.npz`` files and folders of them.
        output: the folder to write to; it need not exist.
        force: whether outputs that exist already may be replaced.

    Returns:
        Jobs in a fixed order, and the inputs that are missing, empty or of an unknown kind.

    Raises:
        PlanError: an output exists and ``force`` is off, would replace an input, or belongs to two inputs.
    """
    if output.exists() and not output.is_dir():
        raise PlanError(f"output {output}: expected a folder, got a file; name a folder with -o")
    jobs: dict[str, Job] = {}
    problems: list[Problem] = []
    for path in inputs:
        found = list(_expand(path, output))
        if not found:
            problems.append(Problem(path, _why_unusable(path)))
        for source, relative in found:
            target = output / relative
            key = os.path.normcase(target)
            known = jobs.get(key)
            if known is not None and not os.path.samefile(known.source, source):
                raise PlanError(
                    f"{known.source} and {source} would both be written to {target}; purify them into different folders"
                )
            jobs[key] = Job(source, target, relative.as_posix())
    _check_targets(list(jobs.values()), force=force)
    return list(jobs.values()), problems


def _expand(path: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """(file, output name) for everything usable behind one input."""
    if path.is_file() and _is_usable(path):
        yield path, Path(path.name)
    elif path.is_dir():
        yield from ((file, file.relative_to(path)) for file in walk(path, skip=output) if _is_usable(file))


def walk(folder: Path, skip: Path) -> Iterator[Path]:
    """Files below ``folder`` in a fixed order, without hidden ones and without what is in the folder ``skip``."""
    skipped = os.path.realpath(skip)
    for place, folders, names in os.walk(folder):
        # In-place, so that os.walk does not descend; a second run must not purify the first one's results.
        folders[:] = sorted(
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(place, name)) != skipped
        )
        for name in sorted(names):
            path = Path(place, name)
            if name[0] != "." and path.is_file():
                yield path


def _is_usable(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGE_FORMATS, *ARRAY_SUFFIXES)


def _why_unusable(path: Path) -> str:
    kinds = ", ".join((*IMAGE_FORMATS, *ARRAY_SUFFIXES))
    if path.is_dir():
        return f"expected files of one of the kinds {kinds} in this folder, found none"
    if path.is_file():
        return f"expected a file of one of the kinds {kinds}, got {path.suffix or 'no suffix'!r}"
    return "no such file or folder"


def _check_targets(jobs: Sequence[Job], *, force: bool) -> None:
    sources = {_identity(job.source): job.source for job in jobs}
    existing = [job.target for job in jobs if os.path.lexists(job.target)]
    for target in existing:
        if target.is_dir():
            raise PlanError(f"{target}: expected a place for a file, found a folder; name another folder with -o")
        if target.exists() and _identity(target) in sources:
            raise PlanError(f"{target} is one of the inputs and is never overwritten; name another folder with -o")
    if existing and not force:
        others = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise PlanError(f"{existing[0]}{others} exists already; pass --force to overwrite, or name another folder")


def check_extra_output(path: Path, jobs: Sequence[Job], *, force: bool) -> None:
    """Check the place of a report before any work.

    Raises:
        PlanError: its folder is missing; or ``path`` is an input, a result, a folder that results go into or, without
            ``force``, any file that exists.
    """
    if not path.parent.is_dir():
        raise PlanError(f"{path}: expected an existing folder {path.parent}, found none; make it first")
    # Links to folders are followed, for the same place may be spelled twice; one at the file itself would be replaced.
    real = {folder: Path(os.path.realpath(folder)) for folder in {path.parent, *(job.target.parent for job in jobs)}}
    place = os.path.normcase(real[path.parent] / path.name)
    targets = [real[job.target.parent] / job.target.name for job in jobs]
    if place in {os.path.normcase(target) for target in targets}:
        raise PlanError(f"{path} is also the name of a result; name another file")
    if place in {os.path.normcase(folder) for target in targets for folder in target.parents}:
        raise PlanError(f"{path} is also the name of a folder for results; name another file")
    if path.exists() and _identity(path) in {_identity(job.source) for job in jobs}:
        raise PlanError(f"{path} is one of the inputs and is never overwritten; name another file")
    if os.path.lexists(path) and not force:
        raise PlanError(f"{path} exists already; pass --force to overwrite, or name another file")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def read_image(path: Path | IO[bytes], config: VAEConfig) -> Array:
    """One picture, a file's path or the open file, as uint8 (H, W, C), turned upright where its EXIF data say so.

    For a one-channel network a WebP without colours counts as gray, since that format knows no other.

    Raises:
        ValueError: another size, colour mode or number of frames than the network takes; nothing is converted.
        OSError: it cannot be read or decoded.
    """
    mode, label = _MODES.get(config.channels, ("", f"{config.channels}-channel"))
    side = config.image_size
    formats = tuple(sorted(set(IMAGE_FORMATS.values())))
    with Image.open(path, formats=formats) as image:
        # Checked on the header, before anything is decoded: a picture of a billion pixels costs nothing.
        gray_webp = config.channels == 1 and image.format == "WEBP" and image.mode == "RGB"
        if image.size != (side, side) or (image.mode != mode and not gray_webp):
            width, height = image.size
            raise ValueError(
                f"expected a {side}x{side} {label} image, got {width}x{height} in Pillow mode {image.mode}; "
                "resize or convert it first"
            )
        if getattr(image, "n_frames", 1) != 1:
            raise ValueError("expected one frame, got several; split the file first")
        pixels = np.asarray(ImageOps.exif_transpose(image)).reshape(side, side, -1)
    if not gray_webp:
        return pixels
    if (pixels.max(axis=2) - pixels.min(axis=2)).max() > _GRAY_WEBP_SPREAD:
        raise ValueError(f"expected a {side}x{side} {label} image, got a WebP with colours; convert it first")
    return pixels[:, :, 1:2]  # green, which is nearest to the brightness


def decode_image(data: bytes, config: VAEConfig) -> Array:
    """The picture that an image file's bytes hold, as :func:`read_image`.

    Raises:
        ValueError, OSError: as :func:`read_image`.
    """
    try:
        return read_image(io.BytesIO(data), config)
    except UnidentifiedImageError:  # whose message names an object in memory
        kinds = ", ".join(sorted(set(IMAGE_FORMATS.values())))
        raise ValueError(f"expected an image file ({kinds}), got {len(data)} bytes of something else") from None


def write_image(path: Path, pixels: Array) -> None:
    """Write uint8 (H, W, C) in the format of ``path``'s suffix: JPEG at quality 95, everything else without loss."""
    name = IMAGE_FORMATS[path.suffix.lower()]
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with replacing(path) as file:
        picture.save(file, format=name, **_SAVE_OPTIONS.get(name, {}))


def read_arrays(path: Path) -> dict[str, Array]:
    """The array of a ``.npy`` file under the key ``""``, or every array of a ``.npz`` file by name.

    Raises:
        ValueError: it is not what its suffix says, is damaged, holds Python objects, or holds no array at all.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(6)
    kind = ".npy" if start == np.lib.format.MAGIC_PREFIX else ".npz" if start[:2] == b"PK" else ""
    if not kind:  # numpy takes any other file for a pickle
        raise ValueError("expected a numpy file of plain numbers, got another kind; save it with numpy.save")
    if kind != path.suffix.lower():
        raise ValueError(f"expected a {path.suffix} file, got the other kind of numpy file; rename it")
    try:
        # Mapped, so that a large .npy is read slice by slice; numpy ignores the mode for .npz.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # Numpy's own words for these would be to load them with allow_pickle, which runs what code the file holds.
        if "Python objects" in str(error) or "Object arrays" in str(error):
            raise ValueError(
                "expected plain numbers, got Python objects, which are never unpickled; save them as numbers"
            ) from None
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"expected a numpy file of plain numbers, got a damaged one ({first_line}); save it again"
        ) from error
    if not arrays:
        raise ValueError("expected at least one array, got an empty .npz")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of a member that is something else
            raise ValueError(f"expected arrays alone in a .npz file, got another kind of member, {name!r}; remove it")
    return arrays


def write_arrays(path: Path, arrays: Mapping[str, Array], *, compressed: bool) -> None:
    """Write what :func:`read_arrays` gave, in the format of ``path``'s suffix."""
    with replacing(path) as file:
        if path.suffix.lower() == ".npy":
            np.lib.format.write_array(file, arrays[""], allow_pickle=False)
            return
        # Not np.savez: it takes the names as keywords, and an array may be called "file".
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def is_compressed(path: Path) -> bool:
    """Whether a ``.npz`` file has deflated members, as ``numpy.savez_compressed`` writes them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
