"""The training step in its several forms, and what a run at the paper's scale would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bench import timing
from defense_vae_fast.checkpoint import load_checkpoint
from defense_vae_fast.nn.model import DefenseVAE
from training import pool
from training.attacks import FGSM, PAPER_TRAINING_ATTACKS
from training.data import Dataset, Split, to_float
from training.device import place
from training.evaluate import evaluate
from training.fit import fit
from training.pairs import Order, Pairs, TablePairs, attack_all
from training.precision import Amp
from training.recipe import Recipe, preset
from training.step import WARM_UP, Average, CudaGraphs, Recorder, Step, make_optimizer

Form = Literal["torch", "compiled", "triton"]
FORMS: tuple[Form, ...] = ("torch", "compiled", "triton")
PAPER_IMAGES = 60_000


class Source:
    """Random pairs, taken from a table on the device as ``TablePairs`` takes them."""

    def __init__(self, batch: int, device: str, images: int = 4096) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images, self.rows = (
            torch.randint(0, 256, (images, 1, 28, 28), dtype=torch.uint8, generator=generator).to(device)
            for _ in range(2)
        )
        self._batch, self._order = batch, Order(images, 0, device)

    def batch(self, step: int) -> Pairs:
        chosen = self._order.take(step * self._batch, self._batch)
        return Pairs(to_float(self.rows[chosen]), chosen)


class Measured(NamedTuple):
    """Seconds of a step in each round, and the losses of the first steps."""

    seconds: list[float]
    losses: list[float]


def measure(
    form: Form, batch: int, *, amp: Amp, graph: bool, device: str, rounds: int, steps: int, average: bool = False
) -> Measured:
    """Time ``rounds`` of ``steps`` training steps each, pairs gathered from a table included."""
    source = Source(batch, device)
    step = make_step(form, source.images, amp=amp, graph=graph, device=device, average=average)
    rate = 1e-3
    losses = [float(step(source.batch(number), None, rate)) for number in range(WARM_UP + 3)]
    done = len(losses)

    def turn(number: int) -> None:
        step(source.batch(done + number), None, rate)

    # The step has its graph already, where it has one; the gathering of pairs stays outside, as in a run.
    return Measured(timing.seconds(turn, device=device, calls=steps, rounds=rounds, graph=False), losses)


def make_step(form: Form, images: Tensor, *, amp: Amp, graph: bool, device: str, average: bool) -> Step:
    """A step of the paper's recipe on a fresh network from seed 0."""
    recipe = replace(preset("paper"), averaging=0.99 if average else 0.0)
    torch.manual_seed(0)
    model = place(DefenseVAE(kernels="triton" if form == "triton" else "torch"), device).train()
    recorder: Recorder | None = CudaGraphs(torch.device(device)) if graph else None
    optimizer = make_optimizer(model, recipe, recorded=graph)
    kept = Average(AveragedModel(model), model, recipe.averaging, recorded=graph) if average else None
    network: Any = model
    if form == "compiled":
        torch._dynamo.reset()
        network = torch.compile(model, dynamic=False)
    torch.manual_seed(0)
    return Step(network, kept, optimizer, recipe, images, amp=amp, recorder=recorder)


def paper_scale(
    images: Tensor,
    labels: Tensor,
    classifier: nn.Module,
    *,
    device: str,
    attacked: int,
    steps: int,
    form: Form = "triton",
    graph: bool = True,
) -> dict[str, Any]:
    """What the preset ``paper`` takes on all 60,000 images and one classifier, projected from parts of it.

    Args:
        images: uint8 (N, 1, 28, 28), repeated as often as is needed.
        labels: (N,)
        classifier: in eval mode, on ``device``.
        device: where.
        attacked: images that each attack is timed on, after a first time that is not counted.
        steps: training steps that are timed, after a first time that is not counted.
        form: of the step.
        graph: train by a CUDA graph.
    """
    recipe = preset("paper")
    times = -(-attacked // len(images))
    split = Split(images.repeat(times, 1, 1, 1)[:attacked].to(device), labels.repeat(times)[:attacked].to(device))
    attacks: dict[str, float] = {}
    for attack in PAPER_TRAINING_ATTACKS:
        spent = timing.seconds(
            lambda turn, attack=attack: attack_all(attack, classifier, split, seed=turn),  # type: ignore[misc]
            device=device, calls=1, rounds=1, graph=False,
        )  # fmt: skip
        attacks[repr(attack)] = spent[0] / attacked * PAPER_IMAGES
    source = TablePairs(
        split.first(min(64, attacked)), {"A": classifier}, batch_size=recipe.attacked, seed=0, cw_images=1
    )  # fmt: skip
    step = make_step(form, split.images, amp="bf16", graph=graph, device=device, average=False)

    def turn(number: int) -> None:
        step(source.batch(number), None, recipe.learning_rate)

    for number in range(WARM_UP + 1):
        turn(number)
    (step_seconds,) = timing.seconds(turn, device=device, calls=steps, rounds=1, graph=False)
    rows = (len(PAPER_TRAINING_ATTACKS) + 1) * PAPER_IMAGES
    count = recipe.epochs * (rows // recipe.attacked)
    pairs = sum(attacks.values())
    return {
        "projected": True, "batch": recipe.attacked, "epochs": recipe.epochs, "steps": count,
        "step_seconds": step_seconds, "images_per_second": recipe.attacked / step_seconds,
        "attack_seconds": attacks, "pairs_seconds": pairs, "training_seconds": count * step_seconds,
        "total_seconds": pairs + count * step_seconds,
    }  # fmt: skip


def accuracies(
    data: Dataset, recipe: Recipe, seeds: Sequence[int], device: str, folder: Path
) -> dict[str, list[dict[str, float]]]:
    """Validation accuracies of purified images after a recipe, by form and seed, clean and under FGSM."""
    where = torch.device(device)
    classifiers = {name: pool.shipped(name, data, where) for name in recipe.classifiers}
    found: dict[str, list[dict[str, float]]] = {"torch": [], "triton": []}
    for seed in seeds:
        for form, runs in found.items():
            out = folder / f"{form}-{seed}"
            result = fit(data, classifiers, replace(recipe, seed=seed), out, device=where, kernels=form)  # type: ignore[arg-type]
            model = place(DefenseVAE.from_checkpoint(load_checkpoint(str(result.checkpoint))), where)
            cells = evaluate(
                model, classifiers, data.validation.to(where), {"fgsm": FGSM(0.3)}, dataset=data.name
            )  # fmt: skip
            runs.append({cell.attack: cell.purified for cell in cells})
    return found
