"""The paper's losses: equations 2, 4 and 5."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from defense_vae_fast.nn.kernels.reference import divergence
from defense_vae_fast.nn.model import VAEOutput


def reconstruction_loss(logits: Tensor, clean: Tensor) -> Tensor:
    """-E[log p(x | z)] of equation 4: binary cross-entropy summed over pixels, averaged over the batch.

    Args:
        logits: (N, C, H, W) pixel logits.
        clean: (N, C, H, W) clean images in [0, 1].
    """
    _same_shape("logits", logits, "clean", clean)
    total = F.binary_cross_entropy_with_logits(logits.float(), clean.float(), reduction="sum")
    return total / clean.shape[0]


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """D_KL(q(z | x) || N(0, I)) of equation 2: summed over the latent, averaged over the batch."""
    _same_shape("mu", mu, "logvar", logvar)
    return divergence(mu, logvar).mean()


def defense_vae_loss(output: VAEOutput, clean: Tensor, kl_weight: float = 1.0) -> Tensor:
    """Equation 4; ``kl_weight`` 1 is the paper's text, 0 its released code.

    Args:
        output: the network's output on the attacked images.
        clean: (N, C, H, W) the clean images behind them, in [0, 1].
        kl_weight: weight of the KL term, at least 0.
    """
    if kl_weight < 0:
        raise ValueError(f"kl_weight: expected at least 0, got {kl_weight}")
    loss = reconstruction_loss(output.logits, clean)
    # A weight of 0 must not turn an infinite divergence into NaN.
    if not kl_weight:
        return loss
    kl = kl_divergence(output.mu, output.logvar) if output.kl is None else output.kl.mean()
    return loss + kl_weight * kl


def end_to_end_loss(
    output: VAEOutput,
    clean: Tensor,
    class_logits: Tensor,
    labels: Tensor,
    classifier_weight: float,
    kl_weight: float = 1.0,
) -> Tensor:
    """Equation 5: equation 4 plus ``classifier_weight`` (lambda) times the classifier's cross-entropy.

    Args:
        output: the network's output on the attacked images.
        clean: (N, C, H, W) clean images in [0, 1].
        class_logits: (N, classes) the classifier's logits on the purified images.
        labels: (N,) int64 class indices.
        classifier_weight: lambda, at least 0.
        kl_weight: weight of the KL term, at least 0.
    """
    if classifier_weight < 0:
        raise ValueError(f"classifier_weight: expected at least 0, got {classifier_weight}")
    cross_entropy = F.cross_entropy(class_logits.float(), labels)
    return defense_vae_loss(output, clean, kl_weight) + classifier_weight * cross_entropy


def agreement_loss(purified_logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(classifier(clean) || classifier(purified)), averaged over the batch: not in the paper.

    It asks that a frozen classifier says of the purified image what it said of the clean one.

    Args:
        purified_logits: (N, classes) logits on purified images; gradients flow here.
        clean_logits: (N, classes) logits on the clean images, taken as constant.
    """
    _same_shape("purified_logits", purified_logits, "clean_logits", clean_logits)
    target = torch.log_softmax(clean_logits.detach().float(), dim=1)
    return F.kl_div(torch.log_softmax(purified_logits.float(), dim=1), target, reduction="batchmean", log_target=True)


def _same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name}: expected one shape, got {tuple(value.shape)} and {tuple(other.shape)}"
        )
