"""The latent's sample and its divergence in one pass: Triton kernels, launchers, registration with torch.

The noise is made in the kernel by Philox, a counter-based generator: eps of element i is a function of a seed and i, so
the backward makes it again and nothing is stored but the seed. The seed is drawn from torch's generator and never
leaves the device. The twin is ``reference.reparameterize``.

This module imports Triton; everyone else goes through ``selection``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

TILE = 512  # values a program holds at once, or one row where that is longer: 4 for each thread
MAX_LATENT = 4096


@triton.jit
def _noise(seed, row, column, latent):
    """Standard normal numbers for the elements at (row, column) of a (N, latent) tensor."""
    return tl.randn(tl.load(seed), row[:, None] * latent + column[None, :])


@triton.jit
def sample_kernel(
    mu,  # rows x latent
    logvar,
    seed,  # int64 scalar
    z,  # rows x latent, dense
    kl,  # float32 (rows)
    rows,
    latent,
    mu_stride,
    logvar_stride,
    ROWS: tl.constexpr,
    LATENT: tl.constexpr,
):
    """z = mu + exp(logvar / 2) * eps, and -1/2 sum(1 + logvar - mu^2 - exp(logvar)) of each row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, LATENT)
    mask = (row < rows)[:, None] & (column < latent)[None, :]
    mean = tl.load(mu + row[:, None] * mu_stride + column[None, :], mask, other=0.0).to(tl.float32)
    # The logarithm 0 of a variance of 1 adds nothing to the sum.
    log = tl.load(logvar + row[:, None] * logvar_stride + column[None, :], mask, other=0.0).to(tl.float32)
    sample = mean + tl.exp(0.5 * log) * _noise(seed, row, column, latent)
    tl.store(z + row[:, None] * latent + column[None, :], sample.to(z.dtype.element_ty), mask)
    total = -0.5 * tl.sum(1.0 + log - mean * mean - tl.exp(log), 1)
    tl.store(kl + row, total, row < rows)


@triton.jit
def sample_backward_kernel(
    dz,  # rows x latent, dense
    dkl,  # (rows)
    mu,
    logvar,
    seed,
    dmu,  # rows x latent, dense
    dlogvar,
    rows,
    latent,
    mu_stride,
    logvar_stride,
    SAMPLED: tl.constexpr,  # there is a gradient of z
    DIVERGED: tl.constexpr,  # there is one of the divergence
    ROWS: tl.constexpr,
    LATENT: tl.constexpr,
):
    """Gradients of mu and logvar from those of z and of the divergence."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, LATENT)
    mask = (row < rows)[:, None] & (column < latent)[None, :]
    log = tl.load(logvar + row[:, None] * logvar_stride + column[None, :], mask, other=0.0).to(tl.float32)
    place = row[:, None] * latent + column[None, :]
    of_mu = tl.zeros([ROWS, LATENT], tl.float32)
    of_log = tl.zeros([ROWS, LATENT], tl.float32)
    if SAMPLED:
        gradient = tl.load(dz + place, mask, other=0.0).to(tl.float32)
        of_mu += gradient
        of_log += gradient * _noise(seed, row, column, latent) * (0.5 * tl.exp(0.5 * log))
    if DIVERGED:
        mean = tl.load(mu + row[:, None] * mu_stride + column[None, :], mask, other=0.0).to(tl.float32)
        gradient = tl.load(dkl + row, row < rows, other=0.0).to(tl.float32)[:, None]
        of_mu += gradient * mean
        of_log += gradient * (0.5 * (tl.exp(log) - 1.0))
    tl.store(dmu + place, of_mu.to(dmu.dtype.element_ty), mask)
    tl.store(dlogvar + place, of_log.to(dlogvar.dtype.element_ty), mask)


def reparameterize(
    mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None, rows: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Sample z and give its divergence; as ``reference.reparameterize``, with other noise from the same seed."""
    limits = torch.iinfo(torch.int64)
    seed = torch.randint(limits.min, limits.max, (), dtype=torch.int64, device=mu.device, generator=generator)
    first, step = rows
    if step > 1:
        # An element's noise depends on its place: put the rows where they have theirs, which costs less than a kernel
        # with two arguments more, for which ptxas runs out of registers.
        mu, logvar = (F.pad(x.unsqueeze(1), (0, 0, first, step - 1 - first)).flatten(0, 1) for x in (mu, logvar))
    z, kl = sample(mu, logvar, seed)
    return (z[first::step], kl[first::step]) if step > 1 else (z, kl)


