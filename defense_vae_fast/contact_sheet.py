"""A contact sheet: the same images original, attacked and purified, with a classifier's verdict under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from defense_vae_fast.atomic import replacing
from defense_vae_fast.files import IMAGE_FORMATS

ROWS = ("original", "attacked", "purified")

_TILE = 112  # 28 pixels four times, so that no pixel is blended with another
_GAP = 13
_GROUP_GAP = 24
_MARGIN = 130  # room for the row labels
_HEADER = 96
_VERDICT = 28
_FOOTER = 40
_BORDER = 3
_CROSS = 8
_INK, _MUTED, _PAPER = (28, 30, 33), (105, 110, 117), (255, 255, 255)
# A green and a red that people who are red-green blind tell apart; a wrong verdict carries a cross as well.
_RIGHT, _WRONG = (0, 122, 90), (200, 50, 20)


@dataclass(frozen=True)
class Cell:
    """One image and its verdict.

    Attributes:
        pixels: uint8 (H, W, C), one or three channels.
        verdict: the class that the classifier sees.
        right: whether that is the true one.
    """

    pixels: npt.NDArray[Any]
    verdict: str
    right: bool


@dataclass(frozen=True)
class Group:
    """Columns under one heading; a column has a cell for each of :data:`ROWS`."""

    title: str
    columns: Sequence[Sequence[Cell]]


def check_suffix(path: Path) -> None:
    """Raise a ``ValueError`` where :func:`write` could not tell the image format from the name."""
    if path.suffix.lower() not in IMAGE_FORMATS:
        raise ValueError(f"{path}: expected a name that ends in one of {', '.join(IMAGE_FORMATS)}, got {path.suffix!r}")


def write(path: Path, groups: Sequence[Group], *, title: str, note: str) -> None:
    """Draw the sheet and write it beside its place first, then rename it.

    Args:
        path: where it goes; the suffix says the format.
        groups: the columns.
        title: headline.
        note: small print at the foot.

    Raises:
        ValueError: the suffix is not that of an image.
    """
    check_suffix(path)
    sheet = draw(groups, title=title, note=note)
    with replacing(path) as file:
        sheet.save(file, format=IMAGE_FORMATS[path.suffix.lower()])


def draw(groups: Sequence[Group], *, title: str, note: str) -> Image.Image:
    """The sheet as an RGB image; arguments as in :func:`write`."""
    headline, body, small = (ImageFont.load_default(size) for size in (22, 17, 14))
    step = _TILE + _GAP
    columns = sum(len(group.columns) for group in groups)
    width = _MARGIN + columns * step + (len(groups) - 1) * _GROUP_GAP + _GAP
    height = _HEADER + len(ROWS) * (_TILE + _VERDICT + _GAP) + _FOOTER
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * _GAP, 14), title, _INK, headline)
    for row, name in enumerate(ROWS):
        pen.text((2 * _GAP, _top(row) + _TILE // 2), name, _INK, body, anchor="lm")
    left = _MARGIN
    for group in groups:
        right = left + len(group.columns) * step - _GAP
        pen.text(((left + right) / 2, _HEADER - 28), group.title, _INK, body, anchor="mm")
        pen.line((left - _BORDER, _HEADER - 13, right + _BORDER - 1, _HEADER - 13), _MUTED, 1)
        for column in group.columns:
            for row, cell in enumerate(column):
                _draw_cell(sheet, pen, cell, left, _top(row), small)
            left += step
        left += _GROUP_GAP
    pen.text((2 * _GAP, height - _FOOTER // 2 - 4), note, _MUTED, small, anchor="lm")
    return sheet


def _top(row: int) -> int:
    return _HEADER + row * (_TILE + _VERDICT + _GAP)


def _draw_cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, left: int, top: int, font: Any) -> None:
    color = _RIGHT if cell.right else _WRONG
    pen.rectangle((left - _BORDER, top - _BORDER, left + _TILE + _BORDER - 1, top + _TILE + _BORDER - 1), color)
    pixels = cell.pixels[:, :, 0] if cell.pixels.shape[2] == 1 else cell.pixels
    picture = Image.fromarray(np.ascontiguousarray(pixels)).resize((_TILE, _TILE), Image.Resampling.NEAREST)
    sheet.paste(picture, (left, top))
    middle = top + _TILE + _VERDICT / 2 + 2
    cross = 0 if cell.right else _CROSS + 5
    text_left = left + (_TILE - cross - pen.textlength(cell.verdict, font)) / 2 + cross
    pen.text((text_left, middle), cell.verdict, color, font, anchor="lm")
    if cross:  # drawn, because Pillow's own font has no such sign
        box = (text_left - cross, middle - _CROSS / 2, text_left - cross + _CROSS, middle + _CROSS / 2)
        pen.line(box, color, 2)
        pen.line((box[0], box[3], box[2], box[1]), color, 2)
