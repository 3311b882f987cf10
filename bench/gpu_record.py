"""The whole GPU record: ``python -m bench.gpu_record [--only STEP ...] [--within SECONDS] [--scale S] [--out DIR]``.

    acceptance  every GPU test and benchmark (bench/gpu_acceptance.py)
    pycuda      PyCUDA built here, if it is not installed
    rtx         whether TensorRT-RTX runs here, listed or not, if it is installed
    memcheck    the GPU tests of the csrc kernels under compute-sanitizer
    racecheck   the same for races in shared memory
    endurance   a million purifications on every engine that works here: same bytes, no growth
    accuracy    the shipped purifier's accuracy in fp16 beside float32, on the test set's images
    checkpoint  training at full scale: fresh attacks against all seven classifiers, then the polish
    tables      the paper's tables at its own scale, three seeds, or at the scale that ``--scale`` names

Steps run in this order, each in a process of its own with a time limit; a step that fails does not stop the others, and
``record.json`` is written after each. Training and tables go on where an earlier call stopped: give them more calls.
On a GPU that is lent for so many minutes, ``--within`` ends all in time: a step gets what is left, one that can go on
later saves itself first, and for what does not begin the record says so.
Exit codes: 0 all that ran passed; 1 something failed; 2 there is no GPU, and nothing ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.process import ROOT, run_limited
from bench.report import write_json
from defense_vae_fast import cuda
from training.experiments.scale import SCALES

PYTHON = sys.executable
OK, FAILED, NOTHING = 0, 1, 2
NOTHING_TO_DO = 5  # exit code of pytest without tests, and of a trial whose engine cannot work here
GRACE_SECONDS = 60.0  # after an interrupt, for a training to save itself
SHORTEST = 30.0  # seconds; no step begins with less left


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: several commands may share one; they run one after the other.
        command: what to run.
        seconds: after which it is interrupted, and soon after killed.
        needs: a program without which it is skipped.
        resumes: an interrupt at the limit is no failure: the next call goes on.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: str | None = None
    resumes: bool = False


def steps(out: Path, scale: str = "paper") -> list[Step]:
    """All of them, in order; ``scale`` is that of the tables."""
    training = (PYTHON, "-m", "training")
    files = ("tests/test_gpu.py", "tests/test_region_kernels.py")
    kernels = (PYTHON, "-m", "pytest", "-q", "-m", "gpu", *files, "-k", "kernels or frames")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool")
    found = [Step("acceptance", (PYTHON, "bench/gpu_acceptance.py", "--out", str(out / "gpu_acceptance.json")), 560)]
    if importlib.util.find_spec("pycuda") is None:
        found.insert(0, Step("pycuda", (PYTHON, "-m", "pip", "install", "pycuda>=2024.1"), 400))
    found += [
        Step("rtx", (PYTHON, "-m", "bench.rtx_trial", "--out", str(out / "rtx_trial.json")), 300),
        Step("memcheck", (*sanitizer, "memcheck", *kernels), 400, "compute-sanitizer"),
        Step("racecheck", (*sanitizer, "racecheck", *kernels), 400, "compute-sanitizer"),
    ]
    for engine in ("tensorrt", "tensorrt-rtx", "torch"):
        words = ("--engine", engine, "--device", "cuda", "--out", str(out / f"endurance-{engine}.json"))
        found.append(Step("endurance", (PYTHON, "-m", "bench.endurance", *words), 300))
    found.append(
        Step(
            "accuracy",
            (*training, "evaluate", "fashion_mnist", "--engine-precision", "fp16", "--json",
             str(out / "accuracy_fp16.json")),
            500,
        )
    )  # fmt: skip
    for dataset in ("fashion_mnist", "mnist"):
        first, second = out / f"{dataset}-pooled", out / f"{dataset}-polish"
        begun = (first / "state.safetensors").exists(), (second / "state.safetensors").exists()
        found += [
            Step("checkpoint", (*training, "fit", dataset, "--preset", "pooled", "--out", str(first),
                                *(["--resume"] if begun[0] else [])), 1800, resumes=True),
            Step("checkpoint", (*training, "fit", dataset, "--preset", "polish", "--init",
                                str(first / "checkpoint.safetensors"), "--out", str(second),
                                *(["--resume"] if begun[1] else [])), 1800, resumes=True),
        ]  # fmt: skip
    # A training alone leaves most of a GPU idle: a process for each core but two.
    jobs = str(max(1, (os.cpu_count() or 1) - 2))
    tables = (*training, "table", "1", "2", "3", "7", "8", "4", "--scale", scale, "--jobs", jobs)
    found.append(Step("tables", tables, 7200, resumes=True))
    return found


def run(step: Step, left: float = math.inf) -> dict[str, Any]:
    """Run a step in at most the ``left`` seconds; its outcome, exit code, seconds and the end of what it printed."""
    if step.needs and not shutil.which(step.needs):
        return {"outcome": "skipped", "reason": f"{step.needs} is not installed"}
    limit = min(step.seconds, left - GRACE_SECONDS)
    if limit < min(SHORTEST, step.seconds):
        return {"outcome": "not begun", "reason": f"{max(0.0, left):.0f} s were left"}
    start = time.monotonic()
    code, output, stopped = run_limited(step.command, limit, grace=GRACE_SECONDS)
    if stopped:
        outcome = "to be continued" if step.resumes else f"stopped after {limit:.0f} s"
    else:
        outcome = {0: "passed", NOTHING_TO_DO: "skipped"}.get(code, "failed")
    return {
        "outcome": outcome, "exit_code": code, "seconds": round(time.monotonic() - start, 1),
        "output": output[-4000:],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(step.name for step in steps(Path())))
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help="these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS", help="end all in so many seconds")
    parser.add_argument("--scale", choices=list(SCALES), default="paper", help="of the tables")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    out: Path = options.out.resolve()
    chosen = [step for step in steps(out, options.scale) if not options.only or step.name in options.only]
    if not cuda.has_device():
        print("there is no GPU here, so nothing was measured; this is what would run:")
        for step in chosen:
            print(f"  {step.name}: {' '.join(step.command)}")
        return NOTHING
    out.mkdir(parents=True, exist_ok=True)
    path = out / "record.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    record["machine"], record["gpus"] = machine.describe(), [device._asdict() for device in cuda.devices()]
    outcomes = []
    for step in chosen:
        found = run(step, options.within - (time.monotonic() - start))
        outcomes.append(found["outcome"])
        record["steps"][" ".join(step.command[1:])] = {"step": step.name, **found}
        write_json(path, record)
        print(f"{step.name}: {found['outcome']}")
    print(f"written to {path}")
    return OK if {*outcomes} <= {"passed", "skipped", "to be continued", "not begun"} else FAILED


if __name__ == "__main__":
    sys.exit(main())
