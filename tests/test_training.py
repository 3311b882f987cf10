"""Training: losses, pairs, the run, its resumption and the commands, on the repository's own images."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import python_path
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import list_pretrained, load_checkpoint
from defense_vae_fast.nn.losses import (
    agreement_loss,
    defense_vae_loss,
    end_to_end_loss,
    kl_divergence,
    reconstruction_loss,
)
from defense_vae_fast.nn.model import MAX_LOGVAR, DefenseVAE, VAEOutput
from training import pool
from training.__main__ import cli, main
from training.attacked import attacked_images
from training.attacks import FGSM, PAPER_TRAINING_ATTACKS, Attack, CarliniWagnerL2
from training.classifiers import CLASSIFIERS, HELD_OUT, Centred, build, paper_classifiers
from training.data import Dataset, Split, to_float
from training.evaluate import evaluate, paper_accuracy, summary
from training.fit import CHECKPOINT_FILE, LOG_FILE, STATE_FILE, fit
from training.pairs import FlyPairs, Order, TablePairs, attack_all
from training.precision import default_amp
from training.recipe import PRESETS, Recipe, preset
from training.train_classifier import accuracy, fit_classifier, load_classifier, save_classifier

TINY = Recipe(
    "tiny",
    "fly",
    ("D",),
    steps=6,
    attacked=12,
    clean=4,
    learning_rate=1e-3,
    decay=0.3,
    agreement_weight=1.0,
    averaging=0.9,
)


@pytest.fixture(scope="module")
def dataset(demo_images: tuple[Tensor, Tensor]) -> Dataset:
    images, labels = demo_images
    parts = [Split(images[a:b], labels[a:b]) for a, b in ((0, 300), (300, 400), (400, 500))]
    return Dataset("fashion_mnist", *parts, class_names=tuple(map(str, range(10))))


# Losses


def test_reconstruction_is_the_summed_cross_entropy_of_equation_4() -> None:
    logits, clean = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.rand(3, 1, 4, 4, dtype=torch.float64)
    p = torch.sigmoid(logits)
    by_hand = -(clean * p.log() + (1 - clean) * (1 - p).log()).sum() / 3
    assert float(reconstruction_loss(logits, clean)) == pytest.approx(float(by_hand), rel=1e-5)


def test_kl_is_that_of_two_gaussians() -> None:
    mu, logvar = torch.randn(5, 7), torch.randn(5, 7)
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 5
    assert float(kl_divergence(mu, logvar)) == pytest.approx(float(expected), rel=1e-5)


def test_losses_add_up() -> None:
    output = VAEOutput(torch.randn(3, 1, 4, 4), torch.randn(3, 7), torch.randn(3, 7))
    clean, logits, labels = torch.rand(3, 1, 4, 4), torch.randn(3, 10), torch.tensor([1, 2, 3])
    reconstruction, divergence = reconstruction_loss(output.logits, clean), kl_divergence(output.mu, output.logvar)
    equation_4 = defense_vae_loss(output, clean, kl_weight=0.5)
    assert float(equation_4) == pytest.approx(float(reconstruction + 0.5 * divergence))
    equation_5 = end_to_end_loss(output, clean, logits, labels, classifier_weight=3.0, kl_weight=0.5)
    cross_entropy = nn.functional.cross_entropy(logits, labels)
    assert float(equation_5) == pytest.approx(float(equation_4 + 3 * cross_entropy))
    assert float(agreement_loss(logits, logits)) == pytest.approx(0, abs=1e-6)
    assert float(agreement_loss(logits, logits.roll(1, 1))) > 0.1


def test_zero_kl_weight_ignores_an_infinite_divergence() -> None:
    output = VAEOutput(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), torch.full((1, 2), 1e4))
    assert math.isfinite(float(defense_vae_loss(output, torch.rand(1, 1, 2, 2), kl_weight=0)))


@pytest.mark.parametrize("loss", [reconstruction_loss, kl_divergence, agreement_loss])
def test_losses_refuse_two_shapes(loss: object) -> None:
    assert callable(loss)
    with pytest.raises(ValueError, match="expected one shape"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


# The module


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    model = DefenseVAE()
    convolution = model.get_parameter("encoder4.weight")
    assert float(convolution.detach().std()) == pytest.approx(0.02, rel=0.02)
    scale = torch.cat(
        [model.get_parameter(f"{name}.norm.weight").detach() for name in ("encoder3", "encoder4", "decoder2")]
    )
    assert float(scale.mean()) == pytest.approx(1, abs=0.01)
    assert float(scale.std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3), (128, 1)])
def test_eval_uses_the_mean_and_training_samples(size: int, channels: int) -> None:
    torch.manual_seed(0)
    model = DefenseVAE(VAEConfig(size, channels))
    images = torch.rand(3, channels, size, size)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)
    model.eval()
    first = model(images)
    assert first.logits.shape == images.shape
    assert first.mu.shape == first.logvar.shape == (3, 128)
    assert torch.equal(first.logits, model(images).logits)
    torch.testing.assert_close(model.purify(images), torch.sigmoid(first.logits))


# Classifiers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_log_variance_that_runs_away_leaves_everything_finite(dtype: torch.dtype) -> None:
    """Without its bound exp(58 / 2) squared overflows in BatchNorm's running variance, and no checkpoint is written."""
    torch.manual_seed(0)
    model = DefenseVAE().train()
    logvar = model.get_submodule(model.config.heads[1].name)
    with torch.no_grad():
        logvar.bias.fill_(200.0)  # type: ignore[union-attr, operator]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(torch.rand(8, 1, 28, 28))
    assert float(output.logvar.detach().max()) == MAX_LOGVAR
    (output.logits.float().mean() + output.kl.mean()).backward()  # type: ignore[union-attr]
    tensors = {**model.state_dict(), **{name: weight.grad for name, weight in model.named_parameters()}}
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_classifiers_give_logits(name: str, size: int, channels: int) -> None:
    model = build(name, channels, size, classes=7).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


