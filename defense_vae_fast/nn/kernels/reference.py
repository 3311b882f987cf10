"""Plain-torch twins of the fused kernels: their specification, CPU path, test oracle and benchmark baseline."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# BatchNorm and ReLU


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    batches: Tensor | None,
    *,
    training: bool,
    momentum: float | None,
    epsilon: float,
) -> Tensor:
    """torch's BatchNorm, then its ReLU.

    Args:
        x: (N, C, H, W), floating point.
        weight: (C,) or None, with ``bias``.
        bias: (C,) or None.
        running_mean: (C,) or None, with ``running_variance``; updated in training, used in its place otherwise.
        running_variance: (C,) or None.
        batches: int64 scalar or None: batches seen, counted up in training.
        training: normalise with the batch's own statistics.
        momentum: weight of the new statistics in the running ones; None makes those an average over all batches.
        epsilon: added to the variance.

    Returns:
        The shape, dtype and layout of ``x``.

    Raises:
        ValueError: fewer than two values a channel in training.
    """
    share = momentum
    if training and batches is not None:
        batches.add_(1)
        share = 1 / float(batches) if momentum is None else momentum
    return torch.relu(F.batch_norm(x, running_mean, running_variance, weight, bias, training, share or 0.0, epsilon))


def batch_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; see ``bn_relu.batch_statistics``."""
    values = x.to(_accumulator(x))
    variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    if running_mean is not None and running_variance is not None:
        update_running_statistics(
            running_mean, running_variance, batches, mean, variance, x.numel() // x.shape[1], momentum
        )
    if batches is not None and momentum is not None:
        batches.add_(1)
    return mean, variance


def update_running_statistics(
    running_mean: Tensor,
    running_variance: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: int | Tensor,
    momentum: float | None,
) -> None:
    """Move running statistics towards those of ``count`` values a channel, without reading anything back."""
    if momentum is None:
        assert batches is not None
        share: float | Tensor = 1 / batches.to(mean.dtype)
    else:
        share = momentum
    unbiased = variance * (count / (count - 1))
    running_mean.copy_((1 - share) * running_mean + share * mean)
    running_variance.copy_((1 - share) * running_variance + share * unbiased)


def normalize_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    batch: bool,
) -> Tensor:
    """max(0, (x - mean) / sqrt(variance + epsilon) * weight + bias); see ``bn_relu.normalize_relu``."""
    return _normalized(x, weight, bias, mean, variance, epsilon)[1].relu().to(x.dtype)


def normalize_relu_sums(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
) -> Tensor:
    """(2, C): gradients of bias and weight."""
    normalized, result = _normalized(x, weight, bias, mean, variance, epsilon)
    gradient = torch.where(result <= 0, 0, dy.to(result.dtype))
    return torch.stack([gradient.sum((0, 2, 3)), (gradient * normalized).sum((0, 2, 3))])


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
    """Gradient of x; ``sums`` are those above, or None for constant mean and variance."""
    normalized, result = _normalized(x, weight, bias, mean, variance, epsilon)
    gradient = torch.where(result <= 0, 0, dy.to(result.dtype))
    if sums is not None:
        first, second = (sums / (x.numel() // x.shape[1])).view(2, 1, -1, 1, 1)
        gradient = gradient - first - normalized * second
    scale = torch.rsqrt(variance + epsilon) if weight is None else weight * torch.rsqrt(variance + epsilon)
    return (gradient * _column(scale)).to(x.dtype)


def _normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x_hat, and what the ReLU is applied to."""
    values = x.to(_accumulator(x))
    normalized = (values - _column(mean)) * _column(torch.rsqrt(variance + epsilon))
    if weight is None or bias is None:
        return normalized, normalized
    return normalized, normalized * _column(weight) + _column(bias)


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# The latent


def reparameterize(
    mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None, rows: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Sample z = mu + exp(logvar / 2) * eps with eps ~ N(0, I) (section 2.1), and the divergence of equation 2.

    Args:
        mu: (N, latent_dim) means, floating point.
        logvar: (N, latent_dim) logarithms of the variances.
        generator: source of eps; torch's default generator of the device where None.
        rows: these images are every ``rows[1]``-th of a larger batch, from number ``rows[0]`` on, whose noise is drawn.

    Returns:
        z, (N, latent_dim) in ``mu``'s dtype, and D_KL(q(z | x) || N(0, I)), (N,) float32 (float64 for such inputs),
        summed over the latent; both differentiable in both arguments.
    """
    first, step = rows
    shape = len(mu) * step, *mu.shape[1:]
    eps = torch.randn(shape, dtype=mu.dtype, device=mu.device, generator=generator)[first::step]
    return mu + torch.exp(0.5 * logvar) * eps, divergence(mu, logvar)


def divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """D_KL(q(z | x) || N(0, I)) of equation 2, summed over the latent: (N, latent_dim) twice -> (N,)."""
    mu, logvar = mu.to(_accumulator(mu)), logvar.to(_accumulator(logvar))
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
