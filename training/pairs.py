"""Training pairs: attacked images and the clean images behind them.

Two sources with one face. :class:`TablePairs` is the paper's: every attack on every image made beforehand.
:class:`FlyPairs` attacks each batch afresh, so that no perturbation is seen twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.attacks import FGSM, PAPER_TRAINING_ATTACKS, PGD, Attack, CarliniWagnerL2, DeepFool, RandFGSM, predict
from training.data import Split, to_float, to_uint8
from training.distributed import ALONE, Ranks
from training.precision import autocast
from training.progress import bar
from training.recipe import Recipe

# Images attacked at once when pairs are made beforehand: on a GPU many, or launches would take longer than the work.
ATTACK_BATCH, CUDA_ATTACK_BATCH = 250, 2000
# Of the attacks made on the fly.
ALPHA = 0.05
PGD_STEPS, PGD_STEP = 3, 0.5
CW_RATES, CW_ITERATIONS = (6.0, 12.0), 4
PREDICTED_SHARE = 0.25
# Of noisy pairs: epsilon as in the paper's training attacks, and over how many pixels the noise is averaged.
NOISE_EPSILON, NOISE_WIDTHS = (0.25, 0.4), (1, 3, 5)


class Pairs(NamedTuple):
    """One batch, or a rank's share of it."""

    inputs: Tensor
    """(N, C, H, W) float images in [0, 1], attacked or clean, rounded to 8 bits."""
    clean_index: Tensor
    """(N,) int64 position of the clean image behind each in the training split."""


class PairSource(Protocol):
    """Gives a step's batch: a function of the step and torch's random state alone, so that training resumes exactly."""

    steps_per_epoch: int
    attacks: tuple[str, ...]
    """What the pairs are made with, for the checkpoint's header."""

    def batch(self, step: int) -> Pairs:
        """Batch number ``step``, counted from 0."""


