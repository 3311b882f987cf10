"""One-file checkpoints: safetensors weights with a JSON header, and the list of the shipped ones.

The file is data, never code: nothing in it is unpickled or executed. Its metadata holds one JSON object under the key
``defense_vae_fast``: ``format``, ``architecture``, ``dataset``, ``bounds``, ``recipe``, ``accuracies``, ``versions``,
``quantization`` where the checkpoint has int8 scales, and ``digest``, a SHA-256 over all of the rest and every tensor,
so that a damaged file is told from a good one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as _parse
from safetensors.numpy import save as _serialize

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.atomic import replacing

Array = npt.NDArray[Any]

FORMAT = 1
METADATA_KEY = "defense_vae_fast"
WEIGHTS_FOLDER = Path(__file__).parent / "weights"
# The largest network (1024x1024) is far below these; a file beyond them is not read at all.
MAX_FILE_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
# A trained network's activations are of the order of 1; far outside of this, a scale would vanish or overflow.
AMAX_RANGE = (1e-6, 1e6)


class CheckpointError(ValueError):
    """The file is not a usable Defense-VAE checkpoint; the message says what is wrong with it."""


@dataclass(frozen=True)
class Quantization:
    """What int8 arithmetic needs beside the weights, whose own scales follow from them.

    Attributes:
        amax: layer name -> largest magnitude of that layer's input that int8 stands for; larger values are clipped to
            it. Scales follow from it: amax / 255 for unsigned and amax / 127 for signed integers. A layer that is not
            named stays in higher precision.
        recipe: how the layers and numbers were found (calibrator, images, seed, ...).
        accuracies: what was measured with them, on which images.
    """

    amax: Mapping[str, float]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    accuracies: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for the header."""
        return {"amax": dict(self.amax), "recipe": dict(self.recipe), "accuracies": dict(self.accuracies)}


@dataclass(frozen=True)
class Checkpoint:
    """A purifier's weights and what is known about them.

    Attributes:
        config: the network's shape.
        tensors: every tensor of ``config``'s layer table by its name, fp16 or fp32, read-only.
        dataset: name of the data set that it was trained on.
        recipe: how it was trained (attacks, KL weight, steps, seed, ...).
        accuracies: what was measured, on which images.
        versions: library versions at training time.
        digest: SHA-256 (hex) over header and tensors.
        quantization: the scales of int8 arithmetic; None where the purifier was not quantized.
    """

    config: VAEConfig
    tensors: Mapping[str, Array]
    dataset: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    accuracies: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    quantization: Quantization | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest pixel value of float images."""
        return (0.0, 1.0)


def list_pretrained() -> tuple[str, ...]:
    """Names of the checkpoints that come with the library, for ``Purifier.from_pretrained``; NAME-e2e is a variant."""
    return tuple(sorted(path.stem for path in WEIGHTS_FOLDER.glob("*.safetensors")))


def variant_name(name: str | os.PathLike[str], variant: str) -> str:
    """The shipped name of a checkpoint's variant: ``fashion_mnist-e2e`` for ``fashion_mnist`` and ``e2e``.

    Raises:
        FileNotFoundError: no such checkpoint with such a variant comes with the library.
    """
    names = list_pretrained()
    found = f"{os.fspath(name)}-{variant}"
    if found not in names:
        with_variants = ", ".join(one for one in names if "-" in one) or "none"
        raise FileNotFoundError(
            f"checkpoint {os.fspath(name)!r}: expected a shipped name that has a variant {variant!r}, got none; "
            f"names with their variants: {with_variants}"
        )
    return found


def pretrained_classifier(name: str, variant: str | None = None) -> Path:
    """The classifier that a shipped purifier was measured with, as an ONNX file for OpenVINO, ONNX Runtime or export.

    Input ``images`` uint8 (N, H, W, C), output ``logits`` float32 (N, classes). Without a variant it is one of those
    that the purifier was trained to protect, and knows nothing of it; with ``e2e`` the one that learnt with that
    variant's purifier (equation 5) and belongs to it alone.

    Args:
        name: a name of :func:`list_pretrained`.
        variant: as in ``Purifier.from_pretrained``.

    Raises:
        FileNotFoundError: there is no such name or variant, or no classifier comes with it.
    """
    path = WEIGHTS_FOLDER / f"{variant_name(name, variant) if variant else name}_classifier.onnx"
    if not path.is_file():
        raise FileNotFoundError(
            f"classifier of {name!r}: expected the file {path}, found none; install the package again"
        )
    return path


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """Path of a shipped checkpoint by name, or of a file by path.

    Raises:
        FileNotFoundError: it is neither.
        TypeError: it is not a string or a path.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"checkpoint: expected a name or a path, got {type(name_or_path).__name__}")
    if isinstance(name_or_path, str) and name_or_path in list_pretrained():
        return WEIGHTS_FOLDER / f"{name_or_path}.safetensors"
    path = Path(name_or_path)
    if not os.path.isfile(path):  # unlike Path.is_file it is False, not an error, for a name too long or with a NUL
        names = ", ".join(list_pretrained()) or "none"
        raise FileNotFoundError(
            f"checkpoint {os.fspath(name_or_path)!r}: no such file, and not one of the shipped names ({names})"
        )
    return path


