"""The training step: repeated from a recording it is the same step, and fused kernels change it by rounding alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from defense_vae_fast.nn.kernels import selection
from defense_vae_fast.nn.model import DefenseVAE
from training.data import Dataset, Split, to_float
from training.device import place
from training.fit import STATE_FILE, fit
from training.muon import UPDATE
from training.pairs import Pairs
from training.precision import Amp, default_amp
from training.recipe import Optimizer, Recipe
from training.state import load_state, save_state
from training.step import WARM_UP, Average, CudaGraphs, Recorder, Step, make_optimizer

RECIPE = Recipe(
    "test", "fly", ("D",), steps=9, attacked=1, clean=3, learning_rate=1e-3, decay=0.5, agreement_weight=1.0,
    own_agreement_weight=2.0, averaging=0.9, kl_weight=0.1,
)  # fmt: skip


class CpuRecorder(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the sequence of operations, each on the tensors that it had when recorded.

    A number that Python computed is in it as it was; only what lies in tensors can change. Unlike a capture, a
    recording has run once, so the first repetition does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.warm_ups, self.recordings, self.repetitions = 0, 0, 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def warm_up(self, body: Callable[[], None]) -> None:
        self.warm_ups += 1
        body()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        self._calls = []
        with self:
            body()
        calls, made = self._calls, [True]

        @torch.no_grad()
        def repeat() -> None:
            if made:
                made.clear()
                return
            self.repetitions += 1
            for func, args, kwargs, results in calls:
                for place_, value in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                    same = not isinstance(value, Tensor) or value.data_ptr() == place_.data_ptr()
                    if not same:
                        place_.copy_(value)

        return repeat


class Training:
    """A small network in training, on ``device``."""

    def __init__(
        self, images: Tensor, judges: list[nn.Module], *, recorded: bool, recorder: Recorder | None = None,
        kernels: selection.Kernels = "torch", amp: Amp | None = None, recipe: Recipe = RECIPE, device: str = "cpu",
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model = place(DefenseVAE(kernels=kernels), device)
        self.averaged = AveragedModel(self.model)
        self.optimizer = make_optimizer(self.model, recipe, recorded=recorded)
        self.images, self.recipe, self.judges = images.to(device), recipe, judges
        logits = [judge(to_float(self.images)).detach() for judge in judges]
        self.step = Step(
            self.model.train(), Average(self.averaged, self.model, recipe.averaging, recorded=recorded),
            self.optimizer, recipe, self.images, judges, logits, amp=amp, recorder=recorder,
        )  # fmt: skip
        if amp == "fp16":  # from the usual 65536 the first steps of so short a run would all be left out
            self.step.scaler.load_state_dict({**self.step.scaler.state_dict(), "scale": 16.0})

    def run(self, first: int, last: int, size: int = 2) -> list[float]:
        if not first:
            torch.manual_seed(1)
        losses = []
        for step in range(first, last):
            index = torch.arange(size * step, size * (step + 1), device=self.images.device) % len(self.images)
            pairs = Pairs(to_float(self.images[index]).flip(0), index)
            judge = step % len(self.judges) if self.judges else None
            own = (step + 1) % len(self.judges) if self.judges else None  # another, so that the two cannot be mixed up
            losses.append(float(self.step(pairs, judge, self.recipe.rate(step, self.recipe.steps), own)))
        return losses

    def state(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **{f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}}


@pytest.fixture(scope="module")
def images(demo_images: tuple[Tensor, Tensor]) -> Tensor:
    return demo_images[0][:32]


def judges(classifier: nn.Module) -> list[nn.Module]:
    return [classifier, nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).requires_grad_(False)]


@pytest.mark.parametrize(("amp", "count", "optimizer"), [("bf16", 2, "adam"), ("fp16", 0, "adam"), ("bf16", 0, "muon")])
def test_a_recorded_step_repeats_the_step_to_the_bit(
    amp: Amp, count: int, optimizer: Optimizer, images: Tensor, classifier_d: nn.Module
) -> None:
    recorder, both = CpuRecorder(), judges(classifier_d)[:count]
    recipe = replace(RECIPE, optimizer=optimizer)
    eager = Training(images, both, recorded=True, amp=amp, recipe=recipe)
    recorded = Training(images, both, recorded=True, amp=amp, recorder=recorder, recipe=recipe)
    recordings = max(1, count)
    steps = recordings * WARM_UP + 2 * recordings
    losses = eager.run(0, steps)
    assert losses == recorded.run(0, steps)
    found = (recorder.warm_ups, recorder.recordings, recorder.repetitions)
    assert found == (recordings * WARM_UP, recordings, recordings)
    for name, value in eager.state().items():
        assert torch.equal(value, recorded.state()[name]), name
    # Numbers on the device say the same as numbers on the host.
    assert Training(images, both, recorded=False, amp=amp, recipe=recipe).run(0, 3) == pytest.approx(
        losses[:3], rel=1e-3
    )


def test_the_average_forgets_fast_at_first(images: Tensor) -> None:
    model = nn.Linear(1, 1, bias=False)
    shares = []
    for recorded in (False, True):
        averaged = AveragedModel(model)
        average = Average(averaged, model, 0.5, recorded=recorded)
        values = []
        for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0):
            with torch.no_grad():
                model.weight.fill_(value)
            average.advance()
            average.update()
            values.append(float(averaged.module.weight.detach()))
        shares.append(values)
    expected = [1.0]
    for made in range(1, 12):
        expected.append(expected[-1] + (1 - min(0.5, (1 + made) / (10 + made))) * (made + 1 - expected[-1]))
    assert shares[0] == pytest.approx(expected, rel=1e-6)
    assert shares[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("amp", "optimizer"), [("fp16", "adam"), ("bf16", "muon")])
def test_resuming_keeps_the_loss_scale_and_the_optimizers_state(
    amp: Amp, optimizer: Optimizer, images: Tensor, classifier_d: nn.Module, tmp_path: Path
) -> None:
    both = judges(classifier_d)

    def make() -> Training:
        return Training(images, both, recorded=True, amp=amp, recipe=replace(RECIPE, optimizer=optimizer))

    def files(training: Training) -> dict[str, Any]:
        return {
            "modules": {"model": training.model, "averaged": training.averaged},
            "optimizers": {"optimizer": training.optimizer},
            "scaler": training.step.scaler, "device": torch.device("cpu"),
        }  # fmt: skip

    whole, parts, resumed = make(), make(), make()
    whole.run(0, 3)
    parts.run(0, 2)
    save_state(tmp_path / "state", step=2, run={}, **files(parts))
    if amp == "fp16":
        resumed.step.scaler.load_state_dict({**resumed.step.scaler.state_dict(), "scale": 7.0})
    load_state(tmp_path / "state", **files(resumed))
    resumed.run(2, 3)
    assert resumed.step.scaler.state_dict() == whole.step.scaler.state_dict()
    for name, value in whole.state().items():
        assert torch.equal(value, resumed.state()[name]), name


def test_a_run_in_fp16_is_not_resumed_in_another_precision(
    demo_images: tuple[Tensor, Tensor], classifier_d: nn.Module, tmp_path: Path
) -> None:
    pictures, labels = demo_images
    parts = [Split(pictures[a:b], labels[a:b]) for a, b in ((0, 40), (40, 60), (60, 80))]
    data = Dataset("fashion_mnist", *parts, class_names=tuple(map(str, range(10))))
    recipe = replace(RECIPE, steps=1, agreement_weight=0.0)
    fit(data, {"D": classifier_d}, recipe, tmp_path, amp="fp16")
    with pytest.raises(ValueError, match=rf"differs in amp \('fp16' there, '{default_amp('cpu')}' here\)"):
        fit(data, {"D": classifier_d}, replace(recipe, steps=2), tmp_path, resume=True)
    assert (tmp_path / STATE_FILE).exists()


def test_muon_wants_no_scaled_loss_and_is_not_resumed_as_adam(
    demo_images: tuple[Tensor, Tensor], classifier_d: nn.Module, tmp_path: Path
) -> None:
    pictures, labels = demo_images
    parts = [Split(pictures[a:b], labels[a:b]) for a, b in ((0, 40), (40, 60), (60, 80))]
    data = Dataset("fashion_mnist", *parts, class_names=tuple(map(str, range(10))))
    recipe = replace(RECIPE, steps=1, agreement_weight=0.0, optimizer="muon")
    with pytest.raises(ValueError, match="'muon': expected the precision bf16 or fp32, got fp16"):
        fit(data, {"D": classifier_d}, recipe, tmp_path, amp="fp16")
    fit(data, {"D": classifier_d}, recipe, tmp_path)
    with pytest.raises(ValueError, match=r"differs in optimizer \('muon' there, None here\)"):
        fit(data, {"D": classifier_d}, replace(recipe, steps=2, optimizer="adam"), tmp_path, resume=True)


def test_muon_moves_hidden_matrices_alike_in_all_directions_and_the_rest_as_adam() -> None:
    torch.manual_seed(0)
    model = DefenseVAE()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    reference = DefenseVAE()
    reference.load_state_dict(model.state_dict())
    gradients = {name: torch.randn_like(weight) for name, weight in before.items()}
    # One direction some two hundred times as steep as the others.
    steep = torch.outer(torch.randn(256), torch.randn(4096))
    gradients["mu.weight"] = gradients["mu.weight"] + 20 * steep[:128]
    for network in (model, reference):
        for name, weight in network.named_parameters():
            weight.grad = gradients[name]
    make_optimizer(model, replace(RECIPE, optimizer="muon"), recorded=False).step()
    make_optimizer(reference, RECIPE, recorded=False).step()
    others = dict(reference.named_parameters())
    hidden = {"mu.weight"} | {f"{part}{number}.weight" for part in ("encoder", "decoder") for number in range(2, 5)}
    hidden.add("decoder1.weight")
    for name, weight in model.named_parameters():
        if name not in hidden:
            torch.testing.assert_close(weight, others[name], msg=name)
            continue
        moved = (before[name] - weight.detach()).flatten(1) / RECIPE.learning_rate
        rms = float(moved.square().mean().sqrt())
        assert 0.7 * UPDATE < rms < 1.2 * UPDATE, (name, rms)
        values = torch.linalg.svdvals(moved)
        assert float(values[0] / values.median()) < 2, name


def test_forced_kernels_that_cannot_run_stop_a_fit(
    demo_images: tuple[Tensor, Tensor], classifier_d: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "unavailable", lambda device_type: "the package triton is not installed")
    pictures, labels = demo_images
    part = Split(pictures[:40], labels[:40])
    data = Dataset("fashion_mnist", part, part, part, class_names=tuple(map(str, range(10))))
    with pytest.raises(RuntimeError, match="kernels='triton' cannot run: the package triton is not installed"):
        fit(data, {"D": classifier_d}, replace(RECIPE, steps=1), tmp_path, kernels="triton")


def without_noise(training: Training) -> Training:
    """The latent's variance at exp(-40): the forms draw other noise, which then does not count."""
    with torch.no_grad():
        training.model.get_parameter("logvar.weight").zero_()
        training.model.get_parameter("logvar.bias").fill_(-40.0)
    return training


