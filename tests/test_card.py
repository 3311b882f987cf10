"""The robustness card: its attacks against an outside library's, its checks against broken pipelines, its page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import foolbox
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from bench import card_check
from defense_vae_fast.checkpoint import Checkpoint, save_checkpoint
from defense_vae_fast.nn.defended import PurifiedClassifier
from defense_vae_fast.nn.model import DefenseVAE
from training.__main__ import cli, main
from training.attacks import predict
from training.card.adaptive import Effort, SampledPipeline, sweep
from training.card.checks import checks
from training.card.corruptions import corruptions
from training.card.detector import fool_both, roc, scores, threshold
from training.card.kept import kept_section
from training.card.render import (
    CARD_FILE,
    JSON_FILE,
    PAGE_FILE,
    Grid,
    Heading,
    Paragraph,
    failure,
    to_html,
    to_markdown,
)
from training.data import to_float

LIGHT = Effort((0.02, 0.1), steps=8, restarts=1, queries=20)


@pytest.fixture(scope="module")
def images(demo_images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return to_float(demo_images[0][:60]), demo_images[1][:60]


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint, classifier_d: nn.Module) -> PurifiedClassifier:
    return PurifiedClassifier(DefenseVAE.from_checkpoint(checkpoint), classifier_d).eval()


@pytest.fixture(scope="module")
def blurring(classifier_d: nn.Module) -> PurifiedClassifier:
    """A trained classifier behind a purifier that blurs: quick, and not without effect."""

    class Blurring(DefenseVAE):
        def purify(self, x: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(x, 3, 1, 1)

    return PurifiedClassifier(Blurring(), classifier_d).eval()


# Adaptive attacks


def test_the_sweep_is_the_worst_case_and_falls(classifier_d: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    pixels, labels = images
    found = sweep(classifier_d, pixels, labels, LIGHT)
    assert found.clean == round(100 * float((predict(classifier_d, pixels) == labels).float().mean()), 2)
    assert list(found.worst) == [0.02, 0.1]
    line = [found.clean, *(value for epsilon in found.after for value in found.after[epsilon].values())]
    assert line == sorted(line, reverse=True)
    assert list(found.after[0.1]) == [
        "PGD-8, start 1", "APGD, cross-entropy", "APGD, difference of logits", "Square, 20 queries",
    ]  # fmt: skip
    for epsilon, attacked in found.attacked.items():
        assert float((attacked - pixels).abs().max()) <= epsilon + 1e-6
        assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
        kept = 100 * float((predict(classifier_d, attacked) == labels).float().mean())
        assert kept == pytest.approx(found.worst[epsilon], abs=0.01)


def test_the_worst_case_is_no_better_than_foolboxes_pgd(
    blurring: PurifiedClassifier, images: tuple[Tensor, Tensor]
) -> None:
    pipeline, (pixels, labels) = blurring, images
    effort = Effort((0.02,), steps=20, restarts=2, library=False)
    found = sweep(pipeline, pixels, labels, effort)
    wrapped = foolbox.PyTorchModel(pipeline, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=20, rel_stepsize=0.125, random_start=True)
    torch.manual_seed(0)
    _, reference, _ = attack(wrapped, pixels, foolbox.criteria.Misclassification(labels), epsilons=0.02)
    theirs = 100 * float((predict(pipeline, reference) == labels).float().mean())
    assert found.worst[0.02] <= theirs + 2
    assert found.worst[0.02] < found.clean


def test_sampled_pipelines_average_probabilities(pipeline: PurifiedClassifier, images: tuple[Tensor, Tensor]) -> None:
    pixels = images[0][:4]
    sampled = SampledPipeline(pipeline, 3)
    torch.manual_seed(1)
    answer = sampled(pixels)
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(4))
    torch.manual_seed(1)
    mu, logvar = pipeline.vae.encode(pixels)
    noise = torch.randn(3, *mu.shape)
    each = [
        torch.softmax(pipeline.classifier(torch.sigmoid(pipeline.vae.decode(mu + n * (logvar / 2).exp()))), 1)
        for n in noise
    ]
    torch.testing.assert_close(answer.exp(), torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)
    leaf = pixels.clone().requires_grad_()
    assert torch.autograd.grad(sampled(leaf).sum(), leaf)[0].abs().sum() > 0


@pytest.mark.parametrize(
    "arguments",
    [{"epsilons": ()}, {"epsilons": (0.1, 0.05)}, {"epsilons": (0.0,)}, {"epsilons": (2.0,)}, {"steps": 0},
     {"queries": -1}],
    ids=str,
)  # fmt: skip
def test_bad_effort(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Effort(**arguments)  # type: ignore[arg-type]


# Checks


class Quantised(nn.Module):
    """Hides its gradient: rounding has none."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner((x * 8).round() / 8)
        return y


