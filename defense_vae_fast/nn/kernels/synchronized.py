"""BatchNorm and ReLU with the statistics of all ranks of a process group.

``torch.nn.SyncBatchNorm`` in another shape: each rank gives mean, variance and number of its values; they are merged
in the order of ranks, so that every rank gets the same bits. (Sums and sums of squares would say the same with fewer
digits.) Gradients of weight and bias stay a rank's own, as DistributedDataParallel wants them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from defense_vae_fast.nn.kernels import reference


def batch_norm_relu(
    operations: ModuleType,
    group: dist.ProcessGroup,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    batches: Tensor | None,
    *,
    momentum: float | None,
    epsilon: float,
) -> Tensor:
    """``reference.batch_norm_relu`` in training mode over the batches of all ranks, which may differ in size.

    Args:
        operations: the module with the four parts, ``bn_relu`` or ``reference``.
        group: whose ranks take part; all must call.
        x: and the others are as in ``reference.batch_norm_relu``.
    """
    if batches is not None:
        batches.add_(1)
    own_mean, own_variance = operations.batch_statistics(x.detach(), None, None, None, 0.0)
    mean, variance, count = _merge(own_mean, own_variance, x.numel() // x.shape[1], group)
    if running_mean is not None and running_variance is not None:
        reference.update_running_statistics(running_mean, running_variance, batches, mean, variance, count, momentum)
    y: Tensor = _Normalize.apply(x, weight, bias, mean, variance, epsilon, count, operations, group)  # type: ignore[no-untyped-call]
    return y


def _merge(mean: Tensor, variance: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values over all ranks, on the device."""
    own = torch.stack([mean, variance, torch.full_like(mean, count)])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group)
    means, variances, counts = torch.stack(gathered, 1)
    total = counts.sum(0)
    offset = (counts * (means - means[0])).sum(0) / total
    deviation = means - means[0] - offset
    return means[0] + offset, (counts * (variances + deviation.square())).sum(0) / total, total


class _Normalize(torch.autograd.Function):
    """``normalize_relu`` whose gradient sums are those of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor,
        epsilon: float, count: Tensor, operations: ModuleType, group: dist.ProcessGroup,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, variance, count)
        ctx.epsilon, ctx.operations, ctx.group = epsilon, operations, group
        y: Tensor = operations.normalize_relu(x, weight, bias, mean, variance, epsilon, True)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, count = ctx.saved_tensors
        given = (dy, x, weight, bias, mean, variance, ctx.epsilon)
        sums = ctx.operations.normalize_relu_sums(*given)
        shared = sums.clone()
        dist.all_reduce(shared, group=ctx.group)
        # The gradient divides by this rank's number of values.
        shared *= x.numel() // x.shape[1] / count
        dx = ctx.operations.normalize_relu_input_gradient(*given, shared)
        dweight = None if weight is None else sums[1].to(weight.dtype)
        dbias = None if bias is None else sums[0].to(bias.dtype)
        return dx, dweight, dbias, None, None, None, None, None, None
