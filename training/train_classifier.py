"""Train the classifiers that are attacked, and store them as safetensors with a JSON header."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from defense_vae_fast.atomic import replacing
from training import classifiers
from training.data import Dataset, Split, to_float
from training.device import place
from training.precision import autocast
from training.progress import bar

# Data sets of photographs, which show the same thing in a mirror; digits and words do not.
MIRRORED = ("cifar10_jpeg", "celeba")


def fit_classifier(
    name: str,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train one of :data:`training.classifiers.CLASSIFIERS` on the training split with Adam and a one-cycle schedule.

    Every other image of the data sets in :data:`MIRRORED`, by chance, is mirrored.

    Args:
        name: the classifier's name.
        data: the data set.
        epochs: passes over the training images (10 in the paper).
        batch_size: images a step (100 in the paper).
        learning_rate: peak of the schedule (the paper's constant rate is 1e-3).
        seed: seeds the weights, the order and dropout.
        device: where to train.

    Returns:
        The classifier in eval mode with its gradients switched off.
    """
    torch.manual_seed(seed)
    _, channels, size, _ = data.train.images.shape
    model = place(classifiers.build(name, channels, size, data.classes), device)
    train = data.train.to(device)
    batch_size = min(batch_size, len(train))
    steps = len(train) // batch_size
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate * 2, total_steps=epochs * steps)
    model.train()
    with bar(f"classifier {name}", epochs * steps) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(train), device=device)
            for index in torch.split(order[: steps * batch_size], batch_size):
                images = to_float(train.images[index])
                if data.name in MIRRORED:
                    turned = torch.rand(len(images), device=device) < 0.5
                    images = torch.where(turned.view(-1, 1, 1, 1), images.flip(3), images)
                with autocast(device):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), train.labels[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.update(1, images=batch_size, loss=loss)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(classifier: nn.Module, split: Split, batch_size: int = 500) -> float:
    """Share of the split's images that the classifier gets right, in percent."""
    correct = 0
    for images, labels in zip(
        torch.split(split.images, batch_size), torch.split(split.labels, batch_size), strict=True
    ):
        correct += int((classifier(to_float(images)).argmax(1) == labels).sum())
    return 100 * correct / len(split)


def save_classifier(path: Path, name: str, classifier: nn.Module, header: dict[str, Any], *, half: bool = True) -> None:
    """Write a classifier's weights with a JSON header.

    ``half`` stores all but vectors as fp16; without it every tensor stays as it is, under the name that it has in the
    classifier's state_dict.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in classifier.state_dict().items():
        value = value.detach().cpu().contiguous().clone()
        tensors[key] = value.half() if half and value.is_floating_point() and value.ndim > 1 else value
    with replacing(path) as file:
        file.write(save(tensors, {"classifier": json.dumps({"name": name, **header})}))


def load_classifier(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Read what :func:`save_classifier` wrote: the classifier in eval mode, gradients off, and its header.

    Raises:
        ValueError: the file is not a classifier's, or its tensors do not fit the network it names.
    """
    header, tensors = _read(path)
    model = classifiers.build(header["name"], header["channels"], header["image_size"], header["classes"])
    _fill(model, tensors, path)
    return place(model, device).eval().requires_grad_(False), header


def load_weights(path: Path, like: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """A copy of ``like`` with the weights that :func:`save_classifier` wrote, in eval mode, gradients off.

    Raises:
        ValueError: the file is not a classifier's, or its tensors do not fit ``like``.
    """
    _, tensors = _read(path)
    model = copy.deepcopy(like)
    _fill(model, tensors, path)
    return place(model, device).eval().requires_grad_(False)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 (hex) of a module's weights and statistics."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["classifier"])
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: expected a classifier written by this library, got {error!r}") from error


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)  # which casts to the model's own dtypes
    except RuntimeError as error:
        raise ValueError(f"{path}: tensors do not fit the classifier {type(model).__name__}: {error}") from error