class Noisy(nn.Module):
    """Answers otherwise each time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + torch.randn_like(y)


def test_checks_pass_on_an_honest_classifier_and_name_what_hides(
    classifier_d: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    pixels, labels = images

    def failed(network: nn.Module) -> set[str]:
        return {check.name for check in checks(network, pixels, labels) if not check.passed}

    assert failed(classifier_d) == set()
    hidden = failed(Quantised(classifier_d))
    assert {"every image has a gradient", "without a bound everything falls"} <= hidden
    assert "answers are the same every time" in failed(Noisy(classifier_d))
    assert "answers are logits, not probabilities" in failed(nn.Sequential(classifier_d, nn.Softmax(1)))
    awake = nn.Sequential(nn.Dropout(0.0), classifier_d)
    assert "dropout and BatchNorm are in eval mode" in failed(awake)


# Detector


def test_roc_by_hand() -> None:
    clean, attacked = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.3, 0.5])
    curve = roc(clean, attacked)
    # Of the eight pairs seven and a half are in order.
    assert curve.area == pytest.approx(6.5 / 8)
    assert curve.false_alarms == [0, 0, 0.25, 0.5, 0.75, 1]
    assert curve.caught == [0, 0.5, 0.5, 1, 1, 1]
    assert roc(clean, clean + 1).area == 1
    assert roc(clean, clean).area == 0.5
    with pytest.raises(ValueError, match="scores of both kinds"):
        roc(clean, attacked[:0])
    assert threshold(torch.arange(100.0), 0.05) == 94


def test_fooling_both_is_no_easier_than_fooling_one(
    blurring: PurifiedClassifier, images: tuple[Tensor, Tensor]
) -> None:
    pipeline, (pixels, labels) = blurring, images
    own = scores(pipeline, (pixels * 255).round().to(torch.uint8))
    torch.testing.assert_close(own, (pixels - pipeline.purify(pixels)).abs().mean((1, 2, 3)), atol=1e-4, rtol=0)
    never = fool_both(pipeline, pixels, labels, -1.0, 0.05, steps=5)
    always = fool_both(pipeline, pixels, labels, math.inf, 0.05, steps=5)
    between = fool_both(pipeline, pixels, labels, float(own.median()), 0.05, steps=5)
    assert never.both == 0
    assert always.both == always.classifier > 0
    assert between.both <= always.classifier


# Corruptions


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (1, 3, 32, 32)], ids=["gray", "colour"])
def test_corruptions_change_images_and_nothing_else(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    for name, change in corruptions().items():
        before = images.clone()
        changed = change(images)
        assert changed.shape == images.shape
        assert changed.dtype == torch.uint8
        assert torch.equal(images, before), name
        assert not torch.equal(changed, images), name
        assert torch.equal(change(images), changed), name
    flat = torch.full(shape, 100, dtype=torch.uint8)
    for name in ("blur 1 pixel", "half the contrast", "half the resolution"):
        assert torch.equal(corruptions()[name](flat), flat), name
    assert int(corruptions()["brighter by 0.2"](flat)[0, 0, 0, 0]) == 151


# The page


def test_failure_is_said_in_words() -> None:
    section = {
        "clean": {"bare": 91.0, "purified": 90.0},
        "adaptive": {"clean": 90.0, "worst": {"0.01": 80.0, "0.1": 20.0, "0.3": 0.0}},
        "bare": {"clean": 91.0, "worst": {"0.01": 70.0, "0.1": 0.0, "0.3": 0.0}},
        "detector": {"fooled": {"0.01": {"classifier": 5, "both": 2.0}, "0.3": {"classifier": 100, "both": 88.0}}},
        "checks": [{"name": "a check", "passed": False, "found": ""}],
    }
    text = failure(section)
    for part in ("halves the accuracy of 90.0 % at epsilon 0.1", "less than 1 % at 0.3", "20.0 points, at epsilon 0.1",
                 "88.0 % of the images", "did not pass", "a check", "lose 1.00 points"):  # fmt: skip
        assert part in text
    section["adaptive"]["worst"] = section["bare"]["worst"]
    assert "gains nothing" in failure(section)


def test_markdown_and_html_escape(tmp_path: Path) -> None:
    blocks = [Heading(2, "a < b"), Paragraph("**bold** & `code`"), Grid([["x|y", "<i>"], ["1", "2"]])]
    assert "| x\\|y | <i> |" in to_markdown(blocks)
    page = to_html(blocks, tmp_path, "t")
    assert "<h2>a &lt; b</h2>" in page
    assert "<b>bold</b> &amp; <code>code</code>" in page
    assert "<th>&lt;i&gt;</th>" in page


MY_CLASSIFIER = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 2))
"""


