"""Attacked images kept in a folder: making them costs minutes to hours, and they do not depend on the purifier."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from defense_vae_fast.atomic import replacing
from training.attacks import Attack
from training.data import Split
from training.pairs import attack_all


def attacked_images(
    attack: Attack,
    classifier: nn.Module,
    split: Split,
    *,
    seed: int = 0,
    predicted_labels: bool = False,
    title: str | None = None,
    folder: Path | None = None,
) -> Tensor:
    """What :func:`training.pairs.attack_all` gives, taken from ``folder`` where it was made before.

    A file there is named by a digest of everything that decides the images: the attack and its settings, the
    classifier's layers and weights, the images, the labels and the seed.

    Args:
        attack, classifier, split, seed, predicted_labels, title: as in :func:`training.pairs.attack_all`.
        folder: where attacked images are kept; None keeps nothing.

    Returns:
        uint8 (N, C, H, W) on the split's device.
    """
    if folder is None:
        return attack_all(attack, classifier, split, seed=seed, predicted_labels=predicted_labels, title=title)
    settings = {"attack": repr(attack), "seed": seed, "predicted_labels": predicted_labels, "layers": repr(classifier)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (*classifier.state_dict().values(), split.images, split.labels):
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    path = folder / f"{digest.hexdigest()}.safetensors"
    if path.exists():
        try:
            return load_file(path)["images"].to(split.images.device)
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path}: expected attacked images kept by an earlier run; remove the file") from error
    images = attack_all(attack, classifier, split, seed=seed, predicted_labels=predicted_labels, title=title)
    with replacing(path) as file:
        file.write(save({"images": images.cpu()}, {"settings": json.dumps(settings)}))
    return images
