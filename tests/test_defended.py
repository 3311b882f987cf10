"""The purifier and a classifier as one differentiable module."""

from __future__ import annotations

import foolbox
import pytest
import torch
from conftest import random_checkpoint
from torch import nn

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.nn.defended import PurifiedClassifier
from defense_vae_fast.nn.model import DefenseVAE


def small_classifier(channels=1, side=28):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * side * side, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )


@pytest.fixture
def vae(checkpoint):
    return DefenseVAE.from_checkpoint(checkpoint)


@pytest.fixture
def images():
    return torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_forward_is_classifier_after_normalisation_after_purification():
    config = VAEConfig(32, 3)
    vae = DefenseVAE.from_checkpoint(random_checkpoint(config, 0))
    classifier = small_classifier(3, 32).eval()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    x = torch.rand(2, 3, 32, 32)
    purified = vae.purify(x)
    normalised = torch.stack([(purified[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    defended = PurifiedClassifier(vae, classifier, mean, std)
    torch.testing.assert_close(defended(x), classifier(normalised))
    torch.testing.assert_close(defended.purify(x), purified)
    torch.testing.assert_close(PurifiedClassifier(vae, classifier)(x), classifier(purified))


def test_gradient_of_the_input_matches_finite_differences(vae, images):
    defended = PurifiedClassifier(vae.double(), small_classifier().double().eval(), [0.3], [0.3])
    x = images[:1].double().requires_grad_()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(defended(x)[0, 3], x)
    step = 1e-7
    with torch.no_grad():
        difference = (defended(x + step * direction) - defended(x - step * direction))[0, 3] / (2 * step)
    assert gradient.abs().max() > 0
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-8)


def test_training_the_classifier_leaves_the_purifier_as_it_is(vae, images):
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    defended = PurifiedClassifier(vae.train(), small_classifier()).train()
    assert defended.classifier.training
    assert not any(module.training for module in vae.modules())
    purified = defended.purify(images)
    optimizer = torch.optim.SGD([p for p in defended.parameters() if p.requires_grad], 0.1)
    nn.functional.cross_entropy(defended(images), torch.arange(4)).backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert torch.equal(defended.purify(images), purified)
    assert not defended.eval().classifier.training


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_does_not_change_the_classifiers_mode(vae, training):
    classifier = small_classifier().train(training)
    defended = PurifiedClassifier(vae, classifier)
    assert classifier.training is defended.training is training


def test_foolbox_attacks_the_whole_defence(vae, images):
    defended = PurifiedClassifier(vae, small_classifier(), [0.3], [0.3]).eval()
    model = foolbox.PyTorchModel(defended, bounds=(0, 1), device="cpu")
    labels = defended(images).argmax(1)
    loss = nn.functional.cross_entropy(defended(images), labels)
    _, attacked, _ = foolbox.attacks.LinfPGD(steps=5)(model, images, labels, epsilons=0.1)
    assert (attacked - images).abs().max() <= 0.1 + 1e-6
    assert nn.functional.cross_entropy(defended(attacked), labels) > loss  # it climbs: the gradient is the true one


def test_normalisation_follows_the_module_to_another_dtype(vae, images):
    defended = PurifiedClassifier(vae, small_classifier().eval(), [0.3], [0.3]).double()
    assert defended(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], None, "expected both or neither"),
        (None, [0.5], "expected both or neither"),
        ([0.5, 0.5], [1.0], "mean: expected 1 finite numbers"),
        ([0.5], [0.0], "std: expected 1 positive finite numbers"),
        ([float("nan")], [1.0], "mean: expected 1 finite numbers"),
    ],
)
def test_wrong_normalisation_is_refused(vae, mean, std, message):
    with pytest.raises(ValueError, match=message):
        PurifiedClassifier(vae, small_classifier(), mean, std)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.5, 0.5, "mean: expected a sequence of 1 number.*, got 0.5 of the type float; pass a list"),
        ([0.5], 0.5, "std: expected a sequence of 1 number.*, got 0.5 of the type float; pass a list"),
        (["a"], [0.5], "mean: expected a sequence of 1 number"),
        ([None], [0.5], "mean: expected a sequence of 1 number"),
    ],
)
def test_normalisation_that_is_no_sequence_of_numbers_is_refused(vae, mean, std, message):
    with pytest.raises(TypeError, match=message):
        PurifiedClassifier(vae, small_classifier(), mean, std)


@pytest.mark.parametrize("classifier", [None, lambda x: x, small_classifier], ids=["None", "lambda", "function"])
def test_a_classifier_that_is_no_module_is_refused(vae, classifier):
    with pytest.raises(TypeError, match=r"classifier: expected a torch\.nn\.Module, got .*; wrap a function"):
        PurifiedClassifier(vae, classifier)


def test_normalisation_lies_where_the_purifier_does(vae):
    defended = PurifiedClassifier(vae.to("meta"), small_classifier().to("meta"), [0.3], [0.3])
    assert defended.mean.device == defended.std.device == torch.device("meta")


@pytest.mark.parametrize(
    "x",
    [torch.zeros(28, 28), torch.zeros(1, 3, 28, 28), torch.zeros(1, 1, 28, 28, dtype=torch.uint8)],
    ids=["2d", "rgb", "uint8"],
)
def test_wrong_images_are_refused(vae, x):
    with pytest.raises(ValueError, match=r"expected floating \(N, 1, 28, 28\)"):
        PurifiedClassifier(vae, small_classifier())(x)
