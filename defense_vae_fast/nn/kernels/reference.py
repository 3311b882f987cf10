"""Plain-torch twins of the fused kernels: their specification, CPU path, test oracle and benchmark baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def reparameterize(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample z = mu + exp(logvar / 2) * eps with eps ~ N(0, I) (section 2.1).

    Args:
        mu: (N, latent_dim) means, floating point.
        logvar: (N, latent_dim) logarithms of the variances.
        generator: source of eps; torch's default generator of the device where None.

    Returns:
        (N, latent_dim) sample in ``mu``'s dtype, differentiable in both arguments.
    """
    eps = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
    return mu + torch.exp(0.5 * logvar) * eps
