"""The GPU benchmarks' code on the CPU, at tiny sizes: that it runs, checks what it times, and reports it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import kernels, report, test_kernels, test_training, timing, training
from bench.rows import Results, Row
from defense_vae_fast.nn.kernels import selection
from training.data import Dataset, Split
from training.recipe import Recipe
from training.step import WARM_UP


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", ["torch contiguous", "torch channels_last", "triton channels_last"])
def test_batch_norm_relu(form: kernels.Form, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if form.startswith("triton") and selection.unavailable("cpu"):
        pytest.skip(selection.unavailable("cpu"))
    monkeypatch.setattr(timing, "L2_BYTES", 1)
    found = kernels.measure(form, (2, 5, 3, 3), backward=backward, graph=False, device="cpu", rounds=2)
    assert len(found.seconds) == 2
    assert found.bytes_moved == (16 if backward else 6) * 90
    assert found.error <= 2 * found.error_of_plain_torch + 1e-6
    assert found.error_of_plain_torch > 0


def test_the_benchmarks_name_what_there_is() -> None:
    assert kernels.shapes() == test_kernels.LAYERS
    assert kernels.FORMS == test_kernels.FORMS
    assert training.FORMS == test_training.FORMS


def test_step() -> None:
    found = training.measure("torch", 2, amp="bf16", graph=False, device="cpu", rounds=2, steps=1, average=True)
    assert len(found.seconds) == 2
    assert len(found.losses) == WARM_UP + 3
    assert found.losses[0] == pytest.approx(784 * math.log(2), rel=0.05)


def test_paper_scale_is_a_projection(demo_images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).requires_grad_(False)
    images, labels = demo_images

    def half_a_second(call: Callable[[int], object], **options: object) -> list[float]:
        call(0)
        return [0.5]

    monkeypatch.setattr(timing, "seconds", half_a_second)
    found = training.paper_scale(
        images[:2], labels[:2], classifier, device="cpu", attacked=4, steps=1, form="torch", graph=False
    )  # fmt: skip
    assert found["projected"]
    assert found["steps"] == 5 * 13 * 60_000 // 16
    assert found["training_seconds"] == found["steps"] * 0.5
    assert found["pairs_seconds"] == pytest.approx(12 * 60_000 / 4 * 0.5)
    assert found["total_seconds"] == found["pairs_seconds"] + found["training_seconds"]


def test_accuracies(
    demo_images: tuple[Tensor, Tensor], classifier_d: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images, labels = demo_images
    parts = [Split(images[a:b], labels[a:b]) for a, b in ((0, 40), (40, 60), (60, 80))]
    data = Dataset("fashion_mnist", *parts, class_names=tuple(map(str, range(10))))
    recipe = Recipe("test", "fly", ("D",), steps=1, attacked=2)
    # Triton would be interpreted here; which form runs is for other tests.
    monkeypatch.setattr(training.pool, "shipped", lambda name, data, device: classifier_d)
    monkeypatch.setattr(training, "fit", lambda *args, kernels, **options: fit(*args, **options))
    found = training.accuracies(data, recipe, (0,), "cpu", tmp_path)
    assert {form: len(runs) for form, runs in found.items()} == {"torch": 1, "triton": 1}
    assert set(found["torch"][0]) == {"clean", "fgsm"}
    assert found["torch"] == found["triton"]


fit = training.fit


def kernel_row(form: str, seconds: float, graph: bool = True) -> Row:
    details = {"layer": "encoder1", "form": form, "backward": True, "graph": graph, "share_of_copy": 0.85}
    return Row("kernel", f"{form}, encoder1", 256, (seconds,), details)


def test_the_report_says_who_wins() -> None:
    results = Results(
        [
            Row("bandwidth", "copy of 1 GiB", 1, (0.001,), {"bytes_per_second": 2.1e12}),
            kernel_row("torch channels_last", 0.003),
            kernel_row("compiled channels_last", 0.001),
            kernel_row("triton channels_last", 0.002),
            Row("step", "torch bf16", 16, (0.016,), {"form": "torch", "precision": "bf16", "graph": False}),
            Row("step", "triton bf16", 16, (0.004,), {"form": "triton", "precision": "bf16", "graph": True}),
            Row("paper", "preset paper", 1, (90.0,), {
                "projected": True, "steps": 243_750, "step_seconds": 0.0002, "images_per_second": 80_000.0,
                "pairs_seconds": 40.0, "training_seconds": 50.0, "total_seconds": 90.0,
            }),
        ]
    )  # fmt: skip
    text = "\n".join(report.gpu_lines(results))
    assert "2,100 GB/s" in text
    kernel = next(line for line in text.splitlines() if line.startswith("triton channels_last, encoder1"))
    assert kernel.split()[-4:] == ["85%", "1.50", "0.500", "no"]
    step = next(line for line in text.splitlines() if line.startswith("triton bf16"))
    assert step.split()[-2:] == ["4,000", "4.00"]
    assert "projection" in text
    assert "90.0 s" in text
    assert report.gpu_lines(Results()) == []


def test_rotation_is_bounded() -> None:
    assert timing.rotation(1) == 64
    assert timing.rotation(2**40) == 2
    assert timing.copy_bandwidth("cpu", 2**16) > 0
    assert timing.same(torch.ones(3), torch.zeros(3)) == 1.0
