"""MagNet (Meng and Chen, CCS 2017): autoencoders of clean images as detectors, and one of them as reformer.

Two autoencoders are trained on clean images with a little noise. A *detector* measures how badly an autoencoder
reproduces an image, or how differently the classifier sees the image and its reproduction, and turns it away above a
threshold that is set on clean validation images. The *reformer* hands images on to the classifier as one of the
autoencoders reproduces them. No attack takes part in any of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from defense_vae_fast.atomic import replacing
from training.data import Dataset, Split, to_float, to_uint8
from training.defences import Answer, Defence
from training.device import place
from training.loop import Run
from training.pairs import Order

MAGNET_FILE = "magnet.safetensors"


class Defaults(NamedTuple):
    """The paper's settings for one kind of image."""

    noise: float
    drop_rate: float
    temperatures: tuple[float, ...]


# As in the paper's experiments on MNIST and on CIFAR-10.
GRAY = Defaults(0.1, 0.001, ())
COLOUR = Defaults(0.025, 0.005, (10.0, 40.0))


class Autoencoder(nn.Module):
    """(N, C, H, W) images in [0, 1] to their reproductions of the same shape and range.

    3x3 convolutions of three channels with sigmoids between, as in the paper: the first kind (``pooled``) halves the
    image by average pooling and doubles it again, the second keeps its size.
    """

    def __init__(self, channels: int, *, pooled: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(channels, 3), nn.Sigmoid()]
        if pooled:
            layers += [
                nn.AvgPool2d(2),
                _conv(3, 3),
                nn.Sigmoid(),
                _conv(3, 3),
                nn.Sigmoid(),
                nn.Upsample(scale_factor=2),
            ]
        layers += [_conv(3, 3), nn.Sigmoid(), _conv(3, channels), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Reproduce images."""
        y: Tensor = self.layers(x)
        return y


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, 1, 1)


class Detector(Protocol):
    """Scores images: high where they look unlike clean ones."""

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> (N,) scores."""


@dataclass(frozen=True)
class ReconstructionDetector:
    """Mean over pixels of |x - AE(x)|^p."""

    autoencoder: nn.Module
    power: int

    def __call__(self, images: Tensor) -> Tensor:
        """(N,) errors."""
        errors: Tensor = (images - self.autoencoder(images)).abs().pow(self.power)
        return errors.flatten(1).mean(1)


@dataclass(frozen=True)
class DivergenceDetector:
    """Jensen-Shannon divergence between the classifier's words on x and on AE(x), softened by a temperature."""

    autoencoder: nn.Module
    classifier: nn.Module
    temperature: float

    def __call__(self, images: Tensor) -> Tensor:
        """(N,) divergences in nats."""
        first, second = (
            torch.softmax(self.classifier(x).float() / self.temperature, 1) for x in (images, self.autoencoder(images))
        )
        return jensen_shannon(first, second)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """(N,) Jensen-Shannon divergences in nats between the rows of two (N, K) distributions: 0 to log 2."""
    middle = ((p + q) / 2).clamp_min(1e-30)
    halves = [(x * (x.clamp_min(1e-30) / middle).log()).sum(1) for x in (p, q)]
    return (halves[0] + halves[1]) / 2


@dataclass(frozen=True)
class MagNetSettings:
    """How the autoencoders are trained.

    Args:
        epochs: passes over the training images (100 in the paper).
        batch_size: images a step (256 in the paper).
        learning_rate: Adam's.
        noise: standard deviation of the noise on the inputs; None for the paper's (0.1 gray, 0.025 colour).
        seed: seeds weights, order and noise.
    """

    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 1e-3
    noise: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.learning_rate < math.inf:
            raise ValueError(
                "magnet: expected epochs, batch_size and learning_rate above 0, "
                f"got {self.epochs}, {self.batch_size} and {self.learning_rate}"
            )
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise ValueError(f"magnet noise: expected at least 0, got {self.noise}")


@dataclass(frozen=True)
class Autoencoders:
    """The two trained networks, in eval mode, and whether all steps were made."""

    pooled: Autoencoder
    plain: Autoencoder
    finished: bool = True


def train_magnet(
    data: Dataset,
    settings: MagNetSettings,
    out: Path,
    *,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
) -> Autoencoders:
    """Train both autoencoders on clean images, by mean squared error, into ``magnet.safetensors`` in ``out``.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: the folder is another run's, or there is none to resume.
    """
    device = torch.device(device)
    description = {"kind": "magnet", "data_digest": data.digest, **vars(settings), **(about or {})}
    run = Run(out, description, settings.seed, device, resume)
    run.open()
    torch.manual_seed(settings.seed)
    channels = data.train.images.shape[1]
    noise = settings.noise if settings.noise is not None else (GRAY if channels == 1 else COLOUR).noise
    networks = {
        "pooled": place(Autoencoder(channels, pooled=True), device).train(),
        "plain": place(Autoencoder(channels, pooled=False), device).train(),
    }
    train = data.train.to(device)
    batch_size = min(settings.batch_size, len(train))
    steps = settings.epochs * (len(train) // batch_size)
    order = Order(len(train), settings.seed)
    parameters = [parameter for network in networks.values() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(parameters, settings.learning_rate)

    def step(number: int) -> Tensor:
        images = to_float(train.images[order.take(number * batch_size, batch_size).to(device)])
        noisy = (images + noise * torch.randn_like(images)).clamp(0, 1)
        loss = torch.stack([F.mse_loss(network(noisy), images) for network in networks.values()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def finish(made: int) -> None:
        tensors = {
            f"{prefix}.{name}": value.detach().cpu().contiguous().clone()
            for prefix, network in networks.items()
            for name, value in network.state_dict().items()
        }
        header = {**description, "channels": channels, "dataset": data.name, "steps_made": made, "steps": steps}
        with replacing(out / MAGNET_FILE) as file:
            file.write(save(tensors, {"magnet": json.dumps(header)}))

    made = run.train(
        f"MagNet on {data.name}", step, steps, modules=networks, optimizers={"adam": optimizer}, images=batch_size,
        finish=finish,
    )  # fmt: skip
    pooled, plain = (network.eval().requires_grad_(False) for network in networks.values())
    return Autoencoders(pooled, plain, made == steps)


def load_magnet(path: Path, device: torch.device | str = "cpu") -> Autoencoders:
    """Read what :func:`train_magnet` wrote.

    Raises:
        ValueError: the file is none of those.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["magnet"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        networks = [Autoencoder(header["channels"], pooled=pooled) for pooled in (True, False)]
        for prefix, network in zip(("pooled", "plain"), networks, strict=True):
            network.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in network.state_dict()})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: expected MagNet's autoencoders, got {error!r}; train them again") from error
    pooled, plain = (place(network, device).eval().requires_grad_(False) for network in networks)
    return Autoencoders(pooled, plain, header["steps_made"] == header["steps"])


@torch.no_grad()
def thresholds(detectors: list[Detector], clean: Split, drop_rate: float) -> list[float]:
    """For each detector, the score that this share of clean images lies above.

    Args:
        detectors: the detectors.
        clean: clean images that nothing was trained on: the validation split.
        drop_rate: share of clean images that each detector may turn away, 0 to below 1.

    Raises:
        ValueError: ``drop_rate`` is out of range or there is no image.
    """
    if not 0 <= drop_rate < 1 or not len(clean):
        raise ValueError(f"drop_rate: expected 0 to below 1 and images, got {drop_rate} and {len(clean)} images")
    parts = torch.split(clean.images, 250)
    scores = [torch.cat([detector(to_float(part)) for part in parts]).sort().values for detector in detectors]
    dropped = int(len(clean) * drop_rate)
    return [float(values[len(values) - 1 - dropped]) for values in scores]


def magnet(
    classifier: nn.Module, autoencoders: Autoencoders, validation: Split, drop_rate: float | None = None
) -> Defence:
    """The defence around a classifier, its thresholds set on clean validation images.

    Args:
        classifier: in eval mode; it is also what the oblivious attacker knows.
        autoencoders: from :func:`train_magnet`.
        validation: clean images, on the classifier's device.
        drop_rate: share of them that each detector may turn away; None for the paper's (0.001 gray, 0.005 colour).
    """
    gray = validation.images.shape[1] == 1
    defaults = GRAY if gray else COLOUR
    # In colour the paper has the autoencoder without pooling alone.
    reformer = autoencoders.pooled if gray else autoencoders.plain
    detectors: list[Detector] = [
        ReconstructionDetector(autoencoders.plain, 1),
        *([ReconstructionDetector(autoencoders.pooled, 2)] if gray else []),
        *(DivergenceDetector(reformer, classifier, temperature) for temperature in defaults.temperatures),
    ]
    limits = thresholds(detectors, validation, defaults.drop_rate if drop_rate is None else drop_rate)

    @torch.no_grad()
    def answer(images: Tensor) -> Answer:
        pixels = to_float(images)
        rejected = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for detector, limit in zip(detectors, limits, strict=True):
            rejected |= detector(pixels) > limit
        reformed = to_float(to_uint8(reformer(pixels)))
        return Answer(classifier(reformed).argmax(1), rejected)

    return Defence("magnet", classifier, answer)
