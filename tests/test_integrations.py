"""Each toolbox with the real library."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import art.attacks.evasion
import foolbox
import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from PIL import Image
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_images import pixels
from test_video import encode, noise
from torch import Tensor, nn
from torch.nn import functional as F

from defense_vae_fast import Purifier
from defense_vae_fast.integrations.art import DefenseVAEPreprocessor
from defense_vae_fast.integrations.foolbox import foolbox_model
from defense_vae_fast.integrations.lazy import LazyPurifier
from defense_vae_fast.integrations.sklearn import PurifyTransformer
from defense_vae_fast.integrations.torchvision import Purify

ROOT = Path(__file__).parents[1]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def shipped() -> Iterator[Purifier]:
    with Purifier.from_pretrained("fashion_mnist", precision="fp32") as purifier:
        yield purifier


@pytest.fixture(scope="module")
def some(demo_images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sixteen clean images in [0, 1], and their labels."""
    return demo_images[0][:16].float() / 255, demo_images[1][:16]


def plain_pgd(model: nn.Module, images: Tensor, labels: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """Madry's PGD without a random start, written down once more."""
    attacked = images.clone()
    for _ in range(steps):
        attacked.requires_grad_()
        [gradient] = torch.autograd.grad(F.cross_entropy(model(attacked), labels, reduction="sum"), attacked)
        attacked = (attacked.detach() + step * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    return attacked.detach()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


def as_art(purifier: Purifier, classifier: nn.Module, **options: Any) -> PyTorchClassifier:
    return PyTorchClassifier(
        classifier,
        nn.CrossEntropyLoss(),
        (1, 28, 28),
        10,
        clip_values=(0, 1),
        preprocessing_defences=DefenseVAEPreprocessor(purifier, device_type="cpu"),
        device_type="cpu",
        **options,
    )


# ART


def test_art_purifies_and_has_the_exact_gradient(shipped: Purifier, some: tuple[Tensor, Tensor]) -> None:
    images = some[0][:5]
    defence = DefenseVAEPreprocessor(shipped, device_type="cpu")
    assert (defence.is_fitted, defence.apply_fit, defence.apply_predict) == (True, False, True)
    labels = np.arange(5)
    purified, same = defence(images.numpy(), labels)
    np.testing.assert_array_equal(same, labels)
    assert purified.dtype == np.float32
    np.testing.assert_allclose(purified, shipped(images.numpy()), atol=1e-4)

    module = shipped.defend(nn.Identity())
    weights = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    leaf = images.clone().requires_grad_()
    [expected] = torch.autograd.grad((module(leaf) * weights).sum(), leaf)
    gradient = defence.estimate_gradient(images.numpy(), weights.numpy())
    assert np.abs(gradient).max() > 0
    np.testing.assert_array_equal(gradient, expected.numpy())
    # The exact gradient in float64: along a direction it predicts the change of the output.
    double = module.double()
    direction = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)).double() - 0.5
    inside = images.double() * 0.9 + 0.05
    ends = [(double(inside + sign * 1e-6 * direction) * weights).sum() for sign in (1, -1)]
    leaf = inside.clone().requires_grad_()
    [exact] = torch.autograd.grad((double(leaf) * weights).sum(), leaf)
    assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float((exact * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("eps", [0.05, 0.1])
def test_arts_pgd_sees_the_purifier(
    shipped: Purifier, classifier_d: nn.Module, some: tuple[Tensor, Tensor], eps: float
) -> None:
    """Image for image what plain PGD through ``defend`` makes, up to signs of gradients that are nearly nothing."""
    images, labels = some
    attack = art.attacks.evasion.ProjectedGradientDescent(
        as_art(shipped, classifier_d), eps=eps, eps_step=eps / 4, max_iter=4, batch_size=16, verbose=False
    )
    theirs = torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))
    defended = shipped.defend(classifier_d)
    ours = plain_pgd(defended, images, labels, eps, eps / 4, 4)
    assert ((theirs - ours).abs() > 1e-5).float().mean() < 0.02
    adaptive = accuracy(defended, theirs, labels)
    assert abs(adaptive - accuracy(defended, ours, labels)) <= 0.01 + 1 / len(labels)
    # An oblivious attack of the same strength does less: the toolbox did see the purifier.
    oblivious = plain_pgd(classifier_d, images, labels, eps, eps / 4, 4)
    assert adaptive < accuracy(defended, oblivious, labels)


