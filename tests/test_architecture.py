"""The layer table against Table 6 of the paper, and what is counted from it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from defense_vae_fast.architecture import Layer, VAEConfig, supported_image_sizes

# (in, out, kernel, stride, padding); the last row is the released code's, since the printed one cannot emit an image.
TABLE_6 = [
    pytest.param(0, ("encoder1", "conv", 1, 64, 5, 1, 2), (28, 28), (True, "relu"), id="Conv(1,64,5,1,2)"),
    pytest.param(1, ("encoder2", "conv", 64, 64, 4, 2, 3), (28, 16), (True, "relu"), id="Conv(64,64,4,2,3)"),
    pytest.param(2, ("encoder3", "conv", 64, 128, 4, 2, 1), (16, 8), (True, "relu"), id="Conv(64,128,4,2,1)"),
    pytest.param(3, ("encoder4", "conv", 128, 256, 4, 2, 1), (8, 4), (True, "relu"), id="Conv(128,256,4,2,1)"),
    pytest.param(4, ("mu", "linear", 4096, 128, 1, 1, 0), (1, 1), (False, "none"), id="FC1(4096,128)"),
    pytest.param(5, ("logvar", "linear", 4096, 128, 1, 1, 0), (1, 1), (False, "none"), id="FC2(4096,128)"),
    pytest.param(6, ("decoder1", "linear", 128, 4096, 1, 1, 0), (1, 1), (False, "relu"), id="FC3(128,4096)"),
    pytest.param(
        7, ("decoder2", "conv_transpose", 256, 128, 4, 2, 1), (4, 8), (True, "relu"), id="ConvT(256,128,4,2,1)"
    ),
    pytest.param(
        8, ("decoder3", "conv_transpose", 128, 64, 4, 2, 1), (8, 16), (True, "relu"), id="ConvT(128,64,4,2,1)"
    ),
    pytest.param(9, ("decoder4", "conv_transpose", 64, 64, 4, 2, 3), (16, 28), (True, "relu"), id="ConvT(64,64,4,2,3)"),
    pytest.param(
        10, ("decoder5", "conv_transpose", 64, 1, 5, 1, 2), (28, 28), (False, "sigmoid"), id="ConvT(64,1,5,1,2)"
    ),
]
SIZES = pytest.mark.parametrize("size", supported_image_sizes())


@pytest.mark.parametrize(("row", "shape", "sizes", "after"), TABLE_6)
def test_table_6(
    row: int, shape: tuple[str, str, int, int, int, int, int], sizes: tuple[int, int], after: tuple[bool, str]
) -> None:
    layers = VAEConfig(28, 1).layers()
    layer = layers[row]
    assert len(layers) == len(TABLE_6)
    assert shape == (
        layer.name, layer.kind, layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.padding
    )  # fmt: skip
    assert sizes == (layer.in_size, layer.out_size)
    assert after == (layer.batch_norm, layer.activation)


def test_counts() -> None:
    config = VAEConfig(28, 1)
    assert config.multiply_adds() == 70_666_240
    assert config.parameter_count() == 3_023_745


def test_counts_at_inference() -> None:
    config = VAEConfig(28, 1)
    # Folding merges BatchNorm's two vectors of every block into one bias, and drops logvar.
    normalised = 64 + 64 + 128 + 256 + 128 + 64 + 64
    assert config.parameter_count(inference=True) == config.parameter_count() - normalised - (4096 * 128 + 128)
    assert config.weight_bytes() == 2 * config.parameter_count(inference=True)
    assert config.weight_bytes(4) == 2 * config.weight_bytes(2)
    inputs = 784 + 64 * 784 + 64 * 256 + 128 * 64 + 4096 + 128 + 4096 + 128 * 64 + 64 * 256 + 64 * 784
    outputs = 64 * 784 + 64 * 256 + 128 * 64 + 4096 + 128 + 4096 + 128 * 64 + 64 * 256 + 64 * 784 + 784
    assert config.activation_bytes(1) == inputs + outputs


@pytest.mark.parametrize(
    ("size", "widths", "sides"),
    [
        pytest.param(32, [64, 64, 128, 256, 512], [32, 16, 8, 4, 2], id="32: one deeper"),
        pytest.param(64, [64, 64, 128, 256, 512, 512], [64, 32, 16, 8, 4, 2], id="64: two deeper"),
        pytest.param(128, [64, 64, 128, 256, 512, 512, 512], [128, 64, 32, 16, 8, 4, 2], id="128: three deeper"),
    ],
)
def test_deeper_networks(size: int, widths: list[int], sides: list[int]) -> None:
    config = VAEConfig(size, 3)
    assert [layer.out_channels for layer in config.encoder] == widths
    assert [layer.out_size for layer in config.encoder] == sides
    assert [layer.out_channels for layer in config.decoder[1:]] == [*widths[-2::-1], 3]
    assert [layer.out_size for layer in config.decoder[1:]] == [*sides[-2::-1], size]
    by_hand = 3 * 64 * 25 * size**2  # the first block; the last one costs the same
    for wide, narrow, side in zip(widths[1:], widths[:-1], sides[1:], strict=True):
        by_hand += wide * narrow * 16 * side**2
    flat = widths[-1] * sides[-1] ** 2
    assert config.multiply_adds() == 2 * (by_hand + flat * config.latent_dim)


@SIZES
def test_layers_follow_each_other(size: int) -> None:
    config = VAEConfig(size, 3, 96)
    for layers in (config.encoder, config.decoder[1:]):
        for before, after in itertools.pairwise(layers):
            assert (before.out_channels, before.out_size) == (after.in_channels, after.in_size)
    bottom = config.encoder[-1]
    flat = bottom.out_channels * bottom.out_size**2
    assert [(head.in_channels, head.out_channels) for head in config.heads] == [(flat, 96), (flat, 96)]
    assert (config.decoder[0].in_channels, config.decoder[0].out_channels) == (96, flat)
    assert (config.decoder[1].in_channels, config.decoder[1].in_size) == (bottom.out_channels, bottom.out_size)
    assert (config.decoder[-1].out_channels, config.decoder[-1].out_size) == (3, size)
    assert config.image_shape == (3, size, size)


def _convolved_size(layer: Layer) -> int:
    """Output side of torch's Conv2d and ConvTranspose2d, from their documentation."""
    if layer.kind == "conv":
        return (layer.in_size + 2 * layer.padding - layer.kernel) // layer.stride + 1
    return (layer.in_size - 1) * layer.stride - 2 * layer.padding + layer.kernel


