"""A detector's boxes by frame, read from JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from defense_vae_fast.regions import check_boxes


class BoxesError(ValueError):
    """A file of boxes is not as it should be; the message names the line."""


class Boxes:
    """Boxes by frame.

    Each line is ``{"frame": n, "boxes": [[left, top, right, bottom], ...]}``: n counts decoded frames from 0, boxes
    are in pixels of the upright frame. Without ``frame`` they hold for every frame that has no line of its own. Other
    keys are passed over, and so are empty lines.

    Raises:
        BoxesError: a line is not as above, or two are for one frame; the message has its number.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._frames: dict[int | None, tuple[int, list[list[float]]]] = {}
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    frame, boxes = self._parse(number, line)
                    if frame in self._frames:
                        raise self._error(
                            number, f"expected one line a frame, got a second one for frame {frame} "
                            f"after line {self._frames[frame][0]}; put its boxes into one"
                        )  # fmt: skip
                    self._frames[frame] = number, boxes

    def of(self, frame: int) -> list[list[float]]:
        """The boxes of a frame."""
        found = self._frames.get(frame) or self._frames.get(None)
        return found[1] if found else []

    def check(self, height: int, width: int) -> None:
        """Check that every box has a pixel in frames of this size.

        Raises:
            BoxesError: one does not.
        """
        for number, boxes in self._frames.values():
            try:
                check_boxes(boxes, (height, width))
            except ValueError as error:  # noqa: PERF203 - each line has its own
                raise self._error(number, str(error)) from error

    def beyond(self, frames: int) -> int:
        """How many lines are for frames from ``frames`` on."""
        return sum(frame is not None and frame >= frames for frame in self._frames)

    def _parse(self, number: int, line: bytes) -> tuple[int | None, list[list[float]]]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._error(number, f"expected JSON, got {_short(line)} ({error}); mend it") from error
        form = '{"frame": n, "boxes": [[left, top, right, bottom], ...]}'
        if not isinstance(entry, dict) or "boxes" not in entry:
            raise self._error(number, f"expected {form}, got {_short(line)}")
        frame, boxes = entry.get("frame"), entry["boxes"]
        if "frame" in entry and (type(frame) is not int or frame < 0):
            raise self._error(number, f"expected a frame number from 0 on, got {frame!r}")
        if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
            raise self._error(
                number, f"expected boxes of four finite numbers, left < right and top < bottom, got {_short(line)}"
            )
        return frame, boxes

    def _error(self, number: int, text: str) -> BoxesError:
        return BoxesError(f"{self.path}, line {number}: {text}")


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(type(value) in (int, float) and math.isfinite(value) for value in box):
        return False
    left, top, right, bottom = box
    return bool(left < right and top < bottom)


def _short(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