def test_art_predicts_through_normalisation_after_the_purifier(
    shipped: Purifier, classifier_d: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    images, _ = some
    estimator = as_art(shipped, classifier_d, preprocessing=(0.1, 2.0))
    with torch.no_grad():
        expected = shipped.defend(classifier_d, mean=[0.1], std=[2.0])(images)
    np.testing.assert_allclose(estimator.predict(images.numpy()), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(("scale", "shift"), [(255, 0), (1, -0.5)], ids=["0..255", "centred"])
def test_art_refuses_other_bounds(shipped: Purifier, scale: float, shift: float) -> None:
    images = pixels((2, 1, 28, 28), "f4") * scale + shift
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\], got .*clip_values=\(0, 1\)"):
        DefenseVAEPreprocessor(shipped, device_type="cpu")(images.astype("f4"))


# Foolbox and AutoAttack's kind


def test_foolboxs_pgd_sees_the_purifier(
    shipped: Purifier, classifier_d: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    eps = 0.1
    images, labels = some
    model = foolbox_model(shipped, classifier_d)
    assert tuple(model.bounds) == (0, 1)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=eps / 4, steps=4, random_start=False)
    _, theirs, success = attack(model, images, labels, epsilons=eps)
    defended = shipped.defend(classifier_d)
    ours = plain_pgd(defended, images, labels, eps, eps / 4, 4)
    assert ((theirs - ours).abs() > 1e-5).float().mean() < 0.02
    assert abs(1 - float(success.double().mean()) - accuracy(defended, ours, labels)) <= 0.01 + 1 / len(labels)


def test_a_model_as_autoattack_wants_it(
    shipped: Purifier, classifier_d: nn.Module, some: tuple[Tensor, Tensor]
) -> None:
    """Its own checks: deterministic, logits and not probabilities, gradients that are not zero, no mode to leave."""
    images, labels = some
    defended = shipped.defend(classifier_d).eval()
    assert not defended.training
    leaf = images.clone().requires_grad_()
    logits = defended(leaf)
    assert logits.shape == (len(images), 10)
    assert torch.equal(logits, defended(images))
    assert not torch.allclose(logits.sum(1), torch.ones(len(images)), atol=0.1)
    [gradient] = torch.autograd.grad(F.cross_entropy(logits, labels), leaf)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert not any(parameter.requires_grad for parameter in defended.vae.parameters())


def test_torchattacks(shipped: Purifier, classifier_d: nn.Module, some: tuple[Tensor, Tensor]) -> None:
    torchattacks = pytest.importorskip(
        "torchattacks", reason="torchattacks needs torchvision and an old requests, so it is in no extra"
    )
    images, labels = some
    defended = shipped.defend(classifier_d).eval()
    theirs = torchattacks.PGD(defended, eps=0.1, alpha=0.025, steps=4, random_start=False)(images, labels)
    ours = plain_pgd(defended, images, labels, 0.1, 0.025, 4)
    assert ((theirs - ours).abs() > 1e-5).float().mean() < 0.02


# torchvision's kind of transform


Sample = namedtuple("Sample", "image mask")


def test_transform(checkpoint_path: Path) -> None:
    purify = Purify(checkpoint_path, engine="openvino")
    frame = pixels((28, 28))
    uint8, floating = torch.from_numpy(frame)[None], torch.from_numpy(frame / 255)[None].float()
    with Purifier.from_pretrained(checkpoint_path, engine="openvino") as purifier:
        expected = torch.from_numpy(purifier(frame))[None]
        expected_floating = purifier(floating)
    assert torch.equal(purify(uint8), expected)
    assert purify(uint8).is_contiguous()
    assert torch.equal(purify(floating), expected_floating)
    assert torch.equal(purify(torch.stack([uint8, uint8])), torch.stack([expected, expected]))
    pil = Image.fromarray(frame)
    assert np.array_equal(np.asarray(purify(pil)), expected[0].numpy())
    # Only what is an image is touched, in any nesting; of plain tensors that is the first.
    label, mask = torch.tensor(3), torch.zeros(1, 28, 28)
    image, (same_label, others) = purify(uint8, (label, {"mask": mask, "name": "shoe"}))
    assert torch.equal(image, expected)
    assert same_label is label
    assert others["mask"] is mask
    assert others["name"] == "shoe"
    sample = purify([Sample(pil, uint8)])
    assert type(sample[0]) is Sample
    assert sample[0].mask is uint8  # beside a PIL image a plain tensor is none
    assert np.array_equal(np.asarray(sample[0].image), expected[0].numpy())
    assert purify("nothing", 3) == ("nothing", 3)
    with pytest.raises(ValueError, match="expected"):
        purify(torch.zeros(1, 27, 28))


def _purified_elsewhere(purify: Purify, tensor: Tensor) -> Array:
    return np.asarray(purify(tensor))


def test_transforms_go_to_other_processes(checkpoint_path: Path) -> None:
    purify = Purify(checkpoint_path, engine="openvino")
    tensor = torch.from_numpy(pixels((28, 28)))[None]
    here = purify(tensor).numpy()  # a Purifier exists here, and stays here
    copied = pickle.loads(pickle.dumps(purify))
    assert copied._purifier._made is None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(_purified_elsewhere, (purify, tensor))
    np.testing.assert_array_equal(here, there)
    assert repr(purify) == f"Purify({checkpoint_path!r})"


def test_a_lazy_purifier_is_made_once(checkpoint_path: Path) -> None:
    lazy = LazyPurifier(checkpoint_path, engine="openvino", max_batch=7)
    assert lazy.get() is lazy.get()
    assert lazy.get().info()["max_batch"] == 7


# scikit-learn


def test_sklearn(checkpoint_path: Path) -> None:
    step = PurifyTransformer(checkpoint_path)
    images = pixels((6, 1, 28, 28), "f8")
    with Purifier.from_pretrained(checkpoint_path) as purifier:
        expected = purifier(images)
    rows = step.fit_transform(images.reshape(6, -1))
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, expected.reshape(6, -1))
    np.testing.assert_array_equal(step.transform(images), expected)
    assert clone(step).get_params() == {"checkpoint": checkpoint_path, "engine": "auto"}
    again = pickle.loads(pickle.dumps(step))
    np.testing.assert_array_equal(again.transform(images), expected)
    scaled = make_pipeline(step, StandardScaler()).fit_transform(images.reshape(6, -1))
    assert scaled.shape == (6, 784)
    with pytest.raises(ValueError, match=r"X: expected \(N, 1 x 28 x 28\) pixels in a row, got \(6, 10\)"):
        step.transform(np.zeros((6, 10)))
    step.set_params(engine="abacus")
    with pytest.raises(ValueError, match="engine: expected"):
        step.transform(images)


