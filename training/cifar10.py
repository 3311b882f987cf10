"""CIFAR-10 from a zip of JPEG files: a copy whose pixels are not the original ones.

Every report calls it "CIFAR-10 (JPEG copy)". JPEG smooths fine detail, so accuracies on it are not those on CIFAR-10.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import torch

from training.data import Split, read_pixels

CIFAR10_FILE = "cifar10_jpeg.zip"
SIDE = 32


def read_cifar10(path: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test images and class names from a zip that holds ``{train,test}/{class}/{0000}.jpg``.

    The classes are in alphabetical order, which is CIFAR-10's own; each split's images are in a seeded random order.

    Raises:
        ValueError: the file is no such zip, or an image in it is damaged or not 32x32 RGB.
    """
    images: dict[str, list[npt.NDArray[np.uint8]]] = {"train": [], "test": []}
    labels: dict[str, list[str]] = {"train": [], "test": []}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                parts = PurePosixPath(name).parts
                if len(parts) != 3 or parts[0] not in images or not name.endswith(".jpg"):
                    continue
                with archive.open(name) as file:
                    pixels = read_pixels(file, f"{path}: {name}")
                if pixels.shape != (SIDE, SIDE, 3):
                    raise ValueError(f"{path}: {name}: expected {SIDE}x{SIDE} RGB, got {pixels.shape}")
                images[parts[0]].append(pixels)
                labels[parts[0]].append(parts[1])
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: damaged zip ({error}); fetch the file again") from error
    names = tuple(sorted(set(labels["train"])))
    if len(names) < 2 or set(labels["test"]) != set(names):
        raise ValueError(
            f"{path}: expected train/CLASS/NUMBER.jpg and test/CLASS/NUMBER.jpg with the same two or more classes, "
            f"got {len(names)} in train and {len(set(labels['test']))} in test"
        )
    return _split(images["train"], labels["train"], names), _split(images["test"], labels["test"], names), names


def _split(images: list[npt.NDArray[np.uint8]], labels: list[str], names: tuple[str, ...]) -> Split:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.tensor([names.index(label) for label in labels])).take(order)
