"""Defense-GAN's generator and search: shapes, the optimiser's rule, the choice of the best start, determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from training.baselines.defense_gan import LATENT_DIM, Generator, reconstruct


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(seed=1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images(generator: Generator) -> Tensor:
    """Three images that the generator can make."""
    made: Tensor = generator(torch.randn(3, LATENT_DIM, generator=torch.Generator().manual_seed(5)))
    return made


@pytest.fixture(scope="module")
def errors(generator: Generator, images: Tensor) -> dict[int, Tensor]:
    """Errors after L steps from the same three starts."""
    return {steps: reconstruct(generator, images, steps, 3, seed=3).errors for steps in (0, 10, 50, 200)}


@pytest.mark.parametrize("count", [1, 7], ids=lambda n: f"n{n}")
def test_generator_makes_images(generator: Generator, count: int) -> None:
    z = torch.randn(count, LATENT_DIM, generator=torch.Generator().manual_seed(count))
    made = generator(z)
    assert made.shape == (count, 1, 28, 28)
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.std() > 0.1  # an untrained generator still makes pictures with contrast


def test_generator_crops_eight_to_seven(generator: Generator) -> None:
    """The layer without output padding gives what the 8x8 map cropped to 7x7 gives."""
    x = torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(0))
    layer = generator.up[0]
    whole = torch.nn.functional.conv_transpose2d(x, layer.weight, layer.bias, 2, 2, output_padding=1)
    assert whole.shape[-2:] == (8, 8)
    torch.testing.assert_close(layer(x), whole[:, :, :7, :7])


def test_generator_seed() -> None:
    same, other = Generator(seed=4).state_dict(), Generator(seed=5).state_dict()
    again = Generator(seed=4).state_dict()
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["up.1.weight"], other["up.1.weight"])


def test_error_falls_with_steps(errors: dict[int, Tensor]) -> None:
    for fewer, more in ((0, 10), (10, 50), (50, 200)):
        assert (errors[more] < errors[fewer]).all(), (fewer, more)


def test_recovers_what_the_generator_can_make(errors: dict[int, Tensor], images: Tensor) -> None:
    """200 steps explain nine tenths of the variance that a constant image leaves."""
    variance = images.flatten(1).var(1, unbiased=False)
    assert (errors[200] < 0.1 * variance).all()


def test_errors_are_those_of_the_images(generator: Generator, images: Tensor) -> None:
    found = reconstruct(generator, images, 5, 2, seed=7)
    assert found.images.shape == images.shape
    assert found.errors.shape == (3,)
    assert not found.images.requires_grad
    torch.testing.assert_close(found.errors, (found.images - images).square().flatten(1).mean(1))


def test_keeps_the_best_start(generator: Generator, images: Tensor) -> None:
    """R starts of one image equal R copies of the image with one start each, of which the best is kept."""
    restarts = 4
    together = reconstruct(generator, images, 6, restarts, seed=2)
    apart = reconstruct(generator, images.repeat_interleave(restarts, 0), 6, 1, seed=2)
    candidates = apart.errors.view(3, restarts)
    best = candidates.argmin(1)
    assert (candidates.max(1).values > candidates.min(1).values).all()
    torch.testing.assert_close(together.errors, candidates.min(1).values, rtol=1e-4, atol=0)
    chosen = apart.images.view(3, restarts, 1, 28, 28)[torch.arange(3), best]
    torch.testing.assert_close(together.images, chosen, rtol=0, atol=1e-4)


def test_images_do_not_touch_each_other(generator: Generator, images: Tensor) -> None:
    """The first image's starts are the first draws, so it is found alike alone and in company."""
    alone = reconstruct(generator, images[:1], 8, 2, seed=9)
    company = reconstruct(generator, images, 8, 2, seed=9)
    torch.testing.assert_close(alone.errors, company.errors[:1], rtol=1e-4, atol=0)


def test_deterministic_with_a_seed(generator: Generator, images: Tensor) -> None:
    first, again, other = (reconstruct(generator, images, 4, 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.errors, again.errors)
    assert not torch.equal(first.images, other.images)


def test_momentum_and_decay() -> None:
    """On a linear generator the search is gradient descent with momentum, worked out by hand in float64."""
    steps, rate, momentum, seed = 10, 3.0, 0.7, 6
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed)) * 5**-0.5
    found = reconstruct(
        lambda z: (z @ weights).view(-1, 1, 2, 2), target, steps, 1,
        latent_dim=5, learning_rate=rate / 100, momentum=momentum, seed=seed,
    )  # fmt: skip
    z, velocity = start.double(), torch.zeros(1, 5, dtype=torch.float64)
    for step in range(steps):
        residual = z @ weights - target.view(1, 4)
        velocity = momentum * velocity + 2 / 4 * residual @ weights.T
        z = z - (rate / 100 if step < 8 else rate / 1000) * velocity
    torch.testing.assert_close(found.images.view(1, 4), z @ weights)


def test_needs_no_frozen_weights_and_leaves_them_alone(images: Tensor) -> None:
    live = Generator(seed=1).eval()
    with torch.no_grad():  # a caller's no_grad does not stop the search either
        found = reconstruct(live, images, 3, 1)
    assert all(parameter.grad is None for parameter in live.parameters())
    assert (found.errors < reconstruct(live, images, 0, 1).errors).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"images": torch.zeros(2, 28, 28)}, "images: expected floating", id="three-axes"),
        pytest.param({"images": torch.zeros(1, 1, 28, 28, dtype=torch.uint8)}, "images: expected floating", id="uint8"),
        pytest.param({"images": torch.zeros(0, 1, 28, 28)}, "N >= 1", id="empty"),
        pytest.param({"steps": -1}, "steps: expected 0 or more, got -1", id="steps"),
        pytest.param({"restarts": 0}, "restarts: expected 1 or more, got 0", id="restarts"),
        pytest.param({"latent_dim": 0}, "latent_dim: expected 1 or more", id="latent"),
        pytest.param({"learning_rate": math.nan}, "learning_rate: expected a finite value", id="rate"),
        pytest.param({"momentum": 1.0}, "momentum: expected a value in", id="momentum"),
    ],
)
def test_refuses(generator: Generator, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": torch.zeros(1, 1, 28, 28), "steps": 1, "restarts": 1, **change}
    with pytest.raises(ValueError, match=message):
        reconstruct(generator, **arguments)


def test_generator_refuses_an_empty_latent() -> None:
    with pytest.raises(ValueError, match="latent_dim: expected at least 1, got 0"):
        Generator(latent_dim=0)
