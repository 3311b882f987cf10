"""A purifier released with the classifier that learnt with it: what is compared, what is written, what loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from defense_vae_fast import Purifier, list_pretrained, pretrained_classifier
from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from defense_vae_fast.engines.openvino import openvino_core
from defense_vae_fast.nn.model import DefenseVAE
from training.__main__ import cli
from training.attacks import FGSM
from training.data import Dataset, Split
from training.finetune import FinetuneSettings, finetune
from training.pairs import TablePairs
from training.variant import release

PREFIX = "100 test images, attacks on the bare classifier D away from"


Run = Callable[[Checkpoint, int], Path]


@pytest.fixture(scope="module")
def dataset(demo_images: tuple[Tensor, Tensor], real: Checkpoint) -> Dataset:
    images, labels = demo_images
    train, validation, test = (Split(images[a:b], labels[a:b]) for a, b in ((0, 300), (300, 350), (400, 500)))
    return Dataset("fashion_mnist", train, validation, test, class_names=tuple(real.recipe["class_names"]))


@pytest.fixture(scope="module")
def real() -> Checkpoint:
    return load_checkpoint("fashion_mnist")


@pytest.fixture(scope="module")
def run(dataset: Dataset, classifier_d: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder of a run of two steps from a purifier and D, of which so many are said to be made."""

    def train(start: Checkpoint, made: int) -> Path:
        out = tmp_path_factory.mktemp("run")
        purifier = DefenseVAE.from_checkpoint(start).requires_grad_(False)
        pairs = TablePairs(
            dataset.train, {"D": classifier_d}, batch_size=16, seed=0, images=8, attacks=[FGSM(0.3), FGSM(0.25)]
        )
        settings = FinetuneSettings(steps=2, learning_rate=1e-5)
        finetune(dataset, "D", classifier_d, purifier, classifier_d, lambda: pairs, settings, out)
        bundle = load_checkpoint(out / "checkpoint.safetensors")
        recipe = {**bundle.recipe, "steps_made": made}
        save_checkpoint(out / "checkpoint.safetensors", replace(bundle, recipe=recipe))
        return out

    return train


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Path:
    """A folder of shipped weights with a random purifier in it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    save_checkpoint(folder / "fashion_mnist.safetensors", checkpoint)
    monkeypatch.setattr("defense_vae_fast.checkpoint.WEIGHTS_FOLDER", folder)
    return folder


def test_a_better_pair_is_written_and_is_what_was_measured(
    dataset: Dataset, classifier_d: nn.Module, run: Run, real: Checkpoint, checkpoint: Checkpoint, weights: Path
) -> None:
    """The real purifier and two small steps, in the place of a random one."""
    released = release(dataset, "D", classifier_d, checkpoint, run(real, 2), weights)
    assert released.name == "fashion_mnist-e2e"
    assert list_pretrained() == ("fashion_mnist", "fashion_mnist-e2e")
    columns = ["bare", "fashion_mnist", released.name, f"{released.name}, its own classifier attacked"]
    known = load_checkpoint(released.name).accuracies
    for labels, rows in released.test.items():
        stored = known[f"{PREFIX} {labels} labels"]
        assert stored["columns"] == columns
        assert {attack: stored[attack] for attack in ("clean", "fgsm", "rand_fgsm", "cw")} == rows
    bare, random, ours, _ = known[f"{PREFIX} true labels"]["fgsm"]
    assert max(bare, random) < 30 < 75 < ours

    path = pretrained_classifier("fashion_mnist", "e2e")
    classifier = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = dataset.test.images.permute(0, 2, 3, 1).contiguous().numpy()
    with Purifier.from_pretrained("fashion_mnist", variant="e2e", precision="fp32") as purifier:
        assert purifier.info()["checkpoint"]["digest"] == load_checkpoint(released.name).digest
        classes = np.asarray(classifier(purifier(images))[0]).argmax(1)
    right = 100 * float((classes == dataset.test.labels.numpy()).mean())
    assert right == pytest.approx(released.test["true"]["clean"][2], abs=1.01)  # an image on the border of two classes


def test_one_attacker_knows_the_pairs_own_classifier(
    dataset: Dataset, classifier_d: nn.Module, run: Run, real: Checkpoint, checkpoint: Checkpoint, weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both columns of the pair are the same on clean images, and come from images of two classifiers under attack."""
    seen: list[tuple[bool, nn.Module]] = []

    def attacked(_: object, network: nn.Module, split: Split, *, predicted_labels: bool, **__: object) -> Tensor:
        seen.append((predicted_labels, network))
        return split.images if network is classifier_d else torch.zeros_like(split.images)

    monkeypatch.setattr("training.variant.attacked_images", attacked)
    released = release(dataset, "D", classifier_d, checkpoint, run(real, 2), weights)
    assert len(seen) == 3 * 2 * 3  # attacks, networks; validation, and test with two kinds of labels
    assert sum(predicted for predicted, _ in seen) == 12
    for attack, row in released.test["true"].items():
        assert row[2] == released.test["true"]["clean"][2]
        assert (row[3] == row[2]) == (attack == "clean")


