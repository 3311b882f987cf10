"""One rank of two: BatchNormReLU2d over a process group, against one process with the whole batch."""

from __future__ import annotations

import sys

import torch
from torch import distributed as dist

from defense_vae_fast.nn.fused import BatchNormReLU2d
from defense_vae_fast.nn.kernels import selection


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    batches, gradients = (100 + torch.randn(2, 5, 4, 3, 3, generator=generator) for _ in range(2))
    gradients -= 100
    mine = slice(0, 3) if rank == 0 else slice(3, 5)
    cases: list[tuple[float | None, list[selection.Kernels]]] = [(None, ["torch"]), (0.1, ["torch", "triton"])]
    for momentum, forms in cases:
        whole = BatchNormReLU2d(4, momentum=momentum, kernels="torch").double()
        for form in forms:
            part = BatchNormReLU2d(4, momentum=momentum, kernels=form, process_group=dist.group.WORLD)
            if form == "torch":
                part.double()
            whole.load_state_dict(part.state_dict())
            whole.zero_grad()
            for batch, gradient in zip(batches, gradients, strict=True):
                exact = batch.double().requires_grad_()
                y = whole(exact)
                y.backward(gradient.double())
                x = batch[mine].to(part.weight.dtype).requires_grad_()
                ours = part(x)
                ours.backward(gradient[mine].to(x.dtype))
                close(ours, y[mine])
                close(x.grad, exact.grad[mine])
            for name, parameter in part.named_parameters():
                # A rank's gradient is of its own images; together they are the whole's.
                dist.all_reduce(parameter.grad)
                close(parameter.grad, whole.get_parameter(name).grad)
            for name, buffer in part.named_buffers():
                close(buffer, whole.get_buffer(name))
            part.eval()
            close(part(x), whole.eval()(x.double()))
            whole.train()
    dist.destroy_process_group()


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=5e-5)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
