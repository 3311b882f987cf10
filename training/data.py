"""Images and labels: IDX files, image folders, and the split that keeps the test set untouched."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defense_vae_fast.architecture import supported_image_sizes
from defense_vae_fast.atomic import replacing
from defense_vae_fast.files import IMAGE_FORMATS

VALIDATION_IMAGES = 5000
IDX_DATASETS = ("fashion_mnist", "mnist")
DATASETS = (*IDX_DATASETS, "cifar10_jpeg", "celeba")

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_DEBIAN_FOLDERS = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
# The publisher's own copy; SHA-256 of what is inside the .gz, since the same data go round in several compressions.
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    ``images`` is uint8 (N, C, H, W) in 0..255, ``labels`` int64 (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> Split:
        """The images at these positions."""
        return Split(self.images[index], self.labels[index])

    def first(self, count: int | None) -> Split:
        """The first ``count`` images; all of them where None."""
        return Split(self.images[:count], self.labels[:count])

    def mirrored(self) -> Split:
        """Twice as many: every image and its mirror image.

        The first half has every other image turned, the second half the others, so that half of any stretch is turned.
        """
        turned = self.images.flip(-1)
        odd = (torch.arange(len(self), device=self.images.device) % 2 == 1).view(-1, 1, 1, 1)
        images = torch.cat([torch.where(odd, turned, self.images), torch.where(odd, self.images, turned)])
        return Split(images, self.labels.repeat(2))


@dataclass(frozen=True)
class Dataset:
    """A data set split into training, validation (cut from the training images) and test images."""

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of every image and label: tells one data set from another of the same name."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for tensor in (split.images, split.labels):
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8 0..255, rounded to the nearest: what a camera or an image file can carry."""
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)


