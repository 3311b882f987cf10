"""A training that is done once, however often it is asked for or cut off, and the time that it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from defense_vae_fast.atomic import replacing
from training.fit import STATE_FILE

FINISHED_FILE = "finished.json"


class Stopped(RuntimeError):
    """Ctrl-C came during a training; the same command goes on from there."""


def train_once(folder: Path, settings: dict[str, Any], train: Callable[[bool], bool]) -> float:
    """Train unless that is done, and return the seconds that it took in all.

    Args:
        folder: of the run.
        settings: what decides the result; what is kept must have been made with the same.
        train: trains, given whether to resume, and returns whether it came to the end.

    Raises:
        Stopped: it did not.
        ValueError: the folder's result was made with other settings.
    """
    path, state = folder / FINISHED_FILE, folder / STATE_FILE
    settings = json.loads(json.dumps(settings))
    before = 0.0
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            differing = [
                key for key in {**settings, **found["settings"]} if found["settings"].get(key) != settings.get(key)
            ]
            raise ValueError(
                f"{folder}: was made with another {', '.join(differing)}; remove the folder, or name other --runs"
            )
        if found["finished"]:
            return float(found["seconds"])
        before = float(found["seconds"])
        if "since" in found and state.exists():
            # That run was cut off. What it did up to the state that it left counts; the rest is done again.
            before += max(0.0, state.stat().st_mtime - found["since"])

    def keep(finished: bool, seconds: float, **more: float) -> None:
        content = {"finished": finished, "seconds": round(seconds, 2), "settings": settings, **more}
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(content).encode())

    keep(False, before, since=time.time())
    start = time.monotonic()
    finished = train(state.exists())
    seconds = round(before + time.monotonic() - start, 2)
    keep(finished, seconds)
    if not finished:
        raise Stopped(f"{folder}: stopped early; the same command goes on from there")
    return seconds
