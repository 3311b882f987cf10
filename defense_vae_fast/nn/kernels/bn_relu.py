"""BatchNorm and ReLU in one operation: Triton kernels, their launchers and their registration with torch.

Training reads x twice and writes y once (6 bytes an fp16 element), the backward reads dy and x twice and writes dx once
(10 bytes): the mask of the ReLU is computed again from x, so nothing but x and two vectors is kept. All arithmetic
is float32. A channel's values are cut into blocks by shape alone and their results are merged in a fixed order, so the
same input gives the same bits, on every device of one kind. The twin is ``reference.batch_norm_relu``.

This module imports Triton; everyone else goes through ``selection``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values a program holds at once: 16 for each thread of the eight warps
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
MERGE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
MAX_TILE_CHANNELS = 64
# Programs a reduction is cut into: about four for each multiprocessor of a large GPU. A constant, and not read from the
# device, so that the order of summation, and with it every bit, is the same everywhere. Also the most blocks that a
# channel can have, which one program merges.
MAX_BLOCKS = 512


# Kernels. A channels_last (N, C, H, W) tensor is a matrix with a row for each of N*H*W pixels and a column for each
# channel; a contiguous one is read as the same matrix, by other addresses.


@triton.jit
def _addresses(row, column, channels, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a tile of the matrix; ``PIXELS`` is H*W."""
    if WIDE:  # more values than an int32 counts
        row = row.to(tl.int64)
    if CHANNELS_LAST:
        offset = row[:, None] * channels + column[None, :]
    else:
        offset = (row // PIXELS * (channels * PIXELS) + row % PIXELS)[:, None] + (column * PIXELS)[None, :]
    return offset


@triton.jit
def _vector(pointer, column, mask, GIVEN: tl.constexpr, default):
    """A channel vector as float32, or ``default`` where there is none."""
    if GIVEN:
        value = tl.load(pointer + column, mask, other=0.0).to(tl.float32)
    else:
        value = tl.full(column.shape, default, tl.float32)
    return value


@triton.jit
def statistics_kernel(
    x,  # rows x channels
    partials,  # float32 (2, channels, blocks): mean and sum of squared deviations of each block of rows
    rows,
    channels,
    blocks,
    rows_per_block,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Welford's recurrence in every cell of a tile that moves down a block of rows, then one merge of the tile's rows.

    Deviations are taken from a running mean, so a mean far from zero costs no digits of the variance.
    """
    block = tl.program_id(0)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    lane = tl.arange(0, ROWS)
    start = block * rows_per_block
    end = tl.minimum(start + rows_per_block, rows)
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    seen = 0.0
    for first in range(start, end, ROWS):
        row = first + lane
        mask = (row < end)[:, None] & (column < channels)[None, :]
        value = tl.load(x + _addresses(row, column, channels, PIXELS, CHANNELS_LAST, WIDE), mask, other=0.0)
        value = value.to(tl.float32)
        seen += 1.0
        deviation = tl.where(mask, value - mean, 0.0)
        mean += deviation * (1.0 / seen)
        squares += deviation * (value - mean)
        count += tl.where(row < end, 1.0, 0.0)
    # Row 0 of the tile has seen at least one value; deviations from its mean keep the sum small.
    origin = tl.sum(tl.where((lane == 0)[:, None], mean, 0.0), 0)
    total = tl.sum(count, 0)
    merged = origin + tl.sum(count[:, None] * (mean - origin[None, :]), 0) / total
    deviation = mean - merged[None, :]
    squares = tl.sum(squares, 0) + tl.sum(count[:, None] * deviation * deviation, 0)
    place = partials + column * blocks + block
    tl.store(place, merged, column < channels)
    tl.store(place + channels * blocks, squares, column < channels)


@triton.jit
def merge_statistics_kernel(
    partials,  # as above
    mean,  # float32 (channels)
    variance,  # float32 (channels), biased
    running_mean,
    running_variance,
    batches,  # int64 scalar
    rows,
    channels,
    blocks,
    rows_per_block,
    momentum,
    TRACKED: tl.constexpr,
    CUMULATIVE: tl.constexpr,  # running statistics are plain averages over all batches
    COUNTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Merge the blocks of one channel and update its running statistics."""
    channel = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    count = tl.where(mask, tl.minimum(rows_per_block, rows - block * rows_per_block), 0).to(tl.float32)
    place = partials + channel * blocks
    origin = tl.load(place)
    means = tl.where(mask, tl.load(place + block, mask, other=0.0) - origin, 0.0)
    squares = tl.load(place + channels * blocks + block, mask, other=0.0)
    offset = tl.sum(count * means, 0) / rows
    deviation = means - offset
    squares = tl.sum(squares, 0) + tl.sum(count * deviation * deviation, 0)
    merged = origin + offset
    tl.store(mean + channel, merged)
    tl.store(variance + channel, squares / rows)
    if TRACKED:
        if CUMULATIVE:
            share = 1.0 / tl.load(batches).to(tl.float32)
        else:
            share = momentum
        old = tl.load(running_mean + channel).to(tl.float32)
        tl.store(running_mean + channel, ((1.0 - share) * old + share * merged).to(running_mean.dtype.element_ty))
        old = tl.load(running_variance + channel).to(tl.float32)
        new = (1.0 - share) * old + share * (squares / (rows - 1))
        tl.store(running_variance + channel, new.to(running_variance.dtype.element_ty))
    if COUNTED and channel == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def normalize_kernel(
    x,
    y,
    weight,
    bias,
    mean,
    variance,
    rows,
    channels,
    epsilon,
    AFFINE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y = max(0, (x - mean) / sqrt(variance + epsilon) * weight + bias)."""
    # The last rows first: the pass over x before this one has just left them in the cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    center = tl.load(mean + column, inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.load(variance + column, inside, other=1.0).to(tl.float32) + epsilon)
    scale = _vector(weight, column, inside, AFFINE, 1.0)
    shift = _vector(bias, column, inside, AFFINE, 0.0)
    mask = (row < rows)[:, None] & inside[None, :]
    offset = _addresses(row, column, channels, PIXELS, CHANNELS_LAST, WIDE)
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    result = (value - center[None, :]) * inverse[None, :] * scale[None, :] + shift[None, :]
    # Not a maximum, which would turn a NaN into 0.
    result = tl.where(result < 0.0, 0.0, result)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask)


@triton.jit
def gradient_sums_kernel(
    dy,
    x,
    weight,
    bias,
    mean,
    variance,
    partials,  # float32 (2, channels, blocks): sums of dz and of dz * x_hat over each block of rows
    rows,
    channels,
    blocks,
    rows_per_block,
    epsilon,
    AFFINE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums behind the gradients of bias, weight and x; dz is dy where the ReLU let through."""
    block = tl.program_id(0)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    center = tl.load(mean + column, inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.load(variance + column, inside, other=1.0).to(tl.float32) + epsilon)
    scale = _vector(weight, column, inside, AFFINE, 1.0)
    shift = _vector(bias, column, inside, AFFINE, 0.0)
    lane = tl.arange(0, ROWS)
    start = block * rows_per_block
    end = tl.minimum(start + rows_per_block, rows)
    sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    products = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(start, end, ROWS):
        row = first + lane
        mask = (row < end)[:, None] & inside[None, :]
        offset = _addresses(row, column, channels, PIXELS, CHANNELS_LAST, WIDE)
        # Outside the mask dy is 0 and x the mean, so that nothing is added, not even a NaN.
        gradient = tl.load(dy + offset, mask, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
        normalized = tl.where(mask, (value - center[None, :]) * inverse[None, :], 0.0)
        gradient = tl.where(normalized * scale[None, :] + shift[None, :] <= 0.0, 0.0, gradient)
        sums += gradient
        products += gradient * normalized
    place = partials + column * blocks + block
    tl.store(place, tl.sum(sums, 0), inside)
    tl.store(place + channels * blocks, tl.sum(products, 0), inside)


@triton.jit
def merge_sums_kernel(partials, sums, blocks, BLOCKS: tl.constexpr):
    """Sum the blocks of one row of ``partials`` (2 * channels, blocks)."""
    place = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    value = tl.load(partials + place * blocks + block, block < blocks, other=0.0)
    tl.store(sums + place, tl.sum(value, 0))


@triton.jit
def input_gradient_kernel(
    dy,
    x,
    dx,
    weight,
    bias,
    mean,
    variance,
    sums,  # float32 (2, channels): of dz and of dz * x_hat
    rows,
    channels,
    epsilon,
    AFFINE: tl.constexpr,
    BATCH: tl.constexpr,  # mean and variance are those of x, and so depend on it
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx = weight / sqrt(variance + epsilon) * (dz - mean of dz - x_hat * mean of dz * x_hat)."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)  # the last first, as above
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    center = tl.load(mean + column, inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.load(variance + column, inside, other=1.0).to(tl.float32) + epsilon)
    scale = _vector(weight, column, inside, AFFINE, 1.0)
    shift = _vector(bias, column, inside, AFFINE, 0.0)
    mask = (row < rows)[:, None] & inside[None, :]
    offset = _addresses(row, column, channels, PIXELS, CHANNELS_LAST, WIDE)
    gradient = tl.load(dy + offset, mask, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    normalized = (value - center[None, :]) * inverse[None, :]
    gradient = tl.where(normalized * scale[None, :] + shift[None, :] <= 0.0, 0.0, gradient)
    if BATCH:
        first = tl.load(sums + column, inside, other=0.0) / rows
        second = tl.load(sums + channels + column, inside, other=0.0) / rows
        gradient = gradient - first[None, :] - normalized * second[None, :]
    gradient = gradient * (scale * inverse)[None, :]
    tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask)


# Launchers.


class Shape(NamedTuple):
    """How a tensor is read as a matrix and cut up; a function of its shape and layout alone."""

    rows: int
    channels: int
    tile_rows: int
    tile_channels: int
    rows_per_block: int
    pixels: int
    channels_last: bool
    wide: bool

    @classmethod
    def of(cls, x: Tensor) -> Shape:
        """For a (N, C, H, W) tensor that is contiguous in one of the two layouts."""
        count, channels, height, width = x.shape
        rows = count * height * width
        channels_last = _layout(x) is torch.channels_last
        tile_channels = min(MAX_TILE_CHANNELS, triton.next_power_of_2(channels)) if channels_last else 1
        tile_rows = min(TILE // tile_channels, triton.next_power_of_2(rows))
        blocks = max(1, MAX_BLOCKS // triton.cdiv(channels, tile_channels))
        rows_per_block = triton.cdiv(triton.cdiv(rows, blocks), tile_rows) * tile_rows
        # PIXELS is a compile-time constant for the sake of its division, which channels_last has no use for.
        pixels = 1 if channels_last else height * width
        return cls(rows, channels, tile_rows, tile_channels, rows_per_block, pixels, channels_last, x.numel() >= 2**31)

    @property
    def blocks(self) -> int:
        """Blocks of rows that a reduction over a channel is cut into, at most ``MAX_BLOCKS``."""
        return int(triton.cdiv(self.rows, self.rows_per_block))

    @property
    def channel_tiles(self) -> int:
        """Tiles side by side."""
        return int(triton.cdiv(self.channels, self.tile_channels))

    @property
    def tiles(self) -> tuple[int, int]:
        """Grid of an elementwise pass."""
        return (int(triton.cdiv(self.rows, self.tile_rows)), self.channel_tiles)

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of every kernel that reads x."""
        return {
            "PIXELS": self.pixels, "CHANNELS_LAST": self.channels_last, "WIDE": self.wide, "ROWS": self.tile_rows,
            "CHANNELS": self.tile_channels, **OPTIONS,
        }  # fmt: skip


def _layout(x: Tensor) -> torch.memory_format:
    """The layout in which ``x`` is read and results are written: its own, or that nearest to it."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    channels_closest = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_closest else torch.contiguous_format


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _check(x: Tensor, **vectors: Tensor | None) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, C, H, W), got {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != x.shape[1:2] or not vector.is_contiguous()):
            raise ValueError(
                f"{name}: expected a contiguous vector of {x.shape[1]} channels, got {tuple(vector.shape)}"
                f" with strides {vector.stride()}"
            )


# Operations, as torch knows them.


@torch.library.custom_op(
    "defense_vae_fast::batch_statistics", mutates_args=("running_mean", "running_variance", "batches")
)
def batch_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, float32; running statistics are updated in place where they are given.

    It has no derivative: :func:`normalize_relu` accounts for what its gradient owes to the statistics.

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16, in any layout; channels_last and contiguous ones are not copied.
        running_mean: (C,) or None, with ``running_variance`` (unbiased).
        running_variance: (C,) or None.
        batches: int64 scalar, the number of batches seen. With a ``momentum`` it is counted up here. Without one it
            must have been already, and the running statistics become plain averages over that many.
        momentum: weight of the new statistics.
    """
    _check(x, running_mean=running_mean, running_variance=running_variance)
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(f"x: expected at least two values a channel in training, got {tuple(x.shape)}")
    x = x.contiguous(memory_format=_layout(x))
    shape = Shape.of(x)
    partials = x.new_empty((2, shape.channels, shape.blocks), dtype=torch.float32)
    mean, variance = (x.new_empty(shape.channels, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        statistics_kernel[(shape.blocks, shape.channel_tiles)](
            x, partials, shape.rows, shape.channels, shape.blocks, shape.rows_per_block, **shape.constants
        )
        merge_statistics_kernel[(shape.channels,)](
            partials, mean, variance, running_mean, running_variance, batches,
            shape.rows, shape.channels, shape.blocks, shape.rows_per_block, momentum or 0.0,
            TRACKED=running_mean is not None, CUMULATIVE=momentum is None,
            COUNTED=batches is not None and momentum is not None, BLOCKS=MAX_BLOCKS, **MERGE_OPTIONS,
        )  # fmt: skip
    return mean, variance


@batch_statistics.register_fake
def _(
    x: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.custom_op("defense_vae_fast::normalize_relu", mutates_args=())
def normalize_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    batch: bool,
) -> Tensor:
    """max(0, (x - mean) / sqrt(variance + epsilon) * weight + bias), in the dtype and layout of ``x``.

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16.
        weight: (C,) or None, with ``bias``.
        bias: (C,) or None.
        mean: (C,)
        variance: (C,), biased.
        epsilon: added to the variance.
        batch: mean and variance are :func:`batch_statistics` of ``x``: its gradient takes their part in it along.
    """
    _check(x, weight=weight, bias=bias, mean=mean, variance=variance)
    x = x.contiguous(memory_format=_layout(x))
    y = _empty_like(x)
    if not x.numel():
        return y
    shape = Shape.of(x)
    with torch.cuda.device_of(x):
        normalize_kernel[shape.tiles](
            x, y, weight, bias, mean, variance, shape.rows, shape.channels, epsilon,
            AFFINE=weight is not None, **shape.constants,
        )  # fmt: skip
    return y


@normalize_relu.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    batch: bool,
) -> Tensor:
    return _empty_like(x)


@torch.library.custom_op("defense_vae_fast::normalize_relu_sums", mutates_args=())
def normalize_relu_sums(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
) -> Tensor:
    """Float32 (2, C): the gradients of bias and weight, which the gradient of x needs as well."""
    x, dy = (tensor.contiguous(memory_format=_layout(x)) for tensor in (x, dy))
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    if not x.numel():
        return sums.zero_()
    shape = Shape.of(x)
    partials = x.new_empty((2, shape.channels, shape.blocks), dtype=torch.float32)
    with torch.cuda.device_of(x):
        gradient_sums_kernel[(shape.blocks, shape.channel_tiles)](
            dy, x, weight, bias, mean, variance, partials,
            shape.rows, shape.channels, shape.blocks, shape.rows_per_block, epsilon,
            AFFINE=weight is not None, **shape.constants,
        )  # fmt: skip
        merge_sums_kernel[(2 * shape.channels,)](partials, sums, shape.blocks, BLOCKS=MAX_BLOCKS, **MERGE_OPTIONS)
    return sums


@normalize_relu_sums.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("defense_vae_fast::normalize_relu_input_gradient", mutates_args=())
def normalize_relu_input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    sums: Tensor | None,
) -> Tensor:
    """Gradient of x, in its dtype and layout; ``sums`` are those above, or None for constant mean and variance."""
    x, dy = (tensor.contiguous(memory_format=_layout(x)) for tensor in (x, dy))
    dx = _empty_like(x)
    if not x.numel():
        return dx
    shape = Shape.of(x)
    with torch.cuda.device_of(x):
        input_gradient_kernel[shape.tiles](
            dy, x, dx, weight, bias, mean, variance, sums, shape.rows, shape.channels, epsilon,
            AFFINE=weight is not None, BATCH=sums is not None, **shape.constants,
        )  # fmt: skip
    return dx


@normalize_relu_input_gradient.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    sums: Tensor | None,
) -> Tensor:
    return _empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.epsilon, ctx.batch = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, variance = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    given = (dy, x, weight, bias, mean, variance, ctx.epsilon)
    sums = normalize_relu_sums(*given) if ctx.batch or wants_weight or wants_bias else None
    dx = normalize_relu_input_gradient(*given, sums if ctx.batch else None) if wants_x else None
    dbias = sums[0].to(bias.dtype) if sums is not None and wants_bias else None
    dweight = sums[1].to(weight.dtype) if sums is not None and wants_weight else None
    return dx, dweight, dbias, None, None, None, None


normalize_relu.register_autograd(_backward, setup_context=_keep)
