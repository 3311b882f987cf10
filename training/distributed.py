"""One training on several processes ("ranks"), each with its share of every batch; ``torchrun`` starts them.

Rank r of n takes rows r, r + n, r + 2n ... of the batch that one process would take. Whatever is drawn at random is
drawn for the whole batch on every rank, from the same state, and each rank uses its rows: so the random state is the
same everywhere and at all times, and neither noise nor order depends on how many ranks there are.

Gradients travel in one piece after the backward pass. DistributedDataParallel would send them in pieces while it still
runs; it also wants one forward a backward and its own hooks in a captured step, and there are 12 MB in all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from training.device import find_device

AGREE_EVERY = 8
"""Steps on CUDA between two questions whether a rank was told to stop: the message makes the hosts wait for each other.

On the CPU, where a step takes longer than the message by far, ranks ask after every one.
"""
_PATIENCE = timedelta(hours=24)
"""For ranks whose hosts wait for another one, which may train classifiers; that it has gone is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together; the default is a process of its own.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
        group: exchanges tensors on the training's device (NCCL on CUDA, gloo on the CPU); None for one process.
        words: exchanges what the hosts have to say, without touching the device (gloo).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    words: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This rank's rows of a batch."""
        return slice(self.rank, None, self.size)

    def check_batch(self, **counts: int) -> None:
        """Raise a ValueError unless all ranks can have as many of each kind of rows: means over ranks count on it."""
        for name, count in counts.items():
            if count % self.size:
                raise ValueError(
                    f"{name}: expected images a batch that {self.size} ranks can share evenly, got {count}; "
                    "start another number of processes (--nproc-per-node), or change the recipe"
                )

    def check_same(self, about: Mapping[str, Any]) -> None:
        """Raise a ValueError on every rank unless all of them are about to do the same."""
        if self.words is None:
            return
        said: list[str] = [""] * self.size
        dist.all_gather_object(said, json.dumps(about, sort_keys=True, default=str), self.words)
        first = json.loads(said[0])
        for rank, other in enumerate(map(json.loads, said)):
            differing = [key for key in first if other.get(key) != first[key]]
            if differing:
                raise ValueError(
                    f"ranks 0 and {rank}: expected one and the same run, they differ in "
                    + ", ".join(f"{key} ({first[key]!r} and {other.get(key)!r})" for key in differing)
                )

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank; all must ask."""
        if self.words is None:
            return mine
        answer = torch.tensor(int(mine))
        dist.all_reduce(answer, dist.ReduceOp.MAX, self.words)
        return bool(answer)

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.words is not None:
            dist.barrier(self.words)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first rank runs the body, then the others: what it downloads or trains they find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each float32 tensor by its mean over the ranks, the same bits on all of them, without waiting."""
        if self.group is None:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        flat /= self.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])

    def join(self, part: Tensor) -> Tensor:
        """The sum over the ranks, in place; for tensors that are 0 where another rank's part is."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the first one's values."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, 0, group=self.group)


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def name() -> str:
    """ " on rank 1 of 2", for messages; nothing where there is one process."""
    return f" on rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}" if launched() else ""


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's ranks and device; a process that torchrun did not start is alone.

    Args:
        device: "auto", "cpu", or "cuda", of which each rank takes the one of its local number; a process of its own
            may name any device.

    Raises:
        RuntimeError: another rank has gone.
        ValueError: no such device, or fewer than there are ranks on this machine.
    """
    if not launched():
        yield ALONE, find_device(device)
        return
    place = _device(device, int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda":
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", device_id=place)
        words = dist.new_group(backend="gloo", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        words = dist.group.WORLD
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, words), place
    except RuntimeError as error:
        # Not destroyed: that would wait for a rank that may be gone.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RuntimeError(f"another rank has gone, and its own message says why ({error})") from error
        raise
    dist.destroy_process_group()


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(
            f"device: expected 'auto', 'cpu' or 'cuda' with torchrun, got {name!r}; each rank takes its own"
        )
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if local >= found:
        raise ValueError(
            f"device: expected a CUDA device for each rank, got {found} for rank {local} of this machine; "
            "lower --nproc-per-node, or train with --device cpu"
        )
    return torch.device("cuda", local)