@pytest.fixture
def my_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 20)):
        for name, level in (("dark", 0), ("light", 128)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(level, level + 128, (28, 28)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "mine.py").write_text(MY_CLASSIFIER)
    save_checkpoint(tmp_path / "purifier.safetensors", checkpoint)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("draws", ["0", "2"])
def test_the_card_of_ones_own_purifier(draws: str, my_images: Path) -> None:
    command = [
        "card", "purifier.safetensors", "--dataset", "images", "--classifier", "mine:make", "--images", "4",
        "--oblivious-images", "10", "--epsilons", "0.02,0.3", "--steps", "2", "--restarts", "2", "--queries", "2",
        "--draws", draws, "--device", "cpu", "--out", "card",
    ]  # fmt: skip
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    card = json.loads((my_images / "card" / JSON_FILE).read_text())
    section = card["classifiers"]["mine:make"]
    assert card["images"] == {"adaptive": 4, "oblivious": 10}
    assert set(section["adaptive"]["worst"]) == {"0.02", "0.3"}
    assert {"fgsm_0.3", "cw", "deepfool", "pgd_0.1"} <= set(section["oblivious"])
    assert section["oblivious"]["cw"]["held_out"] is None  # this checkpoint's header does not say
    engines = [name for name, found in section["engines"].items() if isinstance(found, dict)]
    assert any("fp32" in name and "module" not in name for name in engines)
    agree = section["engines"]["module, fp32"]
    assert (
        section["engines"][next(name for name in engines if name.endswith(", fp32") and "module" not in name)] == agree
    )
    text = (my_images / "card" / CARD_FILE).read_text()
    page = (my_images / "card" / PAGE_FILE).read_text()
    for part in (
        "Where it fails",
        "Adaptive: through the whole pipeline",
        "The score as a detector",
        "Checks of the attacks",
    ):
        assert part in text
        assert part in page
    assert page.count("data:image/png;base64,") == text.count(".png)") == 3


def test_a_finished_part_is_kept_and_a_damaged_one_named(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> tuple[dict[str, object], list[Tensor]]:
        made.append(1)
        return {"value": len(made)}, [torch.full((2, 1, 3, 3), number, dtype=torch.uint8) for number in range(12)]

    first, pictures = kept_section(tmp_path / "kept", {"seed": 0}, make)
    again, same = kept_section(tmp_path / "kept", {"seed": 0}, make)
    assert first == again == {"value": 1}
    assert all(torch.equal(one, other) for one, other in zip(pictures, same, strict=True))
    assert kept_section(tmp_path / "kept", {"seed": 1}, make)[0] == {"value": 2}
    assert kept_section(None, {"seed": 0}, make)[0] == {"value": 3}
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="remove the file"):
        kept_section(tmp_path / "kept", {"seed": 0}, make)


def test_foolbox_repeats_the_adaptive_numbers(blurring: PurifiedClassifier, images: tuple[Tensor, Tensor]) -> None:
    """The check of a card, on images too few for a point's agreement: within two images."""
    pixels, labels = images
    effort = Effort((0.01, 0.02), steps=10, restarts=2, library=False)
    torch.manual_seed(0)
    theirs = card_check.adaptive(
        blurring, pixels, labels, {"epsilons": [0.01, 0.02], "steps": 10, "restarts": 2}
    )  # fmt: skip
    ours = sweep(blurring, pixels, labels, effort).worst
    assert list(theirs) == ["0.01", "0.02"]
    for epsilon, value in ours.items():
        assert theirs[f"{epsilon:g}"] == pytest.approx(value, abs=200 / len(labels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilons", "a,b"], "--epsilons: expected numbers"),
        (["--epsilons", "0.3,0.1"], "expected one or more rising"),
        (["--adversarial", "B=file"], "expected NAME=FILE with NAME one of mine:make"),
        (["--classifiers", "A"], "got both"),
        (["--dataset", "nowhere"], "expected one of"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, my_images: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["card", "purifier.safetensors", "--dataset", "images", "--classifier", "mine:make", *arguments]
    monkeypatch.setattr(sys, "argv", ["training", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_foolbox_images_that_were_not_fooled_stay_as_they_were() -> None:
    """Its CW makes them black."""
    stubborn = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False).eval()
    stubborn[1].weight.zero_()
    stubborn[1].bias.copy_(torch.tensor([9.0, 0.0]))
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(3, dtype=torch.long)
    attack = card_check.OBLIVIOUS["cw"][0]()
    assert torch.equal(card_check.attacked(attack, stubborn, images, labels, None), images)
