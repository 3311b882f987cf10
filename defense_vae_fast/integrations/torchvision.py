"""A transform in the manner of ``torchvision.transforms.v2``; it needs torch, and not torchvision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from defense_vae_fast.integrations.lazy import LazyPurifier


class Purify:
    """Purifies the images of a sample and hands everything else through.

    It takes what transforms of version 2 take, any nesting of dictionaries, lists and tuples, and follows their rule of
    what an image is: PIL images and ``tv_tensors.Image``; without any of these, the first plain tensor. Tensors are
    channels first, uint8 in 0..255 or floating in [0, 1], (C, H, W) or (N, C, H, W). Images must have the network's
    size: resize before, normalise after.

    It can be pickled; in each process, a data loader's worker for instance, a Purifier is made at its first use.
    Workers that are forked after OpenVINO was used in the parent cannot have one: start them with
    ``multiprocessing_context="spawn"``.

    Args:
        checkpoint: a shipped name or a path.
        options: of ``Purifier.from_pretrained``.
    """

    def __init__(self, checkpoint: str | os.PathLike[str] = "fashion_mnist", **options: Any) -> None:
        self._purifier = LazyPurifier(checkpoint, **options)

    def __call__(self, *inputs: Any) -> Any:
        """The sample with its images purified: one input comes back as it came, several as a tuple.

        Raises:
            TypeError, ValueError: as calling a Purifier.
        """
        sample = inputs[0] if len(inputs) == 1 else inputs
        leaves = list(_leaves(sample))
        images = [leaf for leaf in leaves if _is_image(leaf)]
        if not images:
            images = [leaf for leaf in leaves if type(leaf) is Tensor][:1]
        return _replace(sample, {id(image): self._purify(image) for image in images})

    def _purify(self, image: Any) -> Any:
        purifier = self._purifier.get()
        if not isinstance(image, Tensor):
            return purifier(image)
        tensor = image.as_subclass(Tensor)
        if tensor.dtype == torch.uint8 and tensor.ndim in (3, 4):  # channels are first here and last there
            purified = purifier(tensor.movedim(-3, -1)).movedim(-1, -3).contiguous()
        else:
            purified = purifier(tensor)
        return purified.as_subclass(type(image))

    def __repr__(self) -> str:
        return f"Purify({self._purifier.checkpoint!r})"


def _is_image(leaf: Any) -> bool:
    kind = type(leaf)
    marked = kind.__module__.startswith("torchvision.tv_tensors") and kind.__name__ == "Image"
    return isinstance(leaf, Image.Image) or marked


def _leaves(sample: Any) -> Iterator[Any]:
    if isinstance(sample, dict):
        sample = list(sample.values())
    if isinstance(sample, list | tuple):
        for part in sample:
            yield from _leaves(part)
    else:
        yield sample


def _replace(sample: Any, by_identity: dict[int, Any]) -> Any:
    if isinstance(sample, dict):
        return {key: _replace(part, by_identity) for key, part in sample.items()}
    if isinstance(sample, list | tuple):
        parts = [_replace(part, by_identity) for part in sample]
        return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)
    return by_identity.get(id(sample), sample)
