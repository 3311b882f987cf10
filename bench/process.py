"""Commands with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_limited(
    command: Sequence[str], seconds: float, *, cwd: Path = ROOT, grace: float = 0.0
) -> tuple[int, str, bool]:
    """Run a command in the checkout; after ``seconds`` it is stopped, with everything that it has started.

    Args:
        command: what to run.
        seconds: how long it may take.
        cwd: where it runs; it comes first on its PYTHONPATH, too.
        grace: seconds between an interrupt and the end, for a program that saves itself; 0 for no interrupt.

    Returns:
        Exit code, what it printed, and whether it was stopped.
    """
    path = os.pathsep.join(filter(None, (str(cwd), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": path},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output, False
    except subprocess.TimeoutExpired:
        pass
    if grace:
        _tell(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=grace)
            return process.returncode, output, True
    _tell(process, signal.SIGKILL)
    output, _ = process.communicate()
    return process.returncode, output, True


def _tell(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
