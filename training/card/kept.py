"""A card's part for one classifier, kept in a folder: it takes up to an hour, and an interrupted card goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from defense_vae_fast.atomic import replacing

Section = tuple[dict[str, Any], list[Tensor]]


def kept_section(folder: Path | None, about: Mapping[str, Any], make: Callable[[], Section]) -> Section:
    """What ``make`` gives, taken from ``folder`` where it was made before.

    Args:
        folder: where sections are kept; None keeps nothing.
        about: everything that decides the section, as JSON can hold it.
        make: gives numbers and rows of uint8 pictures.

    Raises:
        ValueError: what is kept is damaged.
    """
    if folder is None:
        return make()
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = folder / f"section-{digest}.safetensors"
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                section = dict(json.loads(file.metadata()["section"]))
                return section, [file.get_tensor(name) for name in sorted(file.keys())]
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path}: expected a card's section kept by an earlier run; remove the file") from error
    section, pictures = make()
    folder.mkdir(parents=True, exist_ok=True)
    rows = {f"{place:03}": row.cpu().contiguous() for place, row in enumerate(pictures)}
    with replacing(path) as file:
        file.write(save(rows, {"section": json.dumps(section)}))
    return section, pictures