def load_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: the file is damaged, hostile, of another format or of another architecture than it says.
        FileNotFoundError: there is no such file or shipped name.
    """
    path = resolve(name_or_path)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, got {size}")
    raw = path.read_bytes()
    try:
        header = _read_header(raw)
        config = VAEConfig.from_dict(_field(header, "architecture", dict))
        tensors = _parse(raw)
        _check_tensors(config, tensors)
        digest = _field(header, "digest", str)
        if digest != _digest(header, tensors):
            raise CheckpointError(
                "the contents do not match their digest: the file is damaged; fetch or train it again"
            )
        checkpoint = Checkpoint(
            config=config,
            tensors=tensors,
            dataset=_field(header, "dataset", str),
            recipe=_field(header, "recipe", dict),
            accuracies=_field(header, "accuracies", dict),
            versions=_field(header, "versions", dict),
            digest=digest,
            quantization=_read_quantization(config, header),
        )
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a usable Defense-VAE checkpoint: {error}") from error
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return checkpoint


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> str:
    """Write a checkpoint, beside its place first and then renamed, and return its digest.

    A failure on the way leaves the file that was there before.

    Raises:
        CheckpointError: tensors are missing, of the wrong shape or dtype, or not finite; or a description is not JSON
            or does not fit into the header.
        OSError: the file cannot be written.
    """
    path = Path(path)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in checkpoint.tensors.items()}
    _check_tensors(checkpoint.config, tensors)
    quantization = checkpoint.quantization
    header = _plain_json(
        {
            "format": FORMAT,
            "architecture": checkpoint.config.to_dict(),
            "dataset": checkpoint.dataset,
            "bounds": list(checkpoint.bounds),
            "recipe": dict(checkpoint.recipe),
            "accuracies": dict(checkpoint.accuracies),
            "versions": dict(checkpoint.versions),
            **({"quantization": quantization.to_dict()} if quantization else {}),
        }
    )
    _read_quantization(checkpoint.config, header)
    header["digest"] = _digest(header, tensors)
    raw = _serialize(tensors, {METADATA_KEY: _canonical(header)})
    _read_header(raw)  # what could not be read again is not written
    with replacing(path) as file:
        file.write(raw)
    return str(header["digest"])


def _read_header(raw: bytes) -> dict[str, Any]:
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, len(raw) - 8):
        raise CheckpointError(
            f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got a length of {length}"
        )
    outer = json.loads(raw[8 : 8 + length])
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    if not isinstance(metadata, dict) or METADATA_KEY not in metadata:
        raise CheckpointError(f"the safetensors metadata have no {METADATA_KEY!r} entry; is it another model's file?")
    header = json.loads(metadata[METADATA_KEY])
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise CheckpointError(f"expected format {FORMAT}, got {got!r}; a newer file needs a newer defense-vae-fast")
    if header.get("bounds") != [0.0, 1.0]:
        raise CheckpointError(f"expected image bounds [0.0, 1.0], got {header.get('bounds')!r}")
    # The digest is over what the text means; a spelling like 1E-5 for 1e-05 means the same and is damage all the same.
    if metadata[METADATA_KEY] != _canonical(header):
        raise CheckpointError(
            "the header is not spelled as it was written: the file is damaged; fetch or train it again"
        )
    return header


def _field(header: Mapping[str, Any], name: str, kind: type) -> Any:
    value = header.get(name)
    if not isinstance(value, kind):
        raise CheckpointError(f"header field {name!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _read_quantization(config: VAEConfig, header: Mapping[str, Any]) -> Quantization | None:
    """The header's int8 scales; None where it has none."""
    if "quantization" not in header:
        return None
    stored = _field(header, "quantization", dict)
    known = {"amax", "recipe", "accuracies"}
    if set(stored) != known:
        raise CheckpointError(f"header field 'quantization': expected the keys {sorted(known)}, got {sorted(stored)}")
    amax = _field(stored, "amax", dict)
    layers = [layer.name for layer in config.layers() if layer.name != "logvar"]
    if not amax or not amax.keys() <= set(layers):
        raise CheckpointError(f"quantization amax: expected some of {', '.join(layers)}, got {sorted(amax)[:8]}")
    lowest, highest = AMAX_RANGE
    for name, value in amax.items():
        if type(value) not in (int, float) or not lowest <= value <= highest:
            raise CheckpointError(
                f"quantization amax of {name}: expected a number from {lowest} to {highest}, got {value!r}"
            )
    first = layers[0]
    if amax.get(first, 1.0) != 1.0:
        raise CheckpointError(f"quantization amax of {first}: expected 1.0, the bound of images, got {amax[first]!r}")
    return Quantization(
        {name: float(value) for name, value in amax.items()},
        _field(stored, "recipe", dict),
        _field(stored, "accuracies", dict),
    )


def _check_tensors(config: VAEConfig, tensors: Mapping[str, Array]) -> None:
    expected = {
        f"{layer.name}.{suffix}": shape for layer in config.layers() for suffix, shape in layer.tensor_shapes().items()
    }
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(
            f"tensors missing for the {config.image_size}x{config.image_size} network: {', '.join(missing[:4])}"
        )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"tensors that the network does not have: {', '.join(extra[:4])}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(f"tensor {name}: expected shape {shape}, got {tensor.shape}")
        if tensor.dtype not in (np.float16, np.float32):
            raise CheckpointError(f"tensor {name}: expected float16 or float32, got {tensor.dtype}")
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name}: holds NaN or infinity")
        if name.endswith("running_var") and (tensor < 0).any():
            raise CheckpointError(f"tensor {name}: a variance is negative")


def _plain_json(header: Mapping[str, Any]) -> dict[str, Any]:
    """``header`` as it will be read back: tuples as lists, keys as strings."""
    try:
        return dict(json.loads(json.dumps(header, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"dataset, recipe, accuracies, versions: expected what JSON can hold, got the error {error!s}; "
            "use plain strings, numbers, lists and dictionaries"
        ) from error


def _canonical(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(_canonical({key: value for key, value in header.items() if key != "digest"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tensor.shape}:".encode())
        digest.update(tensor.data)
    return digest.hexdigest()