class Order:
    """A fresh seeded permutation of ``count`` items for every epoch, read off by position, on ``device``."""

    def __init__(self, count: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.count = count
        self._device = device
        self._seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def take(self, start: int, size: int) -> Tensor:
        """Items ``start`` to ``start + size`` of the endless sequence of permutations."""
        parts = []
        while size:
            epoch, offset = divmod(start, self.count)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                # Made on the CPU, the same for every device; moved whole, so that no step waits for its part.
                self._permutation = torch.randperm(self.count, generator=generator).to(self._device)
                self._epoch = epoch
            part = self._permutation[offset : offset + size]
            parts.append(part)
            start += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TablePairs:
    """The paper's pairs (section 4.1): twelve attacked copies of each image and, beyond it, the clean image itself.

    ``noise``, beyond the paper, takes so many of the pairs of FGSM and RAND-FGSM for images moved along random signs
    instead of the gradient's: those of Gaussian noise averaged over 1, 3 or 5 pixels each way, image by image, with an
    epsilon from 0.25 to 0.4. A purifier of the paper's pairs alone knows the patterns of its own classifier, and does
    worse on those of a substitute.

    Args:
        split: the training images, on the device of training.
        classifiers: the attacked classifiers by name; each adds thirteen rows an image.
        batch_size: pairs a step.
        seed: seeds the attacks' noise and the order.
        images: attack so many images only, other ones with each attack, so that together they cover the split; None
            for all.
        cw_images: the same for CW and DeepFool, which cost the most.
        attacks: other attacks than the paper's twelve.
        noise: share of the single-step pairs that get random signs, image by image at random.
        make: makes an attack's images, as :func:`attack_all` does; one that keeps them saves the next table the work.
        ranks: with whom every batch is shared; by default the images to attack are, too.

    Raises:
        ValueError: the ranks cannot share a batch evenly; or there is to be noise and no attack is a single step.
    """

    def __init__(
        self,
        split: Split,
        classifiers: Mapping[str, nn.Module],
        *,
        batch_size: int,
        seed: int,
        images: int | None = None,
        cw_images: int | None = None,
        attacks: Sequence[Attack] = PAPER_TRAINING_ATTACKS,
        noise: float = 0.0,
        make: Callable[..., Tensor] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        ranks.check_batch(attacked=batch_size)
        if noise and not any(isinstance(attack, FGSM | RandFGSM) for attack in attacks):
            raise ValueError(
                f"noise: expected FGSM or RAND-FGSM among the attacks, got {', '.join(map(repr, attacks))}"
            )
        make = make or functools.partial(attack_all, ranks=ranks)
        self._batch_size, self._share = batch_size, ranks.share
        self._clean, self._noise, self._device = split.images, noise, split.images.device
        rows: list[Tensor] = []
        index: list[Tensor] = []
        single: list[Tensor] = []
        for name, classifier in classifiers.items():
            for place, attack in enumerate(attacks):
                slow = isinstance(attack, CarliniWagnerL2 | DeepFool) and cw_images is not None
                chosen = _stretch(len(split), cw_images if slow else images, place / (len(attacks) + 1)).to(
                    self._device
                )
                part = Split(split.images[chosen], split.labels[chosen])
                single.append(torch.full(chosen.shape, isinstance(attack, FGSM | RandFGSM), device=self._device))
                rows.append(make(attack, classifier, part, seed=seed, title=f"{type(attack).__name__} on {name}"))
                index.append(chosen)
            chosen = _stretch(len(split), images, len(attacks) / (len(attacks) + 1)).to(self._device)
            single.append(torch.zeros_like(chosen, dtype=torch.bool))
            rows.append(split.images[chosen])
            index.append(chosen)
        self._rows, self._index, self._single = torch.cat(rows), torch.cat(index), torch.cat(single)
        self._order = Order(len(self._rows), seed, split.images.device)
        self.steps_per_epoch = max(1, len(self._rows) // batch_size)
        self.attacks = tuple(map(repr, attacks))

    def batch(self, step: int) -> Pairs:
        """Batch number ``step`` of a seeded shuffle of the table."""
        chosen = self._order.take(step * self._batch_size, self._batch_size)[self._share]
        inputs, index = to_float(self._rows[chosen]), self._index[chosen]
        return Pairs(self._noisy(inputs, index, self._single[chosen]) if self._noise else inputs, index)

    def _noisy(self, inputs: Tensor, index: Tensor, single: Tensor) -> Tensor:
        """Move some of the images behind ``inputs``, where these are of a ``single`` step, along random signs."""
        share, count, device = self._share, self._batch_size, self._device
        # Drawn for the whole batch, whoever works on which part of it.
        low, high = NOISE_EPSILON
        replaced = (torch.rand(count, device=device) < self._noise)[share] & single
        epsilon = (low + (high - low) * torch.rand(count, device=device))[share]
        width = torch.randint(len(NOISE_WIDTHS), (count,), device=device)[share]
        noise = torch.randn(count, *inputs.shape[1:], device=device)[share]
        smooth = torch.stack([F.avg_pool2d(noise, pixels, 1, pixels // 2) for pixels in NOISE_WIDTHS])
        signs = smooth[width, torch.arange(len(noise), device=device)].sign()
        moved = (to_float(self._clean[index]) + epsilon.view(-1, 1, 1, 1) * signs).clamp(0, 1)
        return torch.where(replaced.view(-1, 1, 1, 1), to_float(to_uint8(moved)), inputs)


class FlyPairs:
    """Attacks made on the fly against one classifier a step, in rotation.

    Half of a batch's attacked images gets a single step, FGSM or RAND-FGSM; the other half PGD in one round of the
    rotation and CW in the next. Epsilon is uniform in ``epsilon`` image by image, CW's learning rate uniform in the
    paper's 6 to 12; a quarter of the attacks runs away from the classifier's own prediction, the others from the true
    label. CW gets four iterations: at these rates the first step saturates every pixel, and the result hardly changes
    after the third.

    Args:
        split: the training images, on the device of training.
        classifiers: attacked in this order, step by step.
        attacked: attacked images a batch, at least 2.
        clean: clean images a batch, beside them.
        seed: seeds the order.
        epsilon: lowest and highest epsilon.
        ranks: with whom every batch is shared.

    Raises:
        ValueError: the ranks cannot share a batch evenly.
    """

    def __init__(
        self,
        split: Split,
        classifiers: Sequence[nn.Module],
        *,
        attacked: int,
        clean: int,
        seed: int,
        epsilon: tuple[float, float] = (0.02, 0.4),
        ranks: Ranks = ALONE,
    ) -> None:
        ranks.check_batch(attacked=attacked, clean=clean)
        low, high = epsilon
        self.attacks: tuple[str, ...] = (
            f"FGSM(epsilon={low} to {high})",
            f"RandFGSM(epsilon={low + ALPHA} to {high + ALPHA}, alpha={ALPHA})",
            f"PGD(epsilon={low} to {high}, steps={PGD_STEPS}, relative_step={PGD_STEP})",
            f"CarliniWagnerL2(learning_rate={CW_RATES[0]} to {CW_RATES[1]}, iterations={CW_ITERATIONS})",
            f"{PREDICTED_SHARE:.0%} away from the prediction, the others from the true label; rounded to 8 bits",
        )
        self._split = split
        self._classifiers = tuple(classifiers)
        self._attacked, self._size = attacked, attacked + clean
        self._epsilon = epsilon
        self._ranks = ranks
        self._order = Order(len(split), seed, split.images.device)
        self.steps_per_epoch = max(1, len(split) // (attacked + clean))

    def batch(self, step: int) -> Pairs:
        """Batch number ``step``: single-step attacks, iterated attacks, clean images."""
        share, count, half = self._ranks.share, self._attacked, self._attacked // 2
        index = self._order.take(step * self._size, self._size)[share]
        images = to_float(self._split.images[index])
        round_, turn = divmod(step, len(self._classifiers))
        classifier = self._classifiers[turn]
        # Drawn for the whole batch, whoever works on which part of it.
        low, high = self._epsilon
        device, shape = images.device, images.shape[1:]
        epsilon = (low + (high - low) * torch.rand(count, device=device))[share]
        guessed = (torch.rand(count, device=device) < PREDICTED_SHARE)[share]
        signs = torch.randn(half, *shape, device=device).sign()
        # Every other image takes its random step; the others get plain FGSM.
        signs[::2] = 0
        signs = signs[share]
        clean, labels = images[: len(epsilon)], self._split.labels[index[: len(epsilon)]]
        iterated: Callable[..., Tensor]
        single = len(signs)
        if round_ % 2 == 0:
            # Of the whole batch's second half the first row that is ours.
            first = (self._ranks.rank - half) % self._ranks.size
            noise = torch.rand(count - half, *shape, device=device)[first :: self._ranks.size]
            pgd = PGD(epsilon[single:], steps=PGD_STEPS, relative_step=PGD_STEP)
            iterated = functools.partial(pgd, noise=noise)
        else:
            slowest, fastest = CW_RATES
            rate = slowest + (fastest - slowest) * float(torch.rand(()))
            iterated = CarliniWagnerL2(rate, iterations=CW_ITERATIONS, abort_early=False)
        attacked = []
        with autocast(device):
            labels = torch.where(guessed, predict(classifier, clean), labels)
            if single:
                start = (clean[:single] + ALPHA * signs).clamp(0, 1)
                attacked.append(FGSM(epsilon[:single])(classifier, start, labels[:single]))
            if single < len(clean):
                attacked.append(iterated(classifier, clean[single:], labels[single:]))
        return Pairs(torch.cat([to_float(to_uint8(torch.cat(attacked))), images[len(clean) :]]), index)


def _stretch(total: int, count: int | None, start: float) -> Tensor:
    """``count`` successive positions out of ``total``, from the share ``start`` on and round the end; None for all."""
    if count is None or count >= total:
        return torch.arange(total)
    return (int(start * total) + torch.arange(count)) % total


def pair_source(
    train: Split,
    classifiers: Mapping[str, nn.Module],
    recipe: Recipe,
    *,
    attacks: Sequence[Attack] = PAPER_TRAINING_ATTACKS,
    make: Callable[..., Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> PairSource:
    """The pairs that a recipe asks for; ``attacks``, ``make`` and ``ranks`` are those of :class:`TablePairs`."""
    if recipe.pairs == "fly":
        rotation = [classifiers[name] for name in recipe.classifiers]
        return FlyPairs(train, rotation, attacked=recipe.attacked, clean=recipe.clean, seed=recipe.seed, ranks=ranks)
    return TablePairs(
        train, classifiers, batch_size=recipe.attacked, seed=recipe.seed, images=recipe.images or None,
        cw_images=recipe.cw_images or None, attacks=attacks, noise=recipe.noise, make=make, ranks=ranks,
    )  # fmt: skip


def attack_all(
    attack: Attack,
    classifier: nn.Module,
    split: Split,
    *,
    seed: int = 0,
    predicted_labels: bool = False,
    title: str | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Attack every image of a split and round the result to 8 bits.

    Ranks take the attacked batches by turns and give each other the results, which are those of one process.

    Args:
        attack: the attack.
        classifier: in eval mode, gradients of its weights off.
        split: the images and their true labels.
        seed: seeds the attack's noise.
        predicted_labels: run away from the classifier's own prediction instead of the true label.
        title: shows a progress bar of this name.
        ranks: who shares the work; all must call.

    Returns:
        uint8 (N, C, H, W).
    """
    generator = torch.Generator(split.images.device).manual_seed(seed)
    size = CUDA_ATTACK_BATCH if split.images.is_cuda else ATTACK_BATCH
    results = torch.zeros_like(split.images)
    parts = zip(*(torch.split(tensor, size) for tensor in (split.images, split.labels, results)), strict=True)
    with bar(title or "attack", len(split), quiet=title is None or not ranks.first) as progress:
        for number, (images, labels, result) in enumerate(parts):
            pixels = to_float(images)
            if number % ranks.size == ranks.rank:
                away_from = predict(classifier, pixels) if predicted_labels else labels
                result.copy_(to_uint8(attack(classifier, pixels, away_from, generator)))
            elif draw := getattr(attack, "noise", None):
                draw(pixels, generator)
            progress.update(len(images), images=len(images))
    return ranks.join(results)