TABLE_5_PARAMETERS = {
    "A": 5 * 5 * 64 + 64 + 64 * 64 * 25 + 64 + 9216 * 128 + 128 + 1290,
    "B": 64 * 64 + 64 + 64 * 128 * 36 + 128 + 128 * 128 * 25 + 128 + 512 * 10 + 10,
    "C": 128 * 9 + 128 + 128 * 64 * 25 + 64 + 9216 * 128 + 128 + 1290,
    "D": 784 * 200 + 200 + 200 * 200 + 200 + 2010,
    "E": 784 * 200 + 200 + 200 * 200 + 200 + 2010,
}


@pytest.mark.parametrize("name", TABLE_5_PARAMETERS)
def test_table_5_parameter_counts(name: str) -> None:
    assert sum(parameter.numel() for parameter in build(name).parameters()) == TABLE_5_PARAMETERS[name]


def test_classifier_training_learns_and_its_file_gives_it_back(dataset: Dataset, tmp_path: Path) -> None:
    model = fit_classifier("D", dataset, epochs=12, batch_size=30, learning_rate=2e-3)
    assert accuracy(model, dataset.train) > 75
    path = tmp_path / "d.safetensors"
    save_classifier(path, "D", model, {"channels": 1, "image_size": 28, "classes": 10})
    loaded, header = load_classifier(path)
    assert header["name"] == "D"
    images = to_float(dataset.test.images)
    torch.testing.assert_close(loaded(images), model(images), atol=0.05, rtol=0.02)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a classifier"):
        load_classifier(path)


def test_colour_classifiers_of_table_5_centre_what_they_see() -> None:
    gray_image = torch.full((1, 3, 32, 32), 0.5)
    network = build("D", 3, 32)
    inner: torch.Tensor = network[0](gray_image)  # type: ignore[index, operator]
    assert torch.equal(inner, torch.zeros_like(inner))
    for name, channels in (("D", 1), ("residual", 3)):
        assert not any(isinstance(part, Centred) for part in build(name, channels, 32).modules())


