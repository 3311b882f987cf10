"""Measure everything that a robustness card says, as one plain dictionary."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import describe
from defense_vae_fast import __version__
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.engines import EngineUnavailable
from defense_vae_fast.nn.defended import PurifiedClassifier
from defense_vae_fast.nn.model import DefenseVAE
from defense_vae_fast.purifier import Purifier
from training.attacked import attacked_images
from training.attacks import FGSM, PAPER_TEST_ATTACKS, Attack, predict
from training.black_box import SubstituteSettings, split_off, train_substitute
from training.card.adaptive import Effort, SampledPipeline, sweep
from training.card.checks import checks
from training.card.corruptions import corruptions
from training.card.detector import FALSE_ALARMS, fool_both, roc, scores, threshold
from training.card.kept import Section, kept_section
from training.data import Dataset, Split, to_float, to_uint8
from training.defences import bare, defense_vae, measure
from training.device import place
from training.evaluate import TRANSFER_ATTACKS
from training.train_classifier import weights_digest

PICTURES = 8
ROC_POINTS = 60


@dataclass(frozen=True)
class CardSettings:
    """How much is measured.

    Args:
        images: test images for adaptive attacks, the checks and the detector's attack.
        oblivious_images: test images for everything else.
        effort: of the adaptive attacks.
        draws: latents an image for expectation over transformation; 0 measures the mean latent, as it is used.
        substitute: of the black-box attack; its images come off the test set first.
        substitute_name: its architecture.
    """

    images: int = 200
    oblivious_images: int = 1000
    effort: Effort = field(default_factory=Effort)
    draws: int = 0
    substitute: SubstituteSettings = field(default_factory=SubstituteSettings)
    substitute_name: str = "E"

    def __post_init__(self) -> None:
        if min(self.images, self.oblivious_images) < 1 or self.draws < 0:
            raise ValueError(
                "card: expected images and oblivious_images of at least 1 and draws of at least 0, "
                f"got {self.images}, {self.oblivious_images} and {self.draws}"
            )


def make_card(
    bundle: Checkpoint,
    data: Dataset,
    classifiers: Mapping[str, nn.Module],
    settings: CardSettings,
    *,
    adversarial: Mapping[str, nn.Module] | None = None,
    device: torch.device | str = "cpu",
    keep: Path | None = None,
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Measure a purifier.

    Args:
        bundle: the purifier.
        data: the data set; the test split is measured on, the validation split sets the detector's threshold.
        classifiers: by name, in eval mode, gradients of their weights off.
        settings: how much.
        adversarial: for some of the names, an adversarially trained classifier to compare with.
        device: where to work.
        keep: folder in which oblivious attacks' images and finished classifiers' parts are kept; None keeps nothing.

    Returns:
        The card as values that JSON can hold, and rows of uint8 pictures by classifier.
    """
    device = torch.device(device)
    vae = place(DefenseVAE.from_checkpoint(bundle), device).requires_grad_(False)
    # A small test set keeps most of its images to measure on.
    few_own = min(settings.substitute.images, max(1, len(data.test) // 4))
    settings = replace(settings, substitute=replace(settings.substitute, images=few_own))
    own, rest = split_off(data.test.to(device), settings.substitute)
    split, few = rest.first(settings.oblivious_images), rest.first(settings.images)
    validation = data.validation.first(settings.oblivious_images).to(device)
    card: dict[str, Any] = {
        "checkpoint": bundle.digest, "dataset": data.name, "class_names": list(data.class_names),
        "settings": asdict(settings), "images": {"adaptive": len(few), "oblivious": len(split)},
        "recipe": dict(bundle.recipe), "machine": describe(), "device": str(device), "classifiers": {},
    }  # fmt: skip
    pictures: dict[str, list[Tensor]] = {}
    for name, classifier in classifiers.items():
        one = _Classifier(name, classifier, vae, bundle, settings, keep)
        robust = (adversarial or {}).get(name)
        about = {
            "version": __version__, "name": name, "checkpoint": bundle.digest, "data": data.digest,
            "settings": asdict(settings), "attacks": repr(list(oblivious_attacks().values())),
            "classifier": weights_digest(classifier), "layers": repr(classifier),
            "adversarial": None if robust is None else weights_digest(robust), "device": device.type,
        }  # fmt: skip
        make = partial(one.timed_section, own, split, few, validation, data.classes, robust)
        card["classifiers"][name], pictures[name] = kept_section(keep, about, make)
    return card, pictures


def oblivious_attacks() -> dict[str, Attack]:
    """The attacks on the bare classifier, by the names they have in a card."""
    paper = {f"{name}_0.3" if name != "cw" else name: attack for name, attack in PAPER_TEST_ATTACKS.items()}
    return {**paper, **TRANSFER_ATTACKS}


@dataclass
class _Classifier:
    """One classifier's part of the card."""

    name: str
    classifier: nn.Module
    vae: DefenseVAE
    bundle: Checkpoint
    settings: CardSettings
    keep: Path | None

    def timed_section(self, *given: Any) -> Section:
        start = time.monotonic()
        section, pictures = self.section(*given)
        return {**section, "wall_seconds": round(time.monotonic() - start, 1)}, pictures

    def section(
        self, own: Split, split: Split, few: Split, validation: Split, classes: int, robust: nn.Module | None
    ) -> Section:
        pipeline = PurifiedClassifier(self.vae, self.classifier).eval()
        answering: nn.Module = pipeline
        gradients: nn.Module | None = None
        if self.settings.draws:
            answering, gradients = SampledPipeline(pipeline, 1), SampledPipeline(pipeline, self.settings.draws)
        pixels = to_float(few.images)
        torch.manual_seed(self.settings.effort.seed)
        found = sweep(
            answering, pixels, few.labels, self.settings.effort, attacked_pipeline=gradients,
            title=f"adaptive on {self.name}",
        )  # fmt: skip
        made = self._oblivious_images(split)
        section: dict[str, Any] = {
            "clean": self._both(split.images, split.labels),
            "oblivious": {
                name: {**self._both(images, split.labels), "held_out": self._held_out(attack)}
                for name, (attack, images) in made.items()
            },
            "black_box": self._black_box(own, split, classes),
            "adaptive": _plain(found.clean, found.worst, found.after),
            "bare": self._sweep_of(self.classifier, pixels, few.labels, "bare"),
            "corruptions": {
                name: self._both(change(split.images), split.labels)
                for name, change in corruptions(self.settings.effort.seed).items()
            },
            "detector": self._detector(pipeline, validation, split, {k: made[k][1] for k in made}, few),
            "engines": self._engines(few, {f"{e:g}": to_uint8(x.clone()) for e, x in found.attacked.items()}),
            "checks": self._checks(answering, pixels, few.labels),
        }  # fmt: skip
        if robust is not None:
            section["adversarially_trained"] = {
                "accuracy": measure(bare(robust), split.images, split.labels).accuracy,
                **self._sweep_of(robust, pixels, few.labels, "adversarially trained"),
            }
        return section, self._pictures(few, found.attacked)

    def _checks(self, pipeline: nn.Module, pixels: Tensor, labels: Tensor) -> list[dict[str, Any]]:
        steps, sampled = min(50, self.settings.effort.steps), self.settings.draws > 0
        return [check._asdict() for check in checks(pipeline, pixels, labels, steps=steps, sampled=sampled)]

    def _both(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        return {
            "bare": measure(bare(self.classifier), images, labels).accuracy,
            "purified": measure(defense_vae(self.classifier, self.vae), images, labels).accuracy,
        }

    def _oblivious_images(self, split: Split) -> dict[str, tuple[Attack, Tensor]]:
        made = {}
        for name, attack in oblivious_attacks().items():
            title = f"{name} on {self.name}"
            made[name] = (attack, attacked_images(attack, self.classifier, split, title=title, folder=self.keep))
        return made

    def _held_out(self, attack: Attack) -> bool | None:
        """Whether no attack of its kind took part in training; None where the header does not say."""
        trained = self.bundle.recipe.get("attacks")
        kind = type(attack).__name__
        return None if not isinstance(trained, list) else not any(kind in str(one) for one in trained)

    def _black_box(self, own: Split, split: Split, classes: int) -> dict[str, float]:
        name = self.settings.substitute_name
        oracle = partial(predict, self.classifier)
        substitute = train_substitute(name, oracle, own.images, classes, self.settings.substitute)
        images = attacked_images(
            FGSM(0.3), substitute, split, title=f"FGSM through {name}", predicted_labels=True, folder=self.keep
        )  # fmt: skip
        return self._both(images, split.labels)

    def _sweep_of(self, network: nn.Module, pixels: Tensor, labels: Tensor, what: str) -> dict[str, Any]:
        found = sweep(network, pixels, labels, self.settings.effort, title=f"{what} {self.name}")
        return _plain(found.clean, found.worst, found.after)

    def _detector(
        self, pipeline: PurifiedClassifier, validation: Split, split: Split, made: Mapping[str, Tensor], few: Split
    ) -> dict[str, Any]:
        clean = scores(pipeline, split.images)
        limit = threshold(scores(pipeline, validation.images))
        curves = {}
        for name, images in made.items():
            attacked = scores(pipeline, images)
            curve = roc(clean, attacked)
            every = max(1, len(curve.caught) // ROC_POINTS)
            curves[name] = {
                "area": curve.area, "caught": round(100 * float((attacked > limit).float().mean()), 2),
                "false_alarms_line": [*curve.false_alarms[::every], 1.0], "caught_line": [*curve.caught[::every], 1.0],
            }  # fmt: skip
        pixels = to_float(few.images)
        effort = self.settings.effort
        fooled = {
            f"{epsilon:g}": fool_both(
                pipeline, pixels, few.labels, limit, epsilon, steps=effort.steps, seed=effort.seed
            )._asdict()
            for epsilon in effort.epsilons
        }  # fmt: skip
        return {
            "threshold": limit, "false_alarms_wanted": 100 * FALSE_ALARMS,
            "false_alarms": round(100 * float((clean > limit).float().mean()), 2), "attacks": curves, "fooled": fooled,
        }  # fmt: skip

    def _engines(self, few: Split, attacked: Mapping[str, Tensor]) -> dict[str, Any]:
        """Accuracy behind every precision that an engine has here, on what was attacked on the float32 module."""
        found: dict[str, Any] = {
            "module, fp32": {
                name: measure(defense_vae(self.classifier, self.vae), images, few.labels).accuracy
                for name, images in attacked.items()
            }
        }
        for precision in ("fp32", "bf16", "fp16", "int8"):
            try:
                purifier = Purifier(self.bundle, precision=precision)
            except (EngineUnavailable, ValueError) as error:
                found[f"engine, {precision}"] = f"not run: {error}"
                continue
            with purifier:
                name = f"{purifier.info()['engine']}, {precision}"
                found[name] = {
                    key: self._accuracy(_through(purifier, images), few.labels) for key, images in attacked.items()
                }
        return found

    def _accuracy(self, purified: Tensor, labels: Tensor) -> float:
        return measure(bare(self.classifier), purified, labels).accuracy

    def _pictures(self, few: Split, attacked: Mapping[float, Tensor]) -> list[Tensor]:
        rows = [few.images[:PICTURES]]
        for images in attacked.values():
            shown = to_uint8(images[:PICTURES].clone())
            rows += [shown, to_uint8(self.vae.purify(to_float(shown)))]
        return rows


def _through(purifier: Purifier, images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) through an engine, and back on their device."""
    arrays = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return torch.from_numpy(purifier(arrays)).permute(0, 3, 1, 2).contiguous().to(images.device)


def _plain(clean: float, worst: Mapping[float, float], after: Mapping[float, Mapping[str, float]]) -> dict[str, Any]:
    return {
        "clean": clean, "worst": {f"{epsilon:g}": value for epsilon, value in worst.items()},
        "after": {f"{epsilon:g}": dict(value) for epsilon, value in after.items()},
    }  # fmt: skip
