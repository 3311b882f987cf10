"""A process of its own for what is timed in plain torch: the released module, Defense-GAN's search, matrix products.

The measuring process can then run the OpenVINO engine with torch not even imported, and the C library's allocator can
be set for one contestant without touching the others. Commands and answers are lines of JSON on standard input and
output; the times are the worker's own, so the pipe is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

# glibc hands freed memory of this size back to the kernel, and a fresh activation is then page-faulted in at every
# call, up to half of the released module's time. These settings, read at process start, keep the memory: everything
# comes from the heap, which is never trimmed. (MALLOC_MMAP_THRESHOLD_ has a limit of 32 MiB, less than one activation
# at batch 256, so raising it is not enough.) C libraries other than glibc ignore them.
WARM_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
MATMUL_SIZE = 2048


class Worker:
    """Handle on the process; use as a context manager.

    Args:
        checkpoint: name or path of the purifier.
        warm: keep freed memory (:data:`WARM_ALLOCATOR`) instead of starting as a program normally does.
    """

    def __init__(self, checkpoint: str, *, warm: bool) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", checkpoint],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**clean, **(WARM_ALLOCATOR if warm else {})}, cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run one command and wait for its answer.

        Raises:
            RuntimeError: the worker has died; its own message is on standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the benchmark's worker ended with code {self._process.wait()} during {command!r}")
        decoded: dict[str, Any] = json.loads(answer)
        return decoded

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        # Waited for, so that its CPU time counts as our own when the machine's other users are looked for.
        self._process.wait(timeout=60)


class _Commands:
    """What the worker can do; torch is imported here, in the child."""

    def __init__(self, checkpoint: str) -> None:
        import torch

        from defense_vae_fast.checkpoint import load_checkpoint
        from defense_vae_fast.nn.model import DefenseVAE

        self._torch = torch
        self._make: Callable[[], DefenseVAE] = lambda: DefenseVAE.from_checkpoint(load_checkpoint(checkpoint))
        self._released = self._make()
        self._inputs: dict[int, Any] = {}
        self._turn = 0
        self._last: tuple[Any, Any]

    def devices(self) -> dict[str, Any]:
        """Devices that torch can use here."""
        return {"devices": ["cpu", *(["cuda"] if self._torch.cuda.is_available() else [])]}

    def released(self, batch: int, device: str) -> dict[str, Any]:
        """One pass of the module as the authors released it: eager, fp32, NCHW, BatchNorm unfolded, both heads."""
        images = self._images(batch)
        self._turn += 1
        given = images[self._turn % len(images)]
        model = self._released.to(device)
        with self._torch.inference_mode():
            start = self._now(device)
            output = model(given.to(device))
            purified = self._torch.sigmoid(output.logits).cpu()  # as the engines do: from and to host memory
            seconds = self._now(device) - start
        self._last = (given, purified)
        shapes = [list(tensor.shape) for tensor in (purified, output.mu, output.logvar)]
        return {"seconds": seconds, "shapes": shapes}

    def released_check(self) -> dict[str, Any]:
        """RMS error of the last timed pass against float64, and the spread of the pixels that it is an error of."""
        given, purified = self._last
        with self._torch.inference_mode():
            exact = self._make().double().purify(given.double())
        error = float((purified.double() - exact).square().mean().sqrt())
        return {"error": error, "spread": float(exact.std())}

    def reference(self, batch: int, index: int, precision: str, path: str) -> dict[str, Any]:
        """Write the float64 output for one input to ``path`` (.npy); RMS error of the plain module in ``precision``."""
        import numpy as np

        dtype = self._dtype(precision)
        given = self._images(batch)[index]
        with self._torch.inference_mode():
            exact = self._make().double().purify(given.double())
            plain = self._make().to(dtype).purify(given.to(dtype))
        np.save(path, exact.numpy())
        return {"error": float((plain.double() - exact).square().mean().sqrt())}

    def search(self, steps: int, restarts: int, images: int, device: str) -> dict[str, Any]:
        """Defense-GAN's search, eager fp32, for images that its (random) generator can make."""
        from training.baselines.defense_gan import LATENT_DIM, Generator, reconstruct

        generator = Generator(seed=0).eval().requires_grad_(False).to(device)
        with self._torch.inference_mode():
            latents = self._torch.randn(images, LATENT_DIM, generator=self._torch.Generator().manual_seed(1))
            targets = generator(latents.to(device))
        targets = targets.clone()  # an inference tensor may not take part in the search's gradients
        start = self._now(device)
        found = reconstruct(generator, targets, steps, restarts)
        seconds = self._now(device) - start
        before = reconstruct(generator, targets, 0, restarts)
        return {"seconds": seconds, "before": before.errors.tolist(), "after": found.errors.tolist()}

    def matmul(self, precision: str, device: str) -> dict[str, Any]:
        """One product of two square matrices, the yardstick of what the machine can do."""
        torch, size = self._torch, MATMUL_SIZE * (1 if device == "cpu" else 4)
        dtype = self._dtype(precision)
        rng = torch.Generator().manual_seed(0)
        left, right = (torch.rand(size, size, generator=rng).to(device, dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype, device=device)
        times = []
        for _ in range(3):  # the best of three: a yardstick is what the machine can do at its best
            start = self._now(device)
            torch.mm(left, right, out=out)
            times.append(self._now(device) - start)
        expected = left[:1].double() @ right.double()
        error = float(((out[:1].double() - expected).abs() / expected).max())
        return {"seconds": min(times), "flop": 2 * size**3, "relative_error": error}

    def _now(self, device: str) -> float:
        """The time, once everything that was asked of the device is done."""
        if device != "cpu":
            self._torch.cuda.synchronize()
        return time.perf_counter()

    def _images(self, batch: int) -> Any:
        from bench.inputs import batches

        if batch not in self._inputs:
            given = batches(batch, self._released.config.image_shape, "float32")
            self._inputs[batch] = [self._torch.from_numpy(images) for images in given]
        return self._inputs[batch]

    def _dtype(self, precision: str) -> Any:
        return {"fp32": self._torch.float32, "bf16": self._torch.bfloat16, "fp16": self._torch.float16}[precision]


def main() -> None:
    """Answer commands until standard input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint")
    commands = _Commands(parser.parse_args().checkpoint)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(commands, request.pop("command"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
