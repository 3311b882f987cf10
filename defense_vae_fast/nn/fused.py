"""Operations that have two forms, a Triton kernel and a plain-torch twin, and the module built on one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from defense_vae_fast.nn.kernels import reference
from defense_vae_fast.nn.kernels.selection import Kernels, check, use_triton


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None = None,
    rows: tuple[int, int] = (0, 1),
    *,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample z = mu + exp(logvar / 2) * eps (section 2.1), and give the divergence of equation 2.

    Args:
        mu: (N, latent_dim) means.
        logvar: (N, latent_dim) logarithms of the variances.
        generator: source of the noise; torch's default generator of the device where None. The two forms make
            different noise of the same seed.
        rows: these images are every ``rows[1]``-th of a larger batch, from number ``rows[0]`` on: they get the noise
            that they would get in it.
        kernels: ``triton`` or ``torch``, or ``auto`` for Triton on CUDA where it works.

    Returns:
        (N, latent_dim) in ``mu``'s dtype, and (N,) float32; both differentiable in both arguments.

    Raises:
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    if use_triton(kernels, mu.device.type, mu.dtype):
        from defense_vae_fast.nn.kernels import reparameterize as triton_form

        return triton_form.reparameterize(mu, logvar, generator, rows)
    return reference.reparameterize(mu, logvar, generator, rows)


class BatchNormReLU2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` and ``ReLU`` as one module, and on CUDA as one operation.

    Parameters, buffers, state_dict and statistics are those of ``nn.BatchNorm2d``, so checkpoints move between the two
    freely, and ``weight=None`` (``affine=False``), ``momentum=None`` and ``track_running_stats=False`` mean the same.
    The fused form computes in float32, keeps only x for the backward, has no second derivative (asking for one is an
    error), and gives the same bits on each run.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` would take this module for a BatchNorm and drop its ReLU: give it a
    ``process_group`` instead.

    Args:
        num_features: C of (N, C, H, W) inputs.
        eps: added to the variance.
        momentum: weight of the new statistics in the running ones; None makes those an average over all batches.
        affine: have a weight and a bias.
        track_running_stats: keep running statistics and use them in eval mode.
        kernels: ``triton`` or ``torch``, or ``auto`` for Triton on CUDA where it works.
        process_group: in training, take statistics over all ranks of this group (``dist.group.WORLD`` for all).
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        ValueError: ``kernels`` is none of the three; in the forward, x is not (N, C, H, W) or has fewer than two
            values a channel in training.
        RuntimeError: in the forward, ``triton`` was asked for and cannot run.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        kernels: Kernels = "auto",
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.kernels = check(kernels)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> max(0, BatchNorm(x)) in its shape, dtype and layout."""
        self._check_input_dim(x)
        training = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        mean, variance, batches = (
            (self.running_mean, self.running_var, self.num_batches_tracked) if tracked else (None, None, None)
        )
        vectors = (self.weight, self.bias, mean, variance)
        common: dict[str, Any] = {"momentum": self.momentum, "epsilon": self.eps}
        fused = use_triton(self.kernels, x.device.type, x.dtype)
        if self.training and self.process_group is not None:
            from defense_vae_fast.nn.kernels import synchronized

            return synchronized.batch_norm_relu(
                _triton_form() if fused else reference, self.process_group, x, *vectors, batches, **common
            )
        if not fused:
            return reference.batch_norm_relu(x, *vectors, batches, training=training, **common)
        return _batch_norm_relu(x, *vectors, batches, training=training, **common)


def _batch_norm_relu(
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
    """``reference.batch_norm_relu`` by Triton's kernels."""
    operations = _triton_form()
    if training:
        if batches is not None and momentum is None:
            batches.add_(1)
        mean, variance = operations.batch_statistics(x.detach(), running_mean, running_variance, batches, momentum)
    else:
        assert running_mean is not None
        assert running_variance is not None
        mean, variance = running_mean, running_variance
    y: Tensor = operations.normalize_relu(x, weight, bias, mean, variance, epsilon, training)
    return y


def _triton_form() -> Any:
    """The module with Triton's kernels, imported where it is used and not before."""
    from defense_vae_fast.nn.kernels import bn_relu

    return bn_relu