def _left_half(name: str) -> Dataset:
    """Two classes that differ in a bright block, of which the left half of an image alone says anything."""
    labels = torch.arange(200) % 2
    images = torch.randint(0, 60, (200, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 14 * label : 14 * label + 14, :10] = 220
    split = Split(images, labels)
    return Dataset(name, split, split, split, ("above", "below"))


def test_photographs_are_mirrored_when_classifiers_learn_and_digits_are_not() -> None:
    found = {}
    for name in ("cifar10_jpeg", "mnist"):
        data = _left_half(name)
        model = fit_classifier("D", data, epochs=10, batch_size=20)
        assert accuracy(model, data.test) > 95
        found[name] = accuracy(model, Split(data.test.images.flip(3), data.test.labels))
    assert found["cifar10_jpeg"] > 95 > 75 > found["mnist"]


# Pairs


def test_order_is_a_new_permutation_every_epoch_and_depends_on_position_alone() -> None:
    whole = Order(10, seed=3).take(0, 30)
    for epoch in whole.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(whole[:10], whole[10:20])
    again = Order(10, seed=3)
    assert torch.equal(torch.cat([again.take(start, 7) for start in range(0, 28, 7)]), whole[:28])
    assert torch.equal(Order(10, seed=3).take(13, 9), whole[13:22])


def test_table_pairs_hold_twelve_attacks_and_the_clean_image(dataset: Dataset, classifier_d: nn.Module) -> None:
    source = TablePairs(dataset.train, {"D": classifier_d}, batch_size=16, seed=0, images=20, cw_images=8)
    rows = 8 * 20 + 4 * 8 + 20
    assert source.steps_per_epoch == rows // 16
    batches = [source.batch(step) for step in range(source.steps_per_epoch + 1)]
    inputs = torch.cat([batch.inputs for batch in batches])[:rows]
    index = torch.cat([batch.clean_index for batch in batches])[:rows]
    # Every attack has other images, so that few of each cover the split.
    counts = index.bincount(minlength=len(dataset.train))
    assert int((counts > 0).sum()) > 100
    assert int(counts.max()) < 5
    distance = (inputs - to_float(dataset.train.images[index])).abs().amax((1, 2, 3))
    # Each image comes once as it is, eight times within an epsilon of at most 0.4, and under CW beyond it.
    assert int((distance == 0).sum()) >= 20
    assert int((distance > 0.4 + 1 / 255).sum()) >= 20
    linf = [attack.epsilon for attack in PAPER_TRAINING_ATTACKS if hasattr(attack, "epsilon")]
    assert sorted(linf) == [0.25, 0.25, 0.3, 0.3, 0.35, 0.35, 0.4, 0.4]


def test_noisy_pairs_move_images_along_random_signs_instead_of_the_gradients(
    dataset: Dataset, classifier_d: nn.Module
) -> None:
    table = {
        "batch_size": 240,
        "seed": 0,
        "images": 120,
        "cw_images": 120,
        "attacks": [FGSM(0.3), CarliniWagnerL2(6.0)],
    }
    plain = TablePairs(dataset.train, {"D": classifier_d}, **table).batch(1)  # type: ignore[arg-type]
    source = TablePairs(dataset.train, {"D": classifier_d}, noise=0.5, **table)  # type: ignore[arg-type]
    torch.manual_seed(5)
    inputs, index = source.batch(1)
    assert torch.equal(index, plain.clean_index)
    clean = to_float(dataset.train.images[index])
    noisy = (inputs != plain.inputs).flatten(1).any(1)
    distance = (plain.inputs - clean).abs().amax((1, 2, 3))
    of_fgsm = (distance > 0.29) & (distance < 0.31)
    assert 0.35 < float(noisy.sum() / of_fgsm.sum()) < 0.65
    assert not bool(noisy[~of_fgsm].any())  # neither clean images nor those of CW
    change, before, middle = (inputs - clean)[noisy], (plain.inputs - clean)[noisy], clean[noisy]
    inside = (middle > 0.4) & (middle < 0.6)  # no step of at most 0.4 is cut off here
    size = change.abs().masked_fill(~inside, 0).amax((1, 2, 3), keepdim=True)
    assert bool(((change.abs() - size).abs()[inside] <= 1.01 / 255).all())
    assert 0.25 - 1 / 255 <= float(size[size > 0].min()) < 0.28
    assert 0.37 < float(size.max()) <= 0.4 + 1 / 255
    # Half of the signs are the gradient's by chance.
    agreement = float((change.sign() == before.sign())[inside].float().mean())
    assert 0.45 < agreement < 0.55
    # Neighbours agree by chance where the noise is as it was drawn, and mostly where it is averaged over 3 or 5 pixels.
    both = inside[..., 1:] & inside[..., :-1]
    same = (change.sign()[..., 1:] == change.sign()[..., :-1]) & both
    alike = (same.sum((1, 2, 3)) / both.sum((1, 2, 3)))[both.sum((1, 2, 3)) > 60]
    assert float(alike.min()) < 0.6
    assert float(alike.max()) > 0.75
    torch.manual_seed(6)
    assert not torch.equal(source.batch(1).inputs, inputs)
    with pytest.raises(ValueError, match=r"noise: expected FGSM or RAND-FGSM among the attacks, got Carlini"):
        TablePairs(dataset.train, {"D": classifier_d}, batch_size=4, seed=0, attacks=[CarliniWagnerL2(6.0)], noise=0.5)


def test_fly_pairs_attack_most_of_a_batch_and_repeat_with_the_seed(dataset: Dataset, classifier_d: nn.Module) -> None:
    source = FlyPairs(dataset.train, [classifier_d], attacked=24, clean=8, seed=0)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return source.batch(step)

    for step, iterated in ((2, "pgd"), (3, "cw")):
        inputs, index = batch(step)
        clean = to_float(dataset.train.images[index])
        assert torch.equal(inputs[24:], clean[24:])
        distance = (inputs - clean)[:24].abs().amax((1, 2, 3))
        assert float(distance[:12].min()) >= 0.02 - 1 / 255
        assert float(distance[:12].max()) <= 0.45 + 1 / 255
        if iterated == "pgd":
            assert float(distance[12:].max()) <= 0.4 + 1 / 255
        else:
            # CW leaves an image alone that was misclassified to begin with.
            assert int((distance[12:] > 0.5).sum()) >= 8
        wrong = (classifier_d(inputs[:24]).argmax(1) != dataset.train.labels[index[:24]]).float().mean()
        assert float(wrong) > 0.6
        assert torch.equal(batch(step)[0], inputs)


def test_kept_attacked_images_are_taken_again_and_never_for_another_attack(
    dataset: Dataset, classifier_d: nn.Module, tmp_path: Path
) -> None:
    def made(attack: Attack = FGSM(0.3), split: Split = dataset.test, **options: Any) -> Tensor:  # noqa: B008
        return attacked_images(attack, classifier_d, split, folder=tmp_path / "kept", **options)

    first = made()
    assert torch.equal(first, attack_all(FGSM(0.3), classifier_d, dataset.test))
    (path,) = (tmp_path / "kept").iterdir()
    # What lies there is what comes back, so it was not made again.
    save_file({"images": 255 - first}, path)
    assert torch.equal(made(), 255 - first)
    for options in ({"attack": FGSM(0.2)}, {"seed": 1}, {"predicted_labels": True}, {"split": dataset.validation}):
        made(**options)
    assert len(list((tmp_path / "kept").iterdir())) == 5
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="expected attacked images kept by an earlier run"):
        made()