@torch.library.custom_op("defense_vae_fast::sample", mutates_args=())
def sample(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """z = mu + exp(logvar / 2) * eps(seed), and the divergence of equation 2.

    Args:
        mu: (N, latent_dim) float32, float16 or bfloat16, latent_dim at most 4096.
        logvar: (N, latent_dim), of the same kind.
        seed: int64 scalar on the same device.

    Returns:
        (N, latent_dim) in ``mu``'s dtype, and (N,) float32.
    """
    if mu.ndim != 2 or mu.shape != logvar.shape or not 1 <= mu.shape[1] <= MAX_LATENT or mu.numel() >= 2**31:
        raise ValueError(
            f"mu and logvar: expected one shape (N, latent_dim) with a latent of 1 to {MAX_LATENT}, "
            f"got {tuple(mu.shape)} and {tuple(logvar.shape)}"
        )
    mu, logvar = _rows(mu), _rows(logvar)
    rows, latent = mu.shape
    z, kl = mu.new_empty(mu.shape), mu.new_empty(rows, dtype=torch.float32)
    grid, constants = _grid(rows, latent)
    with torch.cuda.device_of(mu):
        sample_kernel[grid](mu, logvar, seed, z, kl, rows, latent, mu.stride(0), logvar.stride(0), **constants)
    return z, kl


@sample.register_fake
def _(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[0], dtype=torch.float32)


@torch.library.custom_op("defense_vae_fast::sample_backward", mutates_args=())
def sample_backward(
    dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of mu and logvar; a gradient that is None adds nothing, however large its factor."""
    mu, logvar = _rows(mu), _rows(logvar)
    rows, latent = mu.shape
    dmu, dlogvar = mu.new_empty(mu.shape), logvar.new_empty(mu.shape)
    grid, constants = _grid(rows, latent)
    with torch.cuda.device_of(mu):
        sample_backward_kernel[grid](
            None if dz is None else dz.contiguous(), None if dkl is None else dkl.contiguous(), mu, logvar, seed,
            dmu, dlogvar, rows, latent, mu.stride(0), logvar.stride(0),
            SAMPLED=dz is not None, DIVERGED=dkl is not None, **constants,
        )  # fmt: skip
    return dmu, dlogvar


@sample_backward.register_fake
def _(dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), logvar.new_empty(mu.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    # A weight of 0 must not turn an infinite divergence into NaN: no gradient is None here, not 0.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
    if dz is None and dkl is None:
        return None, None, None
    dmu, dlogvar = sample_backward(dz, dkl, *ctx.saved_tensors)
    return dmu, dlogvar, None


sample.register_autograd(_backward, setup_context=_keep)


def _rows(x: Tensor) -> Tensor:
    """``x`` with dense rows, which may lie apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _grid(rows: int, latent: int) -> tuple[tuple[int], dict[str, Any]]:
    constants = tile(latent)
    # An empty batch launches one program, whose every row is masked.
    return (max(1, triton.cdiv(rows, constants["ROWS"])),), constants


def tile(latent: int) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    width = triton.next_power_of_2(latent)
    height = max(1, TILE // width)
    return {"ROWS": height, "LATENT": width, "num_warps": min(16, height * width // 128), "enable_fp_fusion": True}
