"""The shape of a Defense-VAE: one table of layers, from which everything else is read.

The torch module, the ONNX graph, the parameter, arithmetic and byte counts all walk the same tuple of
:class:`Layer`, so they cannot disagree. Table 6 of the paper fixes the 28x28 network; the larger ones follow
its appendix ("1 or 2 layers deeper"): one stride-2 block more for 32x32, two for 64x64, one more for each
further doubling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["conv", "conv_transpose", "linear"]
Activation = Literal["relu", "sigmoid", "none"]

MAX_IMAGE_SIZE = 1024
BATCH_NORM_EPSILON = 1e-5
_WIDTHS = (64, 64, 128, 256, 512)  # channels after each encoder block; the last repeats for deeper networks


def supported_image_sizes() -> tuple[int, ...]:
    """Image sides a network can be built for: 28, and 32 times a power of two up to ``MAX_IMAGE_SIZE``."""
    sizes = [28]
    side = 32
    while side <= MAX_IMAGE_SIZE:
        sizes.append(side)
        side *= 2
    return tuple(sizes)


@dataclass(frozen=True)
class VAEConfig:
    """What a Defense-VAE is built from.

    Args:
        image_size: side of the square images in pixels: 28, or 32 times a power of two up to 1024.
        channels: image channels, 1 to 4.
        latent_dim: size of the latent z, 1 to 4096 (128 in Table 6).

    Raises:
        ValueError: a field has the wrong type or lies outside its range.
    """

    image_size: int = 28
    channels: int = 1
    latent_dim: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int:
                raise ValueError(f"VAEConfig.{field.name}: expected an int, got {type(value).__name__} {value!r}")
        if self.image_size not in supported_image_sizes():
            sizes = ", ".join(map(str, supported_image_sizes()))
            raise ValueError(
                f"VAEConfig.image_size: expected one of {sizes}, got {self.image_size}; "
                "resize or crop the images to the nearest of these"
            )
        if not 1 <= self.channels <= 4:
            raise ValueError(f"VAEConfig.channels: expected 1 to 4, got {self.channels}")
        if not 1 <= self.latent_dim <= 4096:
            raise ValueError(f"VAEConfig.latent_dim: expected 1 to 4096, got {self.latent_dim}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return (self.channels, self.image_size, self.image_size)

    @property
    def encoder(self) -> tuple[Layer, ...]:
        """Layers from the image to the feature map that ``mu`` and ``logvar`` read."""
        return tuple(layer for layer in self.layers() if layer.part == "encoder")

    @property
    def heads(self) -> tuple[Layer, ...]:
        """``mu`` and ``logvar``; inference computes the first alone."""
        return tuple(layer for layer in self.layers() if layer.part == "head")

    @property
    def decoder(self) -> tuple[Layer, ...]:
        """Layers from the latent to the image."""
        return tuple(layer for layer in self.layers() if layer.part == "decoder")

    def layers(self) -> tuple[Layer, ...]:
        """The layer table (Table 6), encoder first."""
        return tuple(_layers(self))

    def to_dict(self) -> dict[str, int]:
        """Plain dictionary for a checkpoint's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VAEConfig:
        """Inverse of :meth:`to_dict`; an unknown or missing key is a ``ValueError``."""
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(f"architecture: expected the keys {sorted(known)}, got {sorted(values)}")
        return cls(**values)

    def parameter_count(self, *, inference: bool = False) -> int:
        """Number of weights; with ``inference`` BatchNorm is folded away and ``logvar`` left out."""
        return sum(layer.parameter_count(inference=inference) for layer in self._evaluated(inference))

    def multiply_adds(self) -> int:
        """Multiply-adds of one image's forward pass at inference (mean latent)."""
        return sum(layer.multiply_adds for layer in self._evaluated(True))

    def weight_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes of the folded inference weights."""
        return self.parameter_count(inference=True) * bytes_per_value

    def activation_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes moved by one image when each layer reads its input once and writes its output once."""
        layers = self._evaluated(True)
        return sum(layer.input_values + layer.output_values for layer in layers) * bytes_per_value

    def _evaluated(self, inference: bool) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers() if not (inference and layer.name == "logvar"))