# The documentation


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    """All in one fresh program, as the page says, and without a warning of ours."""
    text = (ROOT / "docs" / "embedding.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    code = "\n\n".join(blocks) + CHECKS
    (tmp_path / "examples.py").write_text(code)
    encode(tmp_path / "street.mp4", noise(4, 90, 160, 3))
    (tmp_path / "detections.jsonl").write_text('{"boxes": [[10, 10, 60, 60]]}')
    done = subprocess.run(
        [sys.executable, "examples.py"], capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 'defense_vae_fast_stream_frames_out_total{stream="entrance"} 1.0' in done.stdout
    assert "camera 3" in done.stdout


CHECKS = """
assert len(results) == len(answers) == 64 and all(answer.image is not None for answer in answers)
assert found.images.shape == (2, 32, 32, 1) and clean.shape == tiled.frame.shape == frame.shape
assert attacked.shape == tensors.shape and logits.shape == (8, 10)
assert image.shape == (1, 28, 28) and label == 7
assert report.purified == 4 and Path("clean.mp4").is_file()
assert both["purified"].shape == (8, 28, 28, 1) and both["score"].shape == (8,) and both["logits"].shape == (8, 10)
"""


def test_the_base_install_has_no_toolbox() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    [base] = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    for toolbox in (
        "torch",
        "opencv",
        "prometheus",
        "adversarial",
        "foolbox",
        "scikit",
        "av",
        "ray",
        "pyarrow",
        "nvidia",
        "tritonclient",
    ):
        assert not re.search(rf'"{toolbox}\b', base), toolbox