@SIZES
def test_sizes_are_those_of_the_convolutions(size: int) -> None:
    for layer in VAEConfig(size, 1).layers():
        if layer.kind != "linear":
            assert layer.out_size == _convolved_size(layer), layer.name


@pytest.mark.parametrize("size", [28, 32, 64])
def test_parameters_are_the_tensors_without_statistics(size: int) -> None:
    config = VAEConfig(size, 3, 17)
    total = 0
    for layer in config.layers():
        for suffix, shape in layer.tensor_shapes().items():
            if "running" not in suffix:
                product = 1
                for side in shape:
                    product *= side
                total += product
    assert config.parameter_count() == total


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"image_size": 27}, "image_size: expected one of 28, 32, 64", id="27"),
        pytest.param({"image_size": 48}, "image_size: expected one of", id="not a power of two"),
        pytest.param({"image_size": 2048}, "image_size: expected one of", id="too large"),
        pytest.param({"image_size": -32}, "image_size: expected one of", id="negative size"),
        pytest.param({"image_size": 28.0}, "image_size: expected an int, got float", id="float size"),
        pytest.param({"channels": 0}, "channels: expected 1 to 4, got 0", id="no channels"),
        pytest.param({"channels": 5}, "channels: expected 1 to 4, got 5", id="five channels"),
        pytest.param({"channels": True}, "channels: expected an int, got bool", id="bool"),
        pytest.param({"latent_dim": 0}, "latent_dim: expected 1 to 4096, got 0", id="no latent"),
        pytest.param({"latent_dim": 4097}, "latent_dim: expected 1 to 4096, got 4097", id="huge latent"),
        pytest.param({"latent_dim": "128"}, "latent_dim: expected an int, got str", id="string"),
        pytest.param({"latent_dim": None}, "latent_dim: expected an int, got NoneType", id="None"),
    ],
)
def test_bad_configurations(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**values)  # type: ignore[arg-type]


def test_dictionary_round_trip() -> None:
    config = VAEConfig(64, 3, 200)
    assert VAEConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="expected the keys"):
        VAEConfig.from_dict({**config.to_dict(), "depth": 3})
    with pytest.raises(ValueError, match="expected the keys"):
        VAEConfig.from_dict({"image_size": 28})


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VAEConfig().image_size = 32  # type: ignore[misc]