def test_fused_and_plain_training_differ_by_rounding(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux on x86-64")
    if reason := selection.unavailable("cpu"):
        pytest.skip(reason)
    from defense_vae_fast.nn.kernels import bn_relu

    monkeypatch.setattr(bn_relu, "TILE", 2**20)  # few programs: the interpreter's time is in their number
    recipe = replace(RECIPE, agreement_weight=0.0, kl_weight=0.0)
    plain = without_noise(Training(images, [], recorded=False, recipe=recipe, amp="fp16"))
    fused = without_noise(Training(images, [], recorded=False, recipe=recipe, amp="fp16", kernels="triton"))
    assert fused.run(0, 2, size=4) == pytest.approx(plain.run(0, 2, size=4), rel=2e-3)
    for name, value in plain.model.named_buffers():
        if value.is_floating_point():
            # A mean may be nearly 0: what counts is how far it lies off in standard deviations.
            scale = plain.model.get_buffer(name.replace("mean", "var")).sqrt() if "mean" in name else value
            error = (fused.model.get_buffer(name) - value).norm() / scale.norm()
            assert float(error) < 0.002, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_cuda_graph_repeats_the_step_and_nothing_waits(
    kernels: selection.Kernels, amp: Amp, images: Tensor, classifier_d: nn.Module
) -> None:
    if reason := selection.unavailable("cuda"):
        pytest.skip(reason)
    device = torch.device("cuda")
    both = [judge.to(device) for judge in judges(classifier_d)]
    results = []
    try:
        for recorder in (None, CudaGraphs(device)):
            training = Training(
                images, both, recorded=True, recorder=recorder, kernels=kernels, amp=amp, device="cuda"
            )  # fmt: skip
            training.run(0, 2 * WARM_UP + 4)
            index = torch.arange(4, device=device)
            pairs = Pairs(to_float(training.images[index]), index)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for judge in (0, 1):
                    training.step(pairs, judge, 1e-4)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            results.append(training.state())
    finally:
        classifier_d.to("cpu")
    eager, graphed = results
    for name, value in eager.items():
        # cuDNN may sum in another order each time, and Adam turns the sign of a tiny gradient into a whole step.
        torch.testing.assert_close(graphed[name], value, atol=0.02, rtol=0.05, msg=name)
