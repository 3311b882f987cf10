"""How long a fresh process takes to import the library, and from its start to the first purified image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.conftest import Measure, Record
from defense_vae_fast.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
_IMPORT = """
import json, sys, time
start = time.perf_counter()
import defense_vae_fast
print(json.dumps({"seconds": time.perf_counter() - start, "torch": "torch" in sys.modules}))
"""
_FIRST_IMAGE = """
import json, sys
import numpy as np
from defense_vae_fast import Purifier
purifier = Purifier.from_pretrained(sys.argv[1])
side, channels = purifier.config.image_size, purifier.config.channels
clean = purifier(np.full((side, side, channels), 128, np.uint8))
print(json.dumps({"shape": clean.shape, "torch": "torch" in sys.modules}), flush=True)
"""


class Child:
    """A fresh Python process that prints one line."""

    def __init__(self, code: str, *arguments: str) -> None:
        self._command = [sys.executable, "-c", code, *arguments]
        # An installed library has its bytecode compiled; so has this one from the warm-up round on.
        self._environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        self._running: subprocess.Popen[str] | None = None

    def line(self) -> str:
        """Start the process and return as soon as its line is there."""
        self._running = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=self._environment
        )
        assert self._running.stdout is not None
        return self._running.stdout.readline()

    def finish(self) -> None:
        """Wait for its end, which is not part of what is timed."""
        assert self._running is not None
        assert self._running.stdout is not None
        self._running.stdout.close()
        assert self._running.wait() == 0


def test_import(quick: bool, measure: Measure, record: Record) -> None:
    child, seconds = Child(_IMPORT), []

    def start() -> str:
        line = child.line()
        seconds.append(json.loads(line)["seconds"])
        return line

    line = measure("start-up", start, teardown=child.finish, rounds=2 if quick else 9, warmup_rounds=1)
    assert json.loads(line)["torch"] is False
    record("startup", "import defense_vae_fast", seconds=seconds[1:])


def test_first_image(
    quick: bool, checkpoint_name: str, checkpoint: Checkpoint, measure: Measure, record: Record
) -> None:
    child = Child(_FIRST_IMAGE, checkpoint_name)
    line = measure("start-up", child.line, teardown=child.finish, rounds=2 if quick else 7, warmup_rounds=1)
    side, channels = checkpoint.config.image_size, checkpoint.config.channels
    assert json.loads(line) == {"shape": [side, side, channels], "torch": False}
    record("startup", "process start to first purified image")
