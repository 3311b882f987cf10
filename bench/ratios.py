"""``python -m bench.ratios``: int8 against bf16 and against the authors' module, by turns in one run.

What slows the machine for a while slows all contestants alike, so each round's ratios are taken first and their median
afterwards. Absolute times belong to ``pytest bench``, on an idle machine.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import click

from bench import machine
from bench.inputs import batches
from bench.worker import Worker
from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import load_checkpoint

CALLS = {1: 40, 64: 2, 256: 1}  # in one turn; their median counts
# After a turn of torch its threads spin for a while, waiting for more.
REST = 0.02


def measure(checkpoint: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each contestant, one value a round; the same rounds for all."""
    shape = load_checkpoint(checkpoint).config.image_shape
    inputs = itertools.cycle(batches(batch, shape, "uint8"))

    def turn(call: Callable[[], float]) -> float:
        time.sleep(REST)
        return statistics.median(call() for _ in range(CALLS[batch]))

    def timed(purifier: Purifier) -> Callable[[], float]:
        def call() -> float:
            images = next(inputs)
            start = time.perf_counter()
            purifier(images)
            return time.perf_counter() - start

        return call

    with (
        Worker(checkpoint, warm=True) as worker,
        Purifier.from_pretrained(checkpoint, engine="openvino", precision="int8") as int8,
        Purifier.from_pretrained(checkpoint, engine="openvino", precision="bf16") as bf16,
    ):
        contestants = {
            "int8": timed(int8),
            "bf16": timed(bf16),
            "released fp32, warm": lambda: float(worker.ask("released", batch=batch, device="cpu")["seconds"]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_ in range(rounds + 2):  # two to warm up
            for name, call in contestants.items():
                value = turn(call)
                if round_ >= 2:
                    seconds[name].append(value)
    return seconds


@click.command()
@click.option("--checkpoint", default="fashion_mnist", show_default=True, help="A shipped name or a file, with scales.")
@click.option("--rounds", type=click.IntRange(min=3), default=30, show_default=True)
def main(checkpoint: str, rounds: int) -> None:
    """Print how many times as fast int8 is: median of the rounds' ratios, and their middle half."""
    watch = machine.OthersWatch()
    for batch in CALLS:
        seconds = measure(checkpoint, batch, rounds)
        own = seconds.pop("int8")
        click.echo(f"batch {batch}: int8 {1e3 * statistics.median(own):.3f} ms a call")
        for name, other in seconds.items():
            ratios = sorted(b / a for a, b in zip(own, other, strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            took = f"{1e3 * statistics.median(other):.3f} ms"
            click.echo(f"  {middle:5.2f} times as fast as {name} ({took}; middle half {low:.2f} to {high:.2f})")
    load = watch.report()
    idle = {True: "the machine was idle", False: "THE MACHINE WAS NOT IDLE", None: "idleness was not measured"}
    click.echo(f"{idle[load['idle']]}; other processes used {load['others_cores_during']} cores")


if __name__ == "__main__":
    main()
