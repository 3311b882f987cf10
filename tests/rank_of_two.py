"""One rank of two in training, against one process with the whole batch; started by test_distributed.py.

The network is float64 here, so that a sum in another order shows in the seventh digit and a mistake in the third:
autocast leaves float64 alone, and the losses are float32.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import AveragedModel

from defense_vae_fast.nn.model import DefenseVAE, VAEOutput
from training.attacks import PGD, CarliniWagnerL2, RandFGSM
from training.data import Split, to_float
from training.distributed import ALONE, Ranks
from training.pairs import FlyPairs, Pairs, TablePairs, attack_all
from training.recipe import Recipe
from training.step import Average, Step, make_optimizer

RECIPE = Recipe(
    "test", "fly", ("x",), steps=9, attacked=6, clean=4, learning_rate=1e-3, agreement_weight=1.0,
    own_agreement_weight=2.0, averaging=0.9, kl_weight=0.1,
)  # fmt: skip
ATTACKS = (RandFGSM(0.3), PGD(0.3, steps=3), CarliniWagnerL2(1.0, iterations=20))


class Exact(nn.Module):
    """A classifier in float64, whose word on an image does not depend on the images beside it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(784, 10, generator=generator, dtype=torch.float64) / 28)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tanh(x.flatten(1).double() @ self.get_buffer("weight"))
        return result


class Training:
    """Steps on the batches of ``source``, and all that they change."""

    def __init__(self, split: Split, recipe: Recipe, ranks: Ranks, *, whole: bool = True) -> None:
        torch.manual_seed(1)
        self.model = DefenseVAE(kernels="torch").double().train()
        self.averaged = AveragedModel(self.model)
        if ranks.group is not None and whole:
            self.model.share(ranks.group)
        judges = [Exact()]
        self.step = Step(
            self._exactly, Average(self.averaged, self.model, recipe.averaging, recorded=False),
            make_optimizer(self.model, recipe, recorded=False), recipe, split.images, judges,
            [judge(to_float(split.images)) for judge in judges], ranks=ranks,
        )  # fmt: skip
        self.source = FlyPairs(split, judges, attacked=recipe.attacked, clean=recipe.clean, seed=0, ranks=ranks)

    def _exactly(self, images: Tensor) -> VAEOutput:
        output: VAEOutput = self.model(images.double())
        return output

    def run(self, steps: int) -> list[float]:
        torch.manual_seed(2)
        return [float(self.step(self.source.batch(step), 0, 1e-3, 0)) for step in range(steps)]


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, dist.group.WORLD, dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(60) % 10)
    try:
        fresh_pairs(split, ranks)
        made_pairs(split, ranks)
        steps(split, ranks)
        words(ranks)
        ranks.wait()  # as training does: a rank that ends while the other still talks to it may be aborted
    finally:
        dist.destroy_process_group()


def fresh_pairs(split: Split, ranks: Ranks) -> None:
    """The ranks' shares are the rows of one process, to the bit, and the random state is the same afterwards."""
    # Five of ten attacked rows in the first half: the halves are shared unevenly, the batch is not.
    options = {"attacked": 10, "clean": 4, "seed": 0}
    whole = FlyPairs(split, [Exact()], **options)  # type: ignore[arg-type]
    part = FlyPairs(split, [Exact()], ranks=ranks, **options)  # type: ignore[arg-type]
    for step in range(4):
        torch.manual_seed(step)
        expected, after = whole.batch(step), torch.get_rng_state()
        torch.manual_seed(step)
        ours = part.batch(step)
        assert torch.equal(ours.clean_index, expected.clean_index[ranks.share])
        assert torch.equal(ours.inputs, expected.inputs[ranks.share])
        assert torch.equal(torch.get_rng_state(), after)
        assert len(ours.inputs) == 7


def made_pairs(split: Split, ranks: Ranks) -> None:
    """Attacked batches in turns: the table of one process, to the bit, with half of the work on each rank."""
    import training.pairs

    training.pairs.ATTACK_BATCH = 16  # four batches, the last one short
    seen: list[int] = []

    class Counted(Exact):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    for attack in ATTACKS:
        expected = attack_all(attack, Exact(), split, seed=3)
        seen.clear()
        assert torch.equal(attack_all(attack, Counted(), split, seed=3, ranks=ranks), expected)
        # CleverHans' rule may end CW early, so the number of iterations is not known; no batch is another rank's.
        assert set(seen) <= ({16} if ranks.first else {16, 12}) | set(range(1, 16))
    seen.clear()
    attack_all(PGD(0.3, steps=3), Counted(), split, ranks=ranks)
    assert sum(seen) == 3 * (32 if ranks.first else 28)
    table = {"batch_size": 8, "seed": 0, "attacks": ATTACKS}
    one, both = (TablePairs(split, {"x": Exact()}, ranks=who, **table) for who in (ALONE, ranks))  # type: ignore[arg-type]
    assert both.steps_per_epoch == one.steps_per_epoch == 4 * 60 // 8
    for step in (0, 7, one.steps_per_epoch):
        for ours, expected in zip(both.batch(step), one.batch(step), strict=True):
            assert torch.equal(ours, expected[ranks.share])
    one, both = (TablePairs(split, {"x": Exact()}, noise=0.5, ranks=who, **table) for who in (ALONE, ranks))  # type: ignore[arg-type]
    torch.manual_seed(4)
    expected = one.batch(3).inputs
    after = torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(both.batch(3).inputs, expected[ranks.share])
    assert torch.equal(torch.get_rng_state(), after)


def steps(split: Split, ranks: Ranks) -> None:
    """Losses, weights, statistics and average after three steps are those of one process but for rounding."""
    alone, both = Training(split, RECIPE, ALONE), Training(split, RECIPE, ranks)
    expected, losses = torch.tensor(alone.run(3)), torch.tensor(both.run(3))
    # Losses are sums of some 8,000 float32 terms: relative rounding of 1e-7 each, in either order.
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    for ours, theirs in ((both.model, alone.model), (both.averaged, alone.averaged)):
        for name, value in theirs.state_dict().items():
            found = ours.state_dict()[name]
            # A gradient of float32's rounding alone may turn its sign, and Adam makes a step of 1e-3 of it.
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=name)
            others = [torch.empty_like(found) for _ in range(2)]
            dist.all_gather(others, found)
            assert torch.equal(*others), name
    # What would be lost by one rank's statistics and noise in place of everybody's shows from the first step on.
    apart = torch.tensor(Training(split, RECIPE, ranks, whole=False).run(1))
    assert float(((apart - expected[:1]) / expected[:1]).abs().max()) > 1e-3
    # An infinite gradient on one rank is everybody's: no rank makes the step.
    before = copy.deepcopy(both.model.state_dict())
    scaled = Training(split, replace(RECIPE, averaging=0.9), ranks)
    scaled.step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaled.model.load_state_dict(before)
    batch = scaled.source.batch(0)
    scaled.step(Pairs(batch.inputs * (torch.inf if ranks.rank == 1 else 1.0), batch.clean_index), 0, 1e-3, 0)
    for name, parameter in scaled.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert scaled.step.scaler.get_scale() == 2.0


def words(ranks: Ranks) -> None:
    """What ranks ask each other."""
    assert ranks.any(ranks.rank == 1)
    assert not ranks.any(False)
    ranks.check_same({"seed": 1})
    try:
        ranks.check_same({"seed": ranks.rank, "data": "x"})
    except ValueError as error:
        assert str(error) == "ranks 0 and 1: expected one and the same run, they differ in seed (0 and 1)"  # noqa: PT017
    else:
        raise AssertionError("two runs were taken for one")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
