"""Whether TensorRT-RTX's engine runs on a GPU that it does not list: ``python -m bench.rtx_trial``.

The library refuses such a GPU. Here the refusal is lifted for one attempt: build for the GPU that is here, compare with
float32, purify. Whatever comes of it is the answer and is written down. Exit code 5 where it cannot be tried.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.report import write_json
from defense_vae_fast import Purifier, cuda
from defense_vae_fast.engines import plans
from defense_vae_fast.engines.tensorrt import TensorRTRTXEngine

NOT_TRIED = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Try, write, say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="fashion_mnist", help="name or path")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest-rtx-trial.json")
    options = parser.parse_args(arguments)
    package = TensorRTRTXEngine.package
    if reason := package.missing() or cuda.missing():
        print(f"not tried: {reason}")
        return NOT_TRIED
    here, listed = cuda.compute_capability(cuda.current_ordinal()), plans.compute_capabilities(package)
    plans.compute_capabilities = lambda _: (*listed, here)
    record: dict[str, Any] = {"machine": machine.describe(), "compute_capability": here, "listed": here in listed}
    try:
        with Purifier.from_pretrained(options.checkpoint, engine=TensorRTRTXEngine.name) as purifier:
            channels, height, width = purifier.config.image_shape
            purifier(np.zeros((64, height, width, channels), np.uint8))
            record |= {"runs": True, "engine": purifier.info()}
    except RuntimeError as error:  # what the library raises where an engine or the GPU fails
        record |= {"runs": False, "error": f"{type(error).__name__}: {error}"}
    write_json(options.out, record)
    print(f"compute capability {here}, listed: {here in listed}, runs: {record['runs']}; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
