"""Signs that an attack is weaker than it looks (Carlini et al. 2019), looked for before it is believed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.attacks import FGSM, PGD, predict

EPSILON = 0.1


class Check(NamedTuple):
    """One check."""

    name: str
    passed: bool
    found: str
    """What was seen."""


def checks(
    pipeline: nn.Module, images: Tensor, labels: Tensor, *, steps: int = 50, sampled: bool = False, seed: int = 0
) -> list[Check]:
    """Check a pipeline and the attacks on it.

    Args:
        pipeline: float images to logits, in eval mode.
        images: float (N, C, H, W) in [0, 1].
        labels: (N,) int64 true labels.
        steps: of the longest attack.
        sampled: the pipeline draws at random by design, and answers with log-probabilities.
        seed: of PGD's starts.
    """
    found = [_gradients(pipeline, images, labels), _modes(pipeline)]
    with torch.no_grad():
        first, second = pipeline(images), pipeline(images)
    same = torch.equal(first, second)
    found.append(
        Check("answers are the same every time", same or sampled, "the same" if same else
              f"differ by up to {float((first - second).abs().max()):.3g}" + (", as sampling does" if sampled else ""))
    )  # fmt: skip
    rows = first.float().sum(1)
    probabilities = bool((first >= 0).all()) and bool(((rows - 1).abs() < 1e-3).all())
    found.append(
        Check("answers are logits, not probabilities", not probabilities,
              "rows sum to 1: a softmax lies before the loss" if probabilities else "logits")
    )  # fmt: skip

    def kept(attacked: Tensor) -> float:
        return 100 * float((predict(pipeline, attacked) == labels).float().mean())

    def generator() -> torch.Generator:
        return torch.Generator(images.device).manual_seed(seed)

    few = max(1, steps // 5)
    single = kept(FGSM(EPSILON)(pipeline, images, labels))
    short = kept(PGD(EPSILON, few, min(1.0, 2.5 / few))(pipeline, images, labels, generator()))
    long = kept(PGD(EPSILON, steps, min(1.0, 5 / steps))(pipeline, images, labels, generator()))
    unbounded = kept(PGD(1.0, steps, min(1.0, 2.5 / steps))(pipeline, images, labels, generator()))
    noise = kept((images + EPSILON * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
                  .sign().to(images)).clamp(0, 1))  # fmt: skip
    return [
        *found,
        Check(
            "steps are stronger than one step",
            short <= single + 2,
            f"FGSM leaves {single:.1f} %, PGD-{few} {short:.1f} %",
        ),
        Check(
            "more steps are no weaker", long <= short + 2, f"PGD-{few} leaves {short:.1f} %, PGD-{steps} {long:.1f} %"
        ),
        Check(
            "gradients are stronger than noise", long <= noise, f"noise leaves {noise:.1f} %, PGD-{steps} {long:.1f} %"
        ),
        Check(
            "without a bound everything falls", unbounded < 1, f"PGD-{steps} with epsilon 1 leaves {unbounded:.1f} %"
        ),
    ]


def _gradients(pipeline: nn.Module, images: Tensor, labels: Tensor) -> Check:
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        loss = F.cross_entropy(pipeline(leaf).float(), labels, reduction="sum")
        gradient = torch.autograd.grad(loss, leaf)[0].flatten(1)
    bad = ~gradient.isfinite().all(1)
    none = (gradient == 0).all(1) & ~bad
    share = 100 * float((bad | none).float().mean())
    return Check(
        "every image has a gradient", share == 0, f"{share:.1f} % of the images have none, or one that is not finite"
    )


def _modes(pipeline: nn.Module) -> Check:
    acting = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    awake = [name for name, module in pipeline.named_modules() if module.training and isinstance(module, acting)]
    return Check("dropout and BatchNorm are in eval mode", not awake, ", ".join(awake[:4]) or "all of them")