def test_predicted_labels_change_the_attack_where_the_classifier_errs(
    dataset: Dataset, classifier_d: nn.Module
) -> None:
    true, guessed = (
        attack_all(FGSM(0.1), classifier_d, dataset.test, predicted_labels=predicted) for predicted in (False, True)
    )
    wrong = classifier_d(to_float(dataset.test.images)).argmax(1) != dataset.test.labels
    same = (true == guessed).flatten(1).all(1)
    assert 0 < int(wrong.sum()) < len(wrong)
    assert bool(same[~wrong].all())
    assert not bool(same[wrong].any())


# The run


def weights(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(tensor.copy()) for name, tensor in load_checkpoint(path).tensors.items()}


@pytest.mark.parametrize(
    "change",
    [{"pairs": "fly"}, {"pairs": "table"}, {"pairs": "table", "noise": 0.5}, {"optimizer": "muon", "mirrored": True}],
    ids=str,
)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(
    change: dict[str, object], dataset: Dataset, classifier_d: nn.Module, tmp_path: Path
) -> None:
    recipe = replace(TINY, images=8, cw_images=2, decay=0.0, **change)  # type: ignore[arg-type]
    whole = fit(dataset, {"D": classifier_d}, recipe, tmp_path / "whole")
    fit(dataset, {"D": classifier_d}, replace(recipe, steps=4), tmp_path / "parts")
    torch.manual_seed(99)
    parts = fit(dataset, {"D": classifier_d}, recipe, tmp_path / "parts", resume=True)
    assert whole.finished
    assert parts.finished
    assert (tmp_path / "whole" / STATE_FILE).read_bytes() == (tmp_path / "parts" / STATE_FILE).read_bytes()
    first, second = weights(whole.checkpoint), weights(parts.checkpoint)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss_and_writes_what_it_promises(
    dataset: Dataset, classifier_d: nn.Module, tmp_path: Path
) -> None:
    recipe = replace(TINY, steps=38, agreement_weight=0.0, averaging=0.5)
    result = fit(dataset, {"D": classifier_d}, recipe, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [18, 36, 38]
    untrained = 784 * math.log(2)
    assert lines[-1]["loss"] < 0.9 * untrained
    assert lines[-1]["loss"] < lines[0]["loss"]
    header = load_checkpoint(result.checkpoint)
    assert header.recipe["classifiers"] == ["D"]
    assert header.recipe["kl_weight"] == 0.0
    assert any("PGD" in attack for attack in header.recipe["attacks"])
    assert header.recipe["steps_made"] == 38
    assert set(header.accuracies["validation"]) == {"clean", "fgsm_0.3"}
    assert header.versions["torch"] == torch.__version__


def test_mirror_images_are_trained_on_too(dataset: Dataset, classifier_d: nn.Module, tmp_path: Path) -> None:
    split = dataset.train
    doubled, count = split.mirrored(), len(split)
    for part in (doubled.first(count), Split(doubled.images[count:], doubled.labels[count:])):
        assert torch.equal(part.labels, split.labels)
        turned = [torch.equal(*pair) for pair in zip(part.images, split.images.flip(-1), strict=True)]
        assert sum(turned) == count // 2
    assert {image.numpy().tobytes() for image in doubled.images} == {
        image.numpy().tobytes() for image in torch.cat([split.images, split.images.flip(-1)])
    }
    recipe = replace(TINY, steps=38, agreement_weight=0.0, mirrored=True)
    result = fit(dataset, {"D": classifier_d}, recipe, tmp_path)
    lines = [json.loads(line)["step"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert lines == [len(doubled) // 16, 38], "an epoch has both"
    assert load_checkpoint(result.checkpoint).recipe["mirrored"]


def test_a_classifier_named_twice_has_more_turns_and_judges_its_own_images(
    dataset: Dataset, classifier_d: nn.Module, tmp_path: Path
) -> None:
    judged: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            # A judge sees what comes out of the purifier; attacks work on images of their own, fewer of them.
            if x.grad_fn is not None and len(x) == recipe.attacked:
                judged.append(self.name)
            result: Tensor = classifier_d(x)
            return result

    recipe = replace(TINY, classifiers=("x", "y", "x"), agreement_weight=0.0, own_agreement_weight=1.0)
    result = fit(dataset, {name: Named(name) for name in ("x", "y")}, recipe, tmp_path)
    assert judged == ["x", "y", "x", "x", "y", "x"]
    assert load_checkpoint(result.checkpoint).recipe["classifiers"] == ["x", "y", "x"]


def test_a_signal_between_a_step_and_its_end_loses_nothing(
    dataset: Dataset, classifier_d: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes right after the first look for one."""

    class Late:
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 1

    monkeypatch.setattr("training.fit.stop_signal", lambda ranks: nullcontext(Late()))
    result = fit(dataset, {"D": classifier_d}, replace(TINY, steps=5), tmp_path)
    assert not result.finished
    with safe_open(tmp_path / STATE_FILE, "pt") as file:
        assert json.loads(file.metadata()["run"])["step"] == result.step
    assert load_checkpoint(result.checkpoint).recipe["steps_made"] == result.step


def test_a_run_is_not_overwritten_and_another_recipe_is_not_resumed(
    dataset: Dataset, classifier_d: nn.Module, tmp_path: Path
) -> None:
    recipe = replace(TINY, steps=2)
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        fit(dataset, {"D": classifier_d}, recipe, tmp_path, resume=True)
    fit(dataset, {"D": classifier_d}, recipe, tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        fit(dataset, {"D": classifier_d}, recipe, tmp_path)
    with pytest.raises(ValueError, match=r"differs in kl_weight \(0.0 there, 1.0 here\)"):
        fit(dataset, {"D": classifier_d}, replace(recipe, kl_weight=1.0), tmp_path, resume=True)
    with pytest.raises(ValueError, match="at most 1 steps, got one that has made 2"):
        fit(dataset, {"D": classifier_d}, replace(recipe, steps=1), tmp_path, resume=True)
    other = replace(dataset, train=dataset.train.take(torch.arange(300).flip(0)))
    with pytest.raises(ValueError, match="differs in data_digest"):
        fit(other, {"D": classifier_d}, recipe, tmp_path, resume=True)
    described = {
        **recipe.to_dict(), "dataset": dataset.name, "data_digest": dataset.digest, "amp": default_amp("cpu"),
    }  # fmt: skip
    save_file(
        {"random.cpu": torch.get_rng_state()}, tmp_path / STATE_FILE, {"run": json.dumps({"step": 1, **described})}
    )
    with pytest.raises(ValueError, match="delete it to start anew"):
        fit(dataset, {"D": classifier_d}, recipe, tmp_path, resume=True)
    (tmp_path / STATE_FILE).write_bytes(b"12345678")
    with pytest.raises(ValueError, match="delete it to start anew"):
        fit(dataset, {"D": classifier_d}, recipe, tmp_path, resume=True)


def test_a_run_can_start_from_a_purifier(dataset: Dataset, classifier_d: nn.Module, tmp_path: Path) -> None:
    recipe = replace(TINY, steps=1, averaging=0.0, learning_rate=1e-9)
    first = fit(dataset, {"D": classifier_d}, replace(recipe, seed=1), tmp_path / "first")
    init = load_checkpoint(first.checkpoint)
    second = fit(dataset, {"D": classifier_d}, recipe, tmp_path / "second", init=init)
    before, after = weights(first.checkpoint), weights(second.checkpoint)
    torch.testing.assert_close(after["encoder2.weight"], before["encoder2.weight"], atol=1e-4, rtol=0)
    assert load_checkpoint(second.checkpoint).recipe["init"] == {"digest": init.digest, **init.recipe}
    with pytest.raises(ValueError, match="init: expected a purifier of the shape"):
        fit(dataset, {"D": classifier_d}, replace(recipe, latent_dim=16), tmp_path / "third", init=init)


def test_evaluate_on_a_purifier_that_changes_nothing_is_exact(
    dataset: Dataset, classifier_d: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DefenseVAE().eval()
    monkeypatch.setattr(model, "purify", lambda images: images)
    cells = evaluate(model, {"D": classifier_d}, dataset.test, {"fgsm": FGSM(0.3)}, dataset="fashion_mnist")
    clean, attacked = cells
    assert clean.bare == clean.purified == accuracy(classifier_d, dataset.test)
    assert attacked.bare == attacked.purified < 30
    assert attacked.paper == 85.36
    assert summary(cells) == {"attacked_mean": attacked.purified, "clean_loss": 0.0}


def test_the_papers_numbers_beside_ours() -> None:
    assert paper_accuracy("fashion_mnist", "fgsm", "D") == 85.36
    assert paper_accuracy("cifar10_jpeg", "fgsm", "A") == 44.86
    assert paper_accuracy("cifar10_jpeg", "fgsm", "B") is None
    assert paper_accuracy("", "fgsm", "A") is None


@pytest.mark.parametrize("dataset", list_pretrained())
def test_every_shipped_purifier_has_its_classifiers(dataset: str) -> None:
    for name in (*paper_classifiers(dataset), HELD_OUT):
        assert (pool.CLASSIFIER_FOLDER / f"{dataset}_{name}.safetensors").is_file()


# Recipes and commands


@pytest.mark.parametrize("name", PRESETS)
def test_learning_rate_stays_within_its_peak(name: str) -> None:
    recipe = preset(name)
    rates = [recipe.rate(step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert min(rates) > 0
    assert rates[-1] == pytest.approx(recipe.learning_rate / (recipe.decay * 1000) if recipe.decay else rates[0])


@pytest.mark.parametrize(("name", "attacked", "clean"), [("polish", 80, 48), ("pooled", 96, 32), ("paper", 128, 0)])
def test_another_batch_keeps_the_share_of_clean_images(name: str, attacked: int, clean: int) -> None:
    recipe = preset(name, batch_size=128)
    assert (recipe.attacked, recipe.clean) == (attacked, clean)


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": "both"}, {"classifiers": ()}, {"steps": 0}, {"epochs": 3}, {"attacked": 0}, {"kl_weight": -1.0},
        {"learning_rate": 0.0}, {"averaging": 1.0}, {"kl_weight": math.nan}, {"steps": 1.5},
        {"latent_dim": 0}, {"agreement_weight": math.inf}, {"pairs": "table", "own_agreement_weight": 1.0},
        {"pairs": "fly", "noise": 0.5}, {"pairs": "table", "noise": 1.0}, {"optimizer": "sgd"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_recipes(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"recipe.*expected"):
        replace(TINY, **change)  # type: ignore[arg-type]


MY_CLASSIFIER = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
"""


def test_fit_on_own_images_and_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, level in (("dark", 60), ("light", 190)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (32, 32), (level + number, level, level)).save(folder / f"{number}.png")
    (tmp_path / "mine.py").write_text(MY_CLASSIFIER)
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "images", "--classifier", "mine:make", "--preset", "pooled", "--steps", "2", "--device", "cpu"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    path = tmp_path / "runs" / "images-pooled" / CHECKPOINT_FILE
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == VAEConfig(32, 3)
    assert checkpoint.recipe["class_names"] == ["dark", "light"]
    measured = [
        "evaluate",
        "images",
        "--checkpoint",
        str(path),
        "--classifier",
        "mine:make",
        "--json",
        "out/cells.json",
    ]
    assert CliRunner().invoke(cli, [*measured, "--save", "out/kept.safetensors"], catch_exceptions=False).exit_code == 0
    cells = json.loads((tmp_path / "out" / "cells.json").read_text())["sections"]["attacked classifiers"]["cells"]
    assert [cell["attack"] for cell in cells] == ["clean", "fgsm", "rand_fgsm", "cw"]
    kept = load_checkpoint(tmp_path / "out" / "kept.safetensors").accuracies
    section = kept[f"{cells[0]['images']} test images, attacks away from true labels"]["attacked classifiers"]
    assert section["mine:make"]["clean"] == [cells[0]["bare"], cells[0]["purified"]]


OWN_CLASSIFIERS = """
import torch
from torch import nn
def broken():
    raise RuntimeError("no weights")
def tuples():
    class Two(nn.Flatten):
        def forward(self, x):
            return super().forward(x), None
    return Two()
def colour():
    return nn.Sequential(nn.Conv2d(3, 2, 28), nn.Flatten())
def eleven():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 11))
def number():
    return 3
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "RuntimeError: no weights"),
        ("tuples", "expected floating logits"),
        ("colour", "RuntimeError"),
        ("eleven", r"expected floating logits \(2, 10\).*\(2, 11\)"),
        ("number", "expected a torch.nn.Module, got int"),
        ("missing", "AttributeError"),
    ],
)
def test_what_is_wrong_with_an_own_classifier_is_said(
    function: str, message: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_classifiers.py").write_text(OWN_CLASSIFIERS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        pool.own(f"own_classifiers:{function}", dataset, torch.device("cpu"))


def test_a_classifier_of_other_classes_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """A folder of the same name, with its classes in another order, must not get it."""
    device = torch.device("cpu")
    pool.for_run("E", dataset, tmp_path, 1, device)
    pool.for_run("E", dataset, tmp_path, 1, device)
    turned = replace(dataset, class_names=dataset.class_names[::-1])
    with pytest.raises(ValueError, match="expected a classifier with class_names"):
        pool.for_run("E", turned, tmp_path, 1, device)


def test_a_shipped_classifier_is_not_replaced_by_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CLASSIFIER_FOLDER", tmp_path)
    for name in ("dark", "light"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (28, 28), number + 100 * (name == "light")).save(tmp_path / "pets" / name / f"{number}.png")
    command = ["classifier", str(tmp_path / "pets"), "E", "--epochs", "1", "--batch-size", "5", "--device", "cpu"]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    kept = (tmp_path / "pets_E.safetensors").read_bytes()
    assert load_classifier(tmp_path / "pets_E.safetensors")[1]["batch_size"] == 5
    with pytest.raises(FileExistsError, match="--force"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert (tmp_path / "pets_E.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "no/such/folder"], "expected one of fashion_mnist, mnist, cifar10_jpeg, celeba or a folder"),
        (["fit", "fashion_mnist", "--classifiers", "A,Z"], "got Z"),
        (["fit", "fashion_mnist", "--classifiers", "A", "--classifier", "a:b"], "got both"),
        (["fit", "fashion_mnist", "--kl-weight", "nan"], "expected a finite number"),
        (["evaluate", "fashion_mnist", "--images", "0"], "not in the range"),
        (["evaluate", "fashion_mnist", "--checkpoint", "nothing"], "no such file"),
        (["fit", "fashion_mnist", "--device", "cuda:99"], "device: expected 'auto' or a device usable here"),
    ],
    ids=["data", "names", "both", "nan", "count", "checkpoint", "device"],
)
def test_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    for name, level in (("dark", 60), ("light", 190)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("L", (28, 28), level + number).save(folder / f"{number}.png")
    (tmp_path / "mine.py").write_text(MY_CLASSIFIER.replace("3 * 32 * 32", "784"))
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "training", "fit", str(tmp_path / "images"), "--classifier", "mine:make"]
    process = subprocess.Popen(
        [*command, "--preset", "pooled", "--steps", "100000", "--out", str(tmp_path / "run"), "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path(root)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / STATE_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume goes on" in errors
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT_FILE).recipe["steps_made"] >= 1