@pytest.mark.parametrize(
    ("made", "name", "message"),
    [
        pytest.param(1, "D", "expected a finished run of 'finetune'", id="unfinished"),
        pytest.param(2, "A", "got .*'classifier': 'D'", id="another classifier"),
    ],
)
def test_what_is_no_such_run_is_refused(
    made: int, name: str, message: str, dataset: Dataset, classifier_d: nn.Module, run: Run, checkpoint: Checkpoint,
    weights: Path,
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=message):
        release(dataset, name, classifier_d, checkpoint, run(checkpoint, made), weights)
    assert [path.name for path in weights.iterdir()] == ["fashion_mnist.safetensors"]


def test_a_pair_that_is_no_better_is_not_written(
    dataset: Dataset, classifier_d: nn.Module, run: Run, real: Checkpoint, checkpoint: Checkpoint, weights: Path
) -> None:
    message = r"got these means: bare [\d.]+ %, fashion_mnist [\d.]+ %, .*nothing was written"
    with pytest.raises(ValueError, match=message):
        release(dataset, "D", classifier_d, real, run(checkpoint, 2), weights, images=50)
    assert [path.name for path in weights.iterdir()] == ["fashion_mnist.safetensors"]


def test_the_command_adds_int8_scales(
    dataset: Dataset, run: Run, real: Checkpoint, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.__main__.load_dataset", lambda *_: dataset)
    monkeypatch.setattr("training.__main__.WEIGHTS_FOLDER", weights)
    options = ["--name", "D", "--images", "40", "--device", "cpu"]
    result = CliRunner().invoke(cli, ["variant", "fashion_mnist", str(run(real, 2)), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for title in (
        "validation, attacks away from predicted",
        "test, attacks away from true",
        "test, attacks away from predicted",
    ):
        assert title in result.output
    known = load_checkpoint("fashion_mnist-e2e").quantization
    assert known is not None
    assert list(known.accuracies["cells"]) == ["D, trained with it"]
    with Purifier.from_pretrained("fashion_mnist", variant="e2e", engine="openvino", precision="int8") as purifier:
        assert purifier.info()["precision"] == "int8"


@pytest.mark.parametrize(("name", "variant"), [("fashion_mnist", "rec"), ("mine.safetensors", "e2e")])
def test_a_variant_that_does_not_come_with_the_library(name: str, variant: str) -> None:
    for load in (lambda: Purifier.from_pretrained(name, variant=variant), lambda: pretrained_classifier(name, variant)):
        with pytest.raises(
            FileNotFoundError, match=f"expected a shipped name that has a variant '{variant}', got none"
        ):
            load()


def test_a_classifier_that_does_not_come_with_the_library() -> None:
    with pytest.raises(FileNotFoundError, match=r"unknown_classifier\.onnx, found none"):
        pretrained_classifier("unknown")
