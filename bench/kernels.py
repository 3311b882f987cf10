"""BatchNorm with ReLU in its several forms, as they are timed against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bench import timing
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.nn.fused import BatchNormReLU2d

Form = Literal["torch contiguous", "torch channels_last", "compiled channels_last", "triton channels_last"]
FORMS: tuple[Form, ...] = (
    "torch contiguous", "torch channels_last", "compiled channels_last", "triton channels_last",
)  # fmt: skip
# Passes over the tensor that two sweeps make: x twice and y forward; dy and x twice and dx backward.
PASSES = {False: 3, True: 8}


def shapes() -> dict[str, tuple[int, int]]:
    """Channels and side of Table 6's feature maps that are normalised, each once, by the first layer that has it."""
    found: dict[tuple[int, int], str] = {}
    for layer in VAEConfig().layers():
        if layer.batch_norm:
            found.setdefault((layer.out_channels, layer.out_size), layer.name)
    return {name: shape for shape, name in found.items()}


class Measured(NamedTuple):
    """What one form took and how exact it was."""

    seconds: list[float]
    bytes_moved: int
    error: float
    error_of_plain_torch: float


def measure(
    form: Form, shape: tuple[int, int, int, int], *, backward: bool, graph: bool, device: str, rounds: int,
    dtype: torch.dtype = torch.float16,
) -> Measured:  # fmt: skip
    """Time one form and compare its last result with float64's."""
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    moved = PASSES[backward] * elements * dtype.itemsize
    count = timing.rotation(moved)
    layout = torch.contiguous_format if "contiguous" in form else torch.channels_last
    torch.manual_seed(0)
    inputs, gradients = (
        [torch.randn(shape).to(device, dtype, memory_format=layout) for _ in range(count)] for _ in range(2)
    )
    call, module = _form(form, shape[1], device, backward)
    results: dict[int, tuple[Tensor, ...]] = {}

    def turn(number: int) -> None:
        results[0] = call(inputs[number % count].requires_grad_(backward), gradients[number % count])

    calls = max(count, min(200, 2**28 // elements)) if device == "cuda" else count
    spent = timing.seconds(turn, device=device, calls=calls, rounds=rounds, graph=graph)
    last = (calls - 1) % count
    exact, plain = (
        _form("torch channels_last", shape[1], device, backward, like=module, double=double)[0](
            inputs[last].detach().to(torch.float64 if double else dtype).requires_grad_(backward),
            gradients[last].to(torch.float64 if double else dtype),
        )
        for double in (True, False)
    )
    ours, theirs = (
        max(timing.same(value, true) / (float(true.abs().max()) or 1) for value, true in zip(some, exact, strict=True))
        for some in (results[0], plain)
    )
    return Measured(spent, moved, ours, theirs)


def _form(
    form: Form, channels: int, device: str, backward: bool, *, like: BatchNormReLU2d | None = None, double: bool = False
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, ...]], BatchNormReLU2d]:
    """(x, dy) -> (y,) or (y, gradients of x, weight and bias)."""
    module = BatchNormReLU2d(channels, kernels="triton" if form.startswith("triton") else "torch").to(device)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        module.weight.copy_(1 + 0.1 * torch.randn(channels, generator=generator))
        module.bias.copy_(0.1 * torch.randn(channels, generator=generator))
        if like is not None:
            module.load_state_dict(like.state_dict())
    if double:
        module.double()
    apply: Callable[..., Any] = module
    if form.startswith("compiled"):
        torch._dynamo.reset()
        apply = torch.compile(module, fullgraph=True, dynamic=False)

    def call(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (apply(x),)
        y = apply(x)
        return (y.detach(), *torch.autograd.grad(y, (x, module.weight, module.bias), dy))

    return call, module