def load_dataset(name: str, data: Path | None = None) -> Dataset:
    """Load a data set by name, or a folder of images by its path.

    IDX files are looked for in ``data`` alone if it is given; else in ``$DEFENSE_VAE_DATA`` and where Debian's package
    puts them; in each, the sub-folder ``name`` comes first. Fashion-MNIST is downloaded when none of these has it, and
    always compared with the published digests.
    ``cifar10_jpeg`` is a copy of CIFAR-10 that went through JPEG (:mod:`training.cifar10`), ``celeba`` CelebA with the
    gender as its label (:mod:`training.celeba`); both are looked for in the same places.
    A folder holds ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``, or ``CLASS/IMAGE`` of which a tenth is the test set;
    hidden folders are left out. Images are 8-bit gray or RGB.
    The last 5,000 training images (a tenth of a small set) are held out for validation.

    Raises:
        FileNotFoundError: the data are nowhere; the message lists where was looked.
        ValueError: a file is damaged or an image has a size that no network fits.
    """
    if name == "celeba":
        from training.celeba import CELEBA_FILES, load_celeba

        return load_celeba(_find_files(name, CELEBA_FILES, data))
    if name == "cifar10_jpeg":
        from training.cifar10 import CIFAR10_FILE, read_cifar10

        train, test, names = read_cifar10(_find_files(name, (CIFAR10_FILE,), data) / CIFAR10_FILE)
    elif name in IDX_DATASETS:
        folder = _find_idx(name, data)
        if name == "fashion_mnist":
            _check_fashion_mnist(folder)
        train, test = (_read_split(folder, part) for part in ("train", "test"))
        names = _FASHION_MNIST_CLASSES if name == "fashion_mnist" else tuple(map(str, range(10)))
    else:
        if data is not None:
            raise ValueError(
                f"data: expected none for a folder of images, got {data}; the folder {name} is the data set"
            )
        train, test, names = _read_image_folder(Path(name))
    held_out = min(VALIDATION_IMAGES, len(train) // 10)
    if not held_out or not len(test):
        raise ValueError(
            f"{name}: expected 10 or more training images and a test image, got {len(train)} and {len(test)}"
        )
    cut = len(train) - held_out
    return Dataset(
        name=name if name in DATASETS else _folder_name(Path(name)),
        train=train.first(cut),
        validation=Split(train.images[cut:], train.labels[cut:]),
        test=test,
        class_names=names,
    )


_FASHION_MNIST_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, gzip-compressed or not.

    Raises:
        ValueError: it is not such a file, or it is cut short.
    """
    raw = _unpacked(path)
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes, got the first bytes {raw[:4].hex()}")
    rank = raw[3]
    header = 4 + 4 * rank
    if len(raw) < header:
        raise ValueError(f"{path}: the IDX header is cut short; fetch the file again")
    shape = struct.unpack(f">{rank}I", raw[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - header != expected:
        raise ValueError(f"{path}: expected {expected} bytes of data for shape {shape}, got {len(raw) - header}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _unpacked(path: Path) -> bytes:
    """A file's bytes, decompressed if they are gzip's."""
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip data ({error}); fetch the file again") from error


def _check_fashion_mnist(folder: Path) -> None:
    """Any four IDX files of 28x28 images would do, and give figures that mean nothing."""
    for stem, digest in _FASHION_MNIST_SHA256.items():
        path = _idx_path(folder, stem)
        if hashlib.sha256(_unpacked(path)).hexdigest() != digest:
            raise ValueError(
                f"{path}: expected Fashion-MNIST as published, got other contents; name another --data folder"
            )


def _folder_name(folder: Path) -> str:
    """A folder's own name, marked where it is also that of a built-in data set, whose classifiers it must not get."""
    name = folder.resolve().name
    return f"{name}-folder" if name in DATASETS else name


def _read_split(folder: Path, part: str) -> Split:
    images_name, labels_name = _IDX_FILES[part]
    images = read_idx(_idx_path(folder, images_name))
    labels = read_idx(_idx_path(folder, labels_name))
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
    return Split(torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _idx_path(folder: Path, stem: str) -> Path:
    plain = folder / stem
    return plain if plain.exists() else folder / f"{stem}.gz"


def _places(name: str, data: Path | None) -> list[Path]:
    """Folders in which a data set is looked for, in this order."""
    if data is not None:
        return [data / name, data]
    root = os.environ.get("DEFENSE_VAE_DATA")
    places = [Path(root) / name, Path(root)] if root else []
    return places + ([_DEBIAN_FOLDERS[name]] if name in _DEBIAN_FOLDERS else [])


def _find_files(name: str, files: tuple[str, ...], data: Path | None) -> Path:
    """The folder that holds all of a data set's files.

    Raises:
        FileNotFoundError: there is none; the message lists where was looked.
    """
    places = _places(name, data)
    for place in places:
        if all((place / file).exists() for file in files):
            return place
    raise FileNotFoundError(
        f"{name}: expected {', '.join(files)}, looked in {', '.join(map(str, places)) or 'no folder'}; "
        "name their folder with --data DIR or $DEFENSE_VAE_DATA"
    )


def _find_idx(name: str, data: Path | None) -> Path:
    places = _places(name, data)
    for place in places:
        if all(_idx_path(place, stem).exists() for stems in _IDX_FILES.values() for stem in stems):
            return place
    looked = ", ".join(map(str, places)) or "no folder"
    if name != "fashion_mnist" or data is not None:
        raise FileNotFoundError(
            f"{name}: expected the four IDX files ({_IDX_FILES['train'][0]}[.gz], ...), looked in {looked}; "
            "name their folder with --data DIR or $DEFENSE_VAE_DATA"
        )
    return _download_fashion_mnist(looked)


def _download_fashion_mnist(looked: str) -> Path:
    import pooch

    folder = Path(pooch.os_cache("defense-vae-fast")) / "fashion_mnist"
    try:
        for stem, digest in _FASHION_MNIST_SHA256.items():
            target = folder / stem
            if not target.exists():
                packed = pooch.retrieve(f"{_FASHION_MNIST_URL}{stem}.gz", None, f"{stem}.gz", folder, progressbar=False)
                raw = gzip.decompress(Path(packed).read_bytes())
                if hashlib.sha256(raw).hexdigest() != digest:
                    Path(packed).unlink()
                    raise ValueError(f"{stem}.gz came with other contents than published")
                with replacing(target) as file:
                    file.write(raw)
    except (OSError, EOFError, ValueError) as error:
        raise FileNotFoundError(
            f"fashion_mnist: not in {looked}, and the download failed ({error}); "
            "name a folder that holds the four IDX files with --data DIR or $DEFENSE_VAE_DATA"
        ) from error
    return folder


def _read_image_folder(root: Path) -> tuple[Split, Split, tuple[str, ...]]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: expected one of {', '.join(DATASETS)} or a folder of images, one sub-folder a class"
        )
    has_parts = (root / "train").is_dir() and (root / "test").is_dir()
    base = root / "train" if has_parts else root
    names = _class_names(base)
    if len(names) < 2:
        raise ValueError(f"{base}: expected at least two class folders, got {len(names)}")
    if has_parts:
        if unknown := sorted(set(_class_names(root / "test")) - set(names)):
            raise ValueError(f"{root / 'test'}: expected the classes of {base}, got also {', '.join(unknown)}")
        return _read_classes(base, names), _read_classes(root / "test", names), names
    everything = _read_classes(base, names)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 10], order[len(order) // 10 :]
    return everything.take(train), everything.take(test), names


def _class_names(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _read_classes(root: Path, names: tuple[str, ...]) -> Split:
    images, labels = [], []
    for label, name in enumerate(names):
        paths = [path for path in sorted((root / name).rglob("*")) if path.suffix.lower() in IMAGE_FORMATS]
        if not paths:
            kinds = ", ".join(IMAGE_FORMATS)
            raise ValueError(f"{root / name}: expected images of this class ({kinds}), got none; remove the folder")
        images += [read_pixels(path) for path in paths]
        labels += [label] * len(paths)
    shapes = {image.shape for image in images}
    height, width, _ = next(iter(shapes))
    if len(shapes) != 1 or height != width or height not in supported_image_sizes():
        sizes = ", ".join(map(str, supported_image_sizes()))
        raise ValueError(
            f"{root}: expected square images of one side ({sizes}) and one number of channels, "
            f"got {sorted(shapes)[:4]}; resize or crop them first"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(stacked, torch.tensor(labels)).take(order)


def read_pixels(path: Path | IO[bytes], name: str | None = None) -> npt.NDArray[np.uint8]:
    """One image as uint8 (H, W, C), turned upright; ``name`` is for messages."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=tuple(sorted(set(IMAGE_FORMATS.values())))) as image:
            mode = image.mode
            pixels = np.asarray(ImageOps.exif_transpose(image))
    except Exception as error:  # damage shows in many ways, SyntaxError among them
        raise ValueError(f"{name or path}: not a readable image ({error}); remove or replace it") from error
    if mode not in ("L", "RGB"):
        raise ValueError(
            f"{name or path}: expected 8-bit gray (L) or RGB, got Pillow mode {mode}; convert the image first"
        )
    return pixels if pixels.ndim == 3 else pixels[..., None]
