"""What resizing and tiling cost in accuracy: ``python -m bench.regions``.

The packaged Fashion-MNIST test images, clean and attacked (oblivious attacks on the bare classifier), as they would
appear in a camera's frame: enlarged by a factor and cut out by a box, or side by side in a frame that is purified in
tiles, which do not know where one image ends and the next begins.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from defense_vae_fast import Purifier
from defense_vae_fast.demo import TITLES, load_classifier, load_samples
from defense_vae_fast.regions import METHODS, Method, resize

Array = npt.NDArray[Any]
FACTORS = (0.5, 0.75, 1.5, 2, 4, 10)
GROW: dict[bool, Method] = {True: "bilinear", False: "area"}  # how a camera is imitated
COLUMNS = 25  # images in a row of the frame


def rows(purifier: Purifier, images: Array) -> list[tuple[str, Array]]:
    """(what was done, uint8 (N, H, W, C) for the classifier) for every way through a frame."""
    side = purifier.config.image_size
    found = [("as they are", images), ("purified by a plain call", purifier(images))]
    for factor in FACTORS:
        large = round(side * factor)
        for method in METHODS:
            frame = mosaic(np.stack([resize(image, (large, large), GROW[factor > 1]) for image in images]))
            purified = purifier.regions(frame, boxes(len(images), large), resize=method).images
            found.append((f"in the frame {factor:g} times as large, box by {method}", purified))
    frame = mosaic(images)
    overlaps = (0, side // 4, side // 2)
    tiled_frames = ((overlap, purifier.tiles(frame, overlap=overlap).frame) for overlap in overlaps)
    found += [(f"tiles, overlap {overlap}", cut(tiled, len(images), side)) for overlap, tiled in tiled_frames]
    shifted = np.pad(frame, ((side // 2, 0), (side // 2, 0), (0, 0)))
    tiled = purifier.tiles(shifted).frame[side // 2 :, side // 2 :]
    found.append(("tiles, overlap a quarter, half a tile off", cut(tiled, len(images), side)))
    return found


def mosaic(images: Array) -> Array:
    """(N, H, W, C) side by side, ``COLUMNS`` in a row."""
    lines = [np.concatenate(list(images[first : first + COLUMNS]), axis=1) for first in range(0, len(images), COLUMNS)]
    return np.concatenate(lines)


def boxes(count: int, side: int) -> list[list[int]]:
    """Where the images of a mosaic are, as a detector would say it."""
    places = [divmod(index, COLUMNS) for index in range(count)]
    return [[x * side, y * side, (x + 1) * side, (y + 1) * side] for y, x in places]


def cut(frame: Array, count: int, side: int) -> Array:
    """The images of a mosaic again."""
    return np.stack([frame[top:bottom, left:right] for left, top, right, bottom in boxes(count, side)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="how many, a multiple of 25 up to 500")
    count = parser.parse_args().images
    if count % COLUMNS or not 0 < count <= 500:
        parser.error(f"--images: expected a multiple of {COLUMNS} up to 500, got {count}")
    samples, classify = load_samples("fashion_mnist"), load_classifier("fashion_mnist")
    with Purifier.from_pretrained("fashion_mnist") as purifier:
        measured = {key: rows(purifier, samples.images[key][:count]) for key in TITLES}

    def accuracy(images: Array) -> float:
        return 100 * float((classify(images) == samples.labels[:count]).mean())

    table = Table(title=f"accuracy in %, {count} test images")
    for heading in ("way", *TITLES.values()):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for index, (name, _) in enumerate(measured["clean"]):
        table.add_row(name, *(f"{accuracy(measured[key][index][1]):.1f}" for key in TITLES))
    Console().print(table)


if __name__ == "__main__":
    main()
