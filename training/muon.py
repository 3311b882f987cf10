"""Muon for a purifier's matrices, Adam for the rest, as one optimizer.

An autoencoder's loss is far steeper along some directions of its weights than along others. Adam weighs single entries
and follows the steep directions first; Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) makes all
singular values of a matrix's update alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Root mean square of a matrix's update, in learning rates.
UPDATE = 2.0
# Coefficients of Jordan's quintic iteration: five rounds bring singular values from 0.001 and above near 1.
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
BETAS, EPSILON = (0.9, 0.999), 1e-8


class Muon(torch.optim.Optimizer):
    """Adam, but for the matrices, whose momentum is made orthogonal first.

    Everything that changes from step to step lies in tensors, so that a recorded step can be repeated where the rate is
    a tensor too.

    Args:
        matrices: weights of two and more dimensions; all but the first are one.
        others: everything else, for Adam.
        rate: Adam's learning rate; a matrix moves by :data:`UPDATE` times it, in the root mean square.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], rate: float | Tensor) -> None:
        groups = [{"params": matrices, "orthogonal": True}, {"params": others, "orthogonal": False}]
        super().__init__(groups, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                move = _orthogonal if group["orthogonal"] else _adam
                weight.sub_(move(weight.grad, self.state[weight]).mul_(group["lr"]))


def _orthogonal(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Update of a matrix, for a rate of 1."""
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
    matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
    # The entries of an orthogonal matrix have a root mean square of one over the root of its longer side.
    return orthogonalize(matrix).mul_(UPDATE * max(matrix.shape) ** 0.5).view_as(gradient)


def orthogonalize(matrix: Tensor) -> Tensor:
    """(m, n) -> the nearest matrix whose singular values are alike: all between 0.7 and 1.2, but for tiny ones."""
    a, b, c = QUINTIC
    x: Tensor = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.T.bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).float()


def _adam(gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Adam's update, for a rate of 1."""
    if not state:
        state["count"] = torch.zeros((), device=gradient.device)
        state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    first, second = BETAS
    state["count"] += 1
    mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first ** state["count"])
    square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second ** state["count"])
    update: Tensor = mean / (square.sqrt() + EPSILON)
    return update
