"""Training of Defense-GAN's generator: WGAN-GP (Gulrajani et al., NeurIPS 2017), on clean images alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from defense_vae_fast.atomic import replacing
from training.baselines.defense_gan import LATENT_DIM, Generator, reconstruct, stage_widths
from training.data import Dataset, to_float, to_uint8
from training.defences import Defence, purifying
from training.device import place
from training.loop import Run
from training.pairs import Order
from training.precision import autocast

GENERATOR_FILE = "generator.safetensors"
SEARCH_BATCH = 25  # images searched at once; R times as many candidates travel together


class Critic(nn.Module):
    """(N, C, H, W) images -> (N,) scores: 5x5 convolutions of stride 2 with LeakyReLU, the generator's mirror image.

    It has no BatchNorm: the gradient penalty is of each image alone.
    """

    def __init__(self, channels: int = 1, size: int = 28) -> None:
        super().__init__()
        widths = stage_widths(channels, size)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 5, stride=2, padding=2) for a, b in pairwise(widths))
        self.score = nn.Linear(widths[-1] * 4 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Score images: high for those that look real."""
        for layer in self.down:
            x = F.leaky_relu(layer(x), 0.2)
        y: Tensor = self.score(x.flatten(1)).squeeze(1)
        return y


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, made: Tensor, share: Tensor) -> Tensor:
    """Mean of (|grad critic(x)| - 1)^2 over images x on the lines between real and made ones.

    Args:
        critic: scores images.
        real: (N, C, H, W) float images.
        made: the same from the generator.
        share: (N,) in [0, 1]: how far along its line each x lies.
    """
    share = share.view(-1, 1, 1, 1)
    between = (real + share * (made - real)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    # The constant keeps the root's derivative finite where an image has no gradient at all.
    return ((gradient.square().flatten(1).sum(1) + 1e-12).sqrt() - 1).square().mean()


@dataclass(frozen=True)
class GanSettings:
    """How the generator is trained; defaults are those of the authors' code.

    Args:
        steps: generator steps (200,000 in the WGAN-GP code that Defense-GAN uses).
        batch_size: images a step of either network.
        critic_steps: critic steps before each generator step.
        penalty: weight of the gradient penalty.
        learning_rate: Adam's, with betas 0.5 and 0.9.
        latent_dim: size of z.
        seed: seeds weights, order and noise.
    """

    steps: int = 200_000
    batch_size: int = 50
    critic_steps: int = 5
    penalty: float = 10.0
    learning_rate: float = 1e-4
    latent_dim: int = LATENT_DIM
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "critic_steps", "latent_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"defense-gan {name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf") or not 0 <= self.penalty < float("inf"):
            raise ValueError(
                "defense-gan: expected learning_rate above 0 and penalty of at least 0, "
                f"got {self.learning_rate} and {self.penalty}"
            )


def train_generator(
    data: Dataset,
    settings: GanSettings,
    out: Path,
    *,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    report_every: int = 1000,
) -> tuple[Generator, bool]:
    """Train a generator of clean images; ``generator.safetensors`` in ``out`` holds it.

    The log has the critic's loss, minus the penalty: an estimate of the Wasserstein distance between real and made
    images, which falls as the images become alike.

    Returns:
        The generator in eval mode, and whether all steps were made.

    Raises:
        FileExistsError, FileNotFoundError: the folder is a run's already, or there is none to resume.
        ValueError: it is another run's, or no generator has the images' size.
    """
    device = torch.device(device)
    description = {"kind": "defense-gan", "data_digest": data.digest, **vars(settings), **(about or {})}
    run = Run(out, description, settings.seed, device, resume)
    run.open()
    torch.manual_seed(settings.seed)
    _, channels, size, _ = data.train.images.shape
    generator = Generator(settings.latent_dim, settings.seed, channels, size).to(device).train()
    critic = Critic(channels, size).to(device).train()
    train = data.train.to(device)
    count = min(settings.batch_size, len(train))
    order = Order(len(train), settings.seed)
    betas = (0.5, 0.9)
    optimizers = {
        "generator_adam": torch.optim.Adam(generator.parameters(), settings.learning_rate, betas),
        "critic_adam": torch.optim.Adam(critic.parameters(), settings.learning_rate, betas),
    }
    distance = torch.zeros((), device=device)

    def make() -> Tensor:
        return _images(generator, torch.randn(count, settings.latent_dim, device=device))

    def score(images: Tensor) -> Tensor:
        with autocast(device):
            scores: Tensor = critic(images)
        return scores.float()

    def step(number: int) -> Tensor:
        nonlocal distance
        for turn in range(settings.critic_steps):
            start = (number * settings.critic_steps + turn) * count
            real = to_float(train.images[order.take(start, count).to(device)])
            with torch.no_grad():
                made = make()
            distance = score(real).mean() - score(made).mean()
            loss = settings.penalty * gradient_penalty(score, real, made, torch.rand(count, device=device)) - distance
            optimizers["critic_adam"].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers["critic_adam"].step()
        critic.requires_grad_(False)
        loss = -score(make()).mean()
        optimizers["generator_adam"].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers["generator_adam"].step()
        critic.requires_grad_(True)
        return loss.detach()

    def finish(made: int) -> None:
        header = {
            **description, "dataset": data.name, "channels": channels, "image_size": size, "steps_made": made,
        }  # fmt: skip
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in generator.state_dict().items()}
        with replacing(out / GENERATOR_FILE) as file:
            file.write(save(tensors, {"generator": json.dumps(header)}))

    made = run.train(
        f"Defense-GAN's generator on {data.name}", step, settings.steps,
        modules={"generator": generator, "critic": critic}, optimizers=optimizers,
        images=count * settings.critic_steps, finish=finish,
        report=lambda _: {"distance": round(float(distance.detach()), 5)}, report_every=report_every,
    )  # fmt: skip
    return generator.eval().requires_grad_(False), made == settings.steps


def load_generator(path: Path, device: torch.device | str = "cpu") -> Generator:
    """Read what :func:`train_generator` wrote.

    Raises:
        ValueError: the file is none of those.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["generator"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        generator = Generator(header["latent_dim"], 0, header["channels"], header["image_size"])
        generator.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: expected Defense-GAN's generator, got {error!r}; train it again") from error
    return place(generator, device).eval().requires_grad_(False)


def defense_gan(
    classifier: nn.Module, generator: Generator, *, steps: int = 200, restarts: int = 10, seed: int = 0
) -> Defence:
    """The defence: each image gives way to the nearest that the generator is found to make.

    Args:
        classifier: in eval mode; it is also what the oblivious attacker knows.
        generator: trained, on the classifier's device.
        steps: L of the search.
        restarts: R of the search.
        seed: of its starts.
    """

    def purify(images: Tensor) -> Tensor:
        found = reconstruct(
            partial(_images, generator), to_float(images), steps, restarts, latent_dim=generator.latent_dim, seed=seed
        )  # fmt: skip
        return to_uint8(found.images)

    return purifying("defense_gan", classifier, purify, batch=SEARCH_BATCH)


def _images(generator: nn.Module, z: Tensor) -> Tensor:
    """float32 images from latents, computed in the precision that the device is fast in."""
    with autocast(z.device):
        images: Tensor = generator(z)
    return images.float()
