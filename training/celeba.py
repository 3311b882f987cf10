"""CelebA as its authors give it, with the gender as the label, as in the paper.

Its licence allows non-commercial research alone and it has to be fetched by hand: ``img_align_celeba/*.jpg`` (178x218),
``list_attr_celeba.txt`` and ``list_eval_partition.txt`` in one folder. The middle 178x178 pixels are reduced to 64x64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from training.data import Dataset, Split
from training.progress import bar

IMAGES, ATTRIBUTES, PARTITION = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
CELEBA_FILES = (IMAGES, ATTRIBUTES, PARTITION)
SIDE = 64
LABEL = "Male"
CLASS_NAMES = ("female", "male")


def load_celeba(folder: Path) -> Dataset:
    """Read CelebA with its official split into training, validation and test images.

    Raises:
        ValueError: a list is not in CelebA's format, the two lists or the images do not fit together, or a split is
            empty.
    """
    labels = read_attribute(folder / ATTRIBUTES, LABEL)
    parts: dict[str, list[str]] = {"0": [], "1": [], "2": []}
    for number, line in enumerate((folder / PARTITION).read_text().splitlines(), 1):
        name, _, part = line.strip().partition(" ")
        if part.strip() not in parts or name not in labels:
            raise ValueError(
                f"{folder / PARTITION}, line {number}: expected a file of {ATTRIBUTES} and 0, 1 or 2, got {line!r}"
            )
        parts[part.strip()].append(name)
    if empty := [part for part, names in parts.items() if not names]:
        raise ValueError(
            f"{folder / PARTITION}: expected images in the parts 0, 1 and 2, got none in {', '.join(empty)}"
        )
    train, validation, test = (_read(folder / IMAGES, names, labels) for names in parts.values())
    return Dataset("celeba", train, validation, test, CLASS_NAMES)


def read_attribute(path: Path, attribute: str) -> dict[str, int]:
    """1 or 0 for every image by its file name: whether it has the attribute.

    The file's first line is the number of images, the second the attributes' names; then a line an image: its name, and
    1 or -1 for every attribute.

    Raises:
        ValueError: the file has another format.
    """
    lines = path.read_text().splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    if attribute not in names or not lines[0].strip().isdigit() or int(lines[0]) != len(lines) - 2:
        raise ValueError(
            f"{path}: expected CelebA's list (the number of images, the names of the attributes with {attribute} among "
            f"them, a line for every image), got {len(lines)} lines that begin with {' / '.join(lines[:2])[:60]!r}"
        )
    column = names.index(attribute)
    found = {}
    for number, line in enumerate(lines[2:], 3):
        name, *values = line.split()
        if len(values) != len(names) or values[column] not in ("1", "-1"):
            raise ValueError(f"{path}, line {number}: expected {len(names)} values of 1 or -1, got {line[:60]!r}")
        found[name] = int(values[column] == "1")
    return found


def _read(folder: Path, names: list[str], labels: dict[str, int]) -> Split:
    images = torch.empty(len(names), 3, SIDE, SIDE, dtype=torch.uint8)
    with bar("CelebA", len(names)) as progress:
        for row, name in enumerate(names):
            images[row] = torch.from_numpy(_read_face(folder / name)).permute(2, 0, 1)
            progress.update(1, images=1)
    return Split(images, torch.tensor([labels[name] for name in names]))


def _read_face(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 (64, 64, 3): the middle square, reduced."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            face = image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); remove or replace it") from error
    width, height = face.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = face.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels: npt.NDArray[np.uint8] = np.array(square, np.uint8)
    return pixels
