"""Where classifiers come from: shipped with the repository, trained for a run, or a user's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.classifiers import CLASSIFIERS
from training.data import Dataset
from training.train_classifier import accuracy, fit_classifier, load_classifier, save_classifier

CLASSIFIER_FOLDER = Path(__file__).parent / "weights"


def shipped_path(name: str, data: Dataset) -> Path:
    """Where the repository keeps the classifier ``name`` of a data set."""
    return CLASSIFIER_FOLDER / f"{data.name}_{name}.safetensors"


def shipped(name: str, data: Dataset, device: torch.device) -> nn.Module:
    """A classifier from the repository.

    Raises:
        FileNotFoundError: it has none of that name for this data set.
        ValueError: the file belongs to other classes or images.
    """
    path = shipped_path(name, data)
    if not path.exists():
        raise FileNotFoundError(
            f"classifier {name} of {data.name}: expected the file {path}, found none; "
            f"train it with 'python -m training classifier {data.name} {name}'"
        )
    return _load(path, data, device)


def for_run(name: str, data: Dataset, out: Path, epochs: int, device: torch.device) -> nn.Module:
    """A classifier from the repository, or one trained for this run and kept in its folder ``out``."""
    path = shipped_path(name, data)
    if not path.exists():
        path = out / "classifiers" / f"{data.name}_{name}.safetensors"
    if not path.exists():
        train_and_store(name, data, path, epochs, device)
    return _load(path, data, device)


def check_names(names: tuple[str, ...]) -> None:
    """Raise a ValueError unless every name is in :data:`training.classifiers.CLASSIFIERS`."""
    if unknown := [name for name in names if name not in CLASSIFIERS]:
        raise ValueError(f"classifiers: expected some of {', '.join(CLASSIFIERS)}, got {', '.join(unknown)}")


def train_and_store(
    name: str, data: Dataset, path: Path, epochs: int, device: torch.device, *, batch_size: int = 100
) -> dict[str, Any]:
    """Train a built-in classifier, write it to ``path``, and return what its header says."""
    model = fit_classifier(name, data, epochs=epochs, batch_size=batch_size, device=device)
    header = {
        **_identity(data),
        "dataset": data.name,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": 0,
        "validation_accuracy": accuracy(model, data.validation.to(device)),
        "test_accuracy": accuracy(model, data.test.to(device)),
    }
    save_classifier(path, name, model, header)
    return header


def own(spec: str, data: Dataset, device: torch.device) -> nn.Module:
    """A user's classifier: ``package.module:function``, called without arguments in the current folder.

    Raises:
        ValueError: it cannot be had, or does not give (N, classes) floating logits for (N, C, H, W) images.
    """
    module_name, _, function = spec.partition(":")
    if not module_name or not function:
        raise ValueError(f"--classifier: expected package.module:function, got {spec!r}")
    sys.path.insert(0, str(Path.cwd()))
    shape = data.train.images.shape[1:]
    try:
        made = getattr(importlib.import_module(module_name), function)()
        if not isinstance(made, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(made).__name__}")
        made = made.to(device).eval().requires_grad_(False)
        logits = made(torch.zeros(2, *shape, device=device))
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape != (2, data.classes):
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"expected floating logits (2, {data.classes}) for images (2, {', '.join(map(str, shape))}), got {got}"
            )
    except Exception as error:  # it is the user's code: whatever goes wrong there is said in one line
        raise ValueError(f"--classifier {spec}: {type(error).__name__}: {error}") from error
    return made


def _load(path: Path, data: Dataset, device: torch.device) -> nn.Module:
    model, header = load_classifier(path, device)
    expected = _identity(data)
    if differing := [key for key in expected if header.get(key) != expected[key]]:
        key = differing[0]
        raise ValueError(
            f"{path}: expected a classifier with {key} {expected[key]}, got {header.get(key)}; remove the file"
        )
    return model


def _identity(data: Dataset) -> dict[str, Any]:
    """What a classifier and a data set must have in common."""
    _, channels, size, _ = data.train.images.shape
    return {
        "channels": channels, "image_size": size, "classes": data.classes, "class_names": list(data.class_names),
    }  # fmt: skip