@dataclass(frozen=True)
class Layer:
    """One row of the table: a convolution or matrix product with the normalisation and activation after it.

    ``in_size``/``out_size`` are the sides of the square feature maps (1 for a linear layer). A ``conv_transpose``
    weight has shape (in, out, k, k), a ``conv`` weight (out, in, k, k), a ``linear`` weight (out, in).
    """

    name: str
    part: Literal["encoder", "head", "decoder"]
    kind: Kind
    in_channels: int
    out_channels: int
    in_size: int
    out_size: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    batch_norm: bool = False
    activation: Activation = "none"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight tensor as torch stores it."""
        if self.kind == "linear":
            return (self.out_channels, self.in_channels)
        pair = (self.out_channels, self.in_channels)
        return (*(pair if self.kind == "conv" else pair[::-1]), self.kernel, self.kernel)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of this layer in a checkpoint, by suffix of their name.

        A layer followed by BatchNorm has no bias of its own: BatchNorm's shift takes its place.
        """
        vector = (self.out_channels,)
        shapes = {"weight": self.weight_shape}
        if not self.batch_norm:
            return {**shapes, "bias": vector}
        return {**shapes, **{f"norm.{key}": vector for key in ("weight", "bias", "running_mean", "running_var")}}

    def parameter_count(self, *, inference: bool) -> int:
        """Trainable values; with ``inference`` the folded weight and bias."""
        weight = 1
        for side in self.weight_shape:
            weight *= side
        return weight + self.out_channels * (2 if self.batch_norm and not inference else 1)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one image."""
        positions = (self.in_size if self.kind == "conv_transpose" else self.out_size) ** 2
        return self.in_channels * self.out_channels * self.kernel**2 * positions

    @property
    def input_values(self) -> int:
        """Values read for one image."""
        return self.in_channels * self.in_size**2

    @property
    def output_values(self) -> int:
        """Values written for one image."""
        return self.out_channels * self.out_size**2


def _layers(config: VAEConfig) -> Iterator[Layer]:
    size = config.image_size
    # Table 6 halves 28 -> 16 (padding 3) -> 8 -> 4; a power of two is halved down to 2.
    bottom = 4 if size == 28 else 2
    sizes = [size, 16 if size == 28 else size // 2]
    while sizes[-1] > bottom:
        sizes.append(sizes[-1] // 2)
    depth = len(sizes)
    widths = [*_WIDTHS[:depth], *[_WIDTHS[-1]] * (depth - len(_WIDTHS))]
    paddings = [3 if (size, index) == (28, 1) else 1 for index in range(depth)]

    yield Layer("encoder1", "encoder", "conv", config.channels, widths[0], size, size, 5, 1, 2, True, "relu")
    for index in range(1, depth):
        yield Layer(
            f"encoder{index + 1}", "encoder", "conv", widths[index - 1], widths[index], sizes[index - 1], sizes[index],
            4, 2, paddings[index], True, "relu",
        )  # fmt: skip
    flat = widths[-1] * bottom**2
    yield Layer("mu", "head", "linear", flat, config.latent_dim, 1, 1)
    yield Layer("logvar", "head", "linear", flat, config.latent_dim, 1, 1)
    yield Layer("decoder1", "decoder", "linear", config.latent_dim, flat, 1, 1, activation="relu")
    for step, index in enumerate(range(depth - 1, 0, -1)):
        yield Layer(
            f"decoder{step + 2}", "decoder", "conv_transpose", widths[index], widths[index - 1], sizes[index],
            sizes[index - 1], 4, 2, paddings[index], True, "relu",
        )  # fmt: skip
    # The printed last row is ConvT(64, 64) + BN + ReLU, which cannot emit an image; the released code has this.
    yield Layer(
        f"decoder{depth + 1}", "decoder", "conv_transpose", widths[0], config.channels, size, size, 5, 1, 2,
        activation="sigmoid",
    )  # fmt: skip
