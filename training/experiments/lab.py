"""What the tables' cells need, made once and kept: classifiers, defences, attacked images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from defense_vae_fast.checkpoint import list_pretrained, load_checkpoint
from defense_vae_fast.nn.model import DefenseVAE
from training import pool
from training.attacked import attacked_images
from training.attacks import (
    FGSM,
    PAPER_TEST_ATTACKS,
    PAPER_TRAINING_ATTACKS,
    Attack,
    CarliniWagnerL2,
    DeepFool,
    RandFGSM,
    predict,
)
from training.baselines.adversarial_training import train_adversarially
from training.baselines.defense_gan import Generator
from training.baselines.magnet import MAGNET_FILE, load_magnet, magnet, train_magnet
from training.baselines.wgan import GENERATOR_FILE, defense_gan, load_generator, train_generator
from training.black_box import SubstituteSettings, split_off, train_substitute
from training.data import Dataset, Split, load_dataset
from training.defences import Defence, bare, defense_vae
from training.device import place
from training.experiments.cells import FROM_SCRATCH
from training.experiments.once import train_once
from training.experiments.scale import Scale
from training.finetune import finetune
from training.fit import CHECKPOINT_FILE, fit
from training.pairs import PairSource, TablePairs
from training.retrain import CLASSIFIER_FILE, retrain
from training.train_classifier import load_classifier, load_weights, save_classifier, weights_digest

_KINDS: dict[str, type] = {"fgsm": FGSM, "rand_fgsm": RandFGSM, "cw": CarliniWagnerL2}
# DeepFool stops at the border; CW at the paper's rates goes far beyond it, in a space of its own. The paper names no
# setting: these are ours, and docs/EXPERIMENTS.md has the figures that they were chosen by.
DEEPFOOLS = tuple(DeepFool(overshoot=overshoot, in_tanh=True) for overshoot in (5.0, 50.0, 500.0, 5000.0))


def training_attacks(training: str) -> tuple[Attack, ...]:
    """The attacks of a training: ``three``, ``without_NAME`` or ``without_NAME_plus_deepfool``."""
    if training == "three":
        return PAPER_TRAINING_ATTACKS
    left_out = training.removeprefix("without_").removesuffix("_plus_deepfool")
    kept = tuple(attack for attack in PAPER_TRAINING_ATTACKS if not isinstance(attack, _KINDS[left_out]))
    return kept + (DEEPFOOLS if training.endswith("_plus_deepfool") else ())


class NotAvailable(RuntimeError):
    """A cell cannot be run here: the data are missing, or there is no such thing for this data set."""


class Made(NamedTuple):
    """A defence and what its records say of it."""

    defence: Defence
    training_seconds: float
    digests: dict[str, str]
    settings: dict[str, Any]


@dataclass
class Lab:
    """Makes what cells need, for one scale and seed.

    Args:
        scale: how much work.
        seed: of every training.
        runs: folder of everything that is kept between calls.
        data: where data sets are looked for.
        device: where to work.
    """

    scale: Scale
    seed: int
    runs: Path
    data: Path | None
    device: torch.device
    _kept: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def dataset(self, name: str) -> Dataset:
        """A data set.

        Raises:
            NotAvailable: its files are not here.
        """

        def load() -> Dataset:
            try:
                return load_dataset(name, self.data)
            except FileNotFoundError as error:
                raise NotAvailable(str(error)) from error

        return self._once("data", name, make=load)  # type: ignore[no-any-return]

    def classifier(self, dataset: str, name: str) -> nn.Module:
        """The attacked classifier: the repository's, or one trained here; the same for all seeds."""
        folder = self.runs / self.scale.name
        make = partial(pool.for_run, name, self.dataset(dataset), folder, self.scale.classifier_epochs, self.device)
        return self._once("classifier", dataset, name, make=make)  # type: ignore[no-any-return]

    def defence(self, dataset: str, name: str, column: str, training: str = "three") -> Made:
        """A column's defence of a classifier."""
        make = partial(self._make, dataset, name, column, training)
        return self._once("defence", dataset, name, column, training, make=make)  # type: ignore[no-any-return]

    def purifier(self, dataset: str, name: str) -> DefenseVAE:
        """The column Defense-VAE's purifier."""
        return self._purifier(dataset, name, "three")[0]

    def generator(self, dataset: str) -> Generator:
        """The column Defense-GAN's generator."""
        return self._generator(dataset)[0]

    def _make(self, dataset: str, name: str, column: str, training: str) -> Made:
        attacked = self.classifier(dataset, name)
        digests = {"attacked": weights_digest(attacked)}
        if column in ("no_attack", "no_defense"):
            return Made(bare(attacked), 0.0, digests, {})
        if column == "pooled":
            if dataset not in list_pretrained():
                raise NotAvailable(f"no pooled purifier of {dataset} comes with the library")
            bundle = load_checkpoint(dataset)
            vae = place(DefenseVAE.from_checkpoint(bundle), self.device)
            return Made(defense_vae(attacked, vae), 0.0, {**digests, "checkpoint": bundle.digest}, {})
        if column == "defense_vae":
            vae, seconds, digest = self._purifier(dataset, name, training)
            settings = self.scale.recipe(dataset, name, self.seed).to_dict()
            return Made(defense_vae(attacked, vae), seconds, {**digests, "checkpoint": digest}, settings)
        if column in ("defense_vae_rec", "defense_vae_e2e", FROM_SCRATCH):
            return self._trained_classifier(dataset, name, column, training, attacked, digests)
        if column == "magnet":
            return self._magnet(dataset, attacked, digests)
        if column == "defense_gan":
            return self._defense_gan(dataset, attacked, digests)
        if column == "adv_training":
            return self._adversarial(dataset, name)
        raise ValueError(f"column: got {column}, which no table has")

    def _purifier(self, dataset: str, name: str, training: str) -> tuple[DefenseVAE, float, str]:
        """The paper's purifier for one classifier: equation 4 on pairs made beforehand."""
        loaded, attacked = self.dataset(dataset), self.classifier(dataset, name)
        recipe = self.scale.recipe(dataset, name, self.seed)
        folder = self.folder(dataset, f"{name}-{training}", "defense_vae")
        settings = {
            **recipe.to_dict(), "training": [repr(attack) for attack in training_attacks(training)],
            "attacked_classifier": weights_digest(attacked), "data": loaded.digest,
        }  # fmt: skip

        def train(resume: bool) -> bool:
            pairs = self._pairs(dataset, name, training, recipe.attacked)
            return fit(
                loaded, {name: attacked}, recipe, folder, device=self.device, pairs=pairs, resume=resume
            ).finished  # fmt: skip

        seconds = train_once(folder, settings, train)
        bundle = load_checkpoint(folder / CHECKPOINT_FILE)
        return place(DefenseVAE.from_checkpoint(bundle), self.device), seconds, bundle.digest

    def _trained_classifier(
        self, dataset: str, name: str, column: str, training: str, attacked: nn.Module, digests: dict[str, str]
    ) -> Made:
        """REC, or E2E after it."""
        loaded = self._training_data(dataset, name)
        vae, seconds, purifier_digest = self._purifier(dataset, name, training)
        vae.requires_grad_(False)
        pairs = partial(self._pairs, dataset, name, training, self.scale.trained_batch)
        folder = self.folder(dataset, f"{name}-{training}", column)
        if column == "defense_vae_rec":
            rec = replace(self.scale.rec, seed=self.seed)
            settings = {**asdict(rec), "batch_size": self.scale.trained_batch}
            seconds += train_once(
                folder, {**settings, "purifier": purifier_digest},
                lambda resume: retrain(
                    loaded, name, attacked, vae, pairs, rec, folder, device=self.device, resume=resume
                )[1],
            )  # fmt: skip
            student = load_weights(folder / CLASSIFIER_FILE, attacked, self.device)
            digests = {**digests, "checkpoint": purifier_digest, "classifier": weights_digest(student)}
            return Made(defense_vae(attacked, vae, student, column), seconds, digests, settings)
        from_scratch = column == FROM_SCRATCH
        e2e = replace(self.scale.finetuning(dataset, self.seed), from_scratch=from_scratch)
        start = attacked
        if from_scratch:
            # At least as many passes as the purifier and both trainings after it have in all.
            epochs = self.scale.purifier.epochs + self.scale.rec.epochs + self.scale.e2e.epochs
            e2e, seconds = replace(e2e, steps=0, epochs=epochs, learning_rate=1e-3), 0.0
        else:
            rec_made = self.defence(dataset, name, "defense_vae_rec", training)
            start = load_weights(
                self.folder(dataset, f"{name}-{training}", "defense_vae_rec") / CLASSIFIER_FILE, attacked, self.device
            )
            seconds = rec_made.training_seconds
        settings = {**asdict(e2e), "batch_size": self.scale.trained_batch}
        seconds += train_once(
            folder, {**settings, "purifier": purifier_digest, "classifier": weights_digest(start)},
            lambda resume: finetune(
                loaded, name, attacked, vae, start, pairs, e2e, folder, device=self.device, resume=resume,
                report_every=100,
            ).finished,
        )  # fmt: skip
        bundle = load_checkpoint(folder / CHECKPOINT_FILE)
        trained = place(DefenseVAE.from_checkpoint(bundle), self.device)
        student = load_weights(folder / CLASSIFIER_FILE, attacked, self.device)
        digests = {**digests, "checkpoint": bundle.digest, "classifier": weights_digest(student)}
        return Made(defense_vae(attacked, trained, student, column), seconds, digests, settings)

    def _magnet(self, dataset: str, attacked: nn.Module, digests: dict[str, str]) -> Made:
        loaded, folder = self.dataset(dataset), self.folder(dataset, "magnet")
        settings = replace(self.scale.magnet, seed=self.seed)
        seconds = train_once(
            folder, {**asdict(settings), "data": loaded.digest},
            lambda resume: train_magnet(loaded, settings, folder, device=self.device, resume=resume).finished,
        )  # fmt: skip
        networks = load_magnet(folder / MAGNET_FILE, self.device)
        digests = {**digests, "pooled": weights_digest(networks.pooled), "plain": weights_digest(networks.plain)}
        defence = magnet(attacked, networks, loaded.validation.to(self.device))
        return Made(defence, seconds, digests, asdict(settings))

    def _defense_gan(self, dataset: str, attacked: nn.Module, digests: dict[str, str]) -> Made:
        generator, seconds = self._generator(dataset)
        steps, restarts = self.scale.search
        defence = defense_gan(attacked, generator, steps=steps, restarts=restarts, seed=self.seed)
        digests = {**digests, "generator": weights_digest(generator)}
        settings = {**asdict(replace(self.scale.gan, seed=self.seed)), "L": steps, "R": restarts}
        return Made(defence, seconds, digests, settings)

    def _generator(self, dataset: str) -> tuple[Generator, float]:
        loaded, folder = self.dataset(dataset), self.folder(dataset, "defense_gan")
        settings = replace(self.scale.gan, seed=self.seed)
        seconds = train_once(
            folder, {**asdict(settings), "data": loaded.digest},
            lambda resume: train_generator(loaded, settings, folder, device=self.device, resume=resume)[1],
        )  # fmt: skip
        return load_generator(folder / GENERATOR_FILE, self.device), seconds

    def _adversarial(self, dataset: str, name: str) -> Made:
        loaded, folder = self.dataset(dataset), self.folder(dataset, name, "adv_training")
        settings = replace(self.scale.adversarial, seed=self.seed)
        seconds = train_once(
            folder, {**asdict(settings), "data": loaded.digest},
            lambda resume: train_adversarially(
                loaded, name, settings, folder, device=self.device, resume=resume
            )[1],
        )  # fmt: skip
        robust = load_weights(folder / CLASSIFIER_FILE, self.classifier(dataset, name), self.device)
        return Made(bare(robust, "adv_training"), seconds, {"attacked": weights_digest(robust)}, asdict(settings))

    def images(
        self,
        dataset: str,
        defence: Defence,
        attack: str,
        substitute: str,
        count: int,
        *,
        predicted: bool = False,
        as_printed: bool = False,
    ) -> Split:
        """The first ``count`` test images with their true labels, attacked on the defence's ``attacked`` classifier.

        The attack runs away from the true labels, as the paper's, or from what the classifier predicts; through a
        substitute always from what that predicts. ``as_printed`` takes a substitute whose steps turn and whose
        dropout is as Table 5 prints it, instead of Defense-GAN's.
        """
        test = self.dataset(dataset).test.to(self.device)
        if substitute:
            settings = replace(self.scale.substitute, seed=self.seed)
            if as_printed:
                settings = replace(settings, period=SubstituteSettings.period, kept=SubstituteSettings.kept)
            own, rest = split_off(test, settings)
            split = rest.first(count)
            trained = self._substitute(substitute, defence.attacked, self.dataset(dataset), own, settings)
            return self._attack(PAPER_TEST_ATTACKS[attack], trained, split, f"{attack} through {substitute}", True)
        split = test.first(count)
        if attack == "clean":
            return split
        return self._attack(PAPER_TEST_ATTACKS[attack], defence.attacked, split, attack, predicted)

    def _substitute(
        self, name: str, attacked: nn.Module, data: Dataset, own: Split, settings: SubstituteSettings
    ) -> nn.Module:
        """A substitute of a classifier, kept under a digest of all that decides it."""
        decisive = {
            **asdict(settings), "name": name, "data": data.digest, "layers": repr(attacked),
            "attacked": weights_digest(attacked),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        path = self.runs / "substitutes" / f"{digest}.safetensors"
        if not path.exists():
            trained = train_substitute(name, partial(predict, attacked), own.images, data.classes, settings)
            _, channels, size, _ = own.images.shape
            header = {**decisive, "channels": channels, "image_size": size, "classes": data.classes}
            save_classifier(path, name, trained, header, half=False)
        return load_classifier(path, self.device)[0]

    def _attack(self, attack: Attack, network: nn.Module, split: Split, title: str, predicted: bool) -> Split:
        made = attacked_images(
            attack, network, split, title=title, predicted_labels=predicted, folder=self.runs / "attacked"
        )  # fmt: skip
        return Split(made, split.labels)

    def _training_data(self, dataset: str, name: str) -> Dataset:
        """The data set, with mirror images among the training images where a classifier's recipe has them."""
        data = self.dataset(dataset)
        mirrored = self.scale.recipe(dataset, name, self.seed).mirrored
        return replace(data, train=data.train.mirrored()) if mirrored else data

    def _pairs(self, dataset: str, name: str, training: str, batch_size: int) -> PairSource:
        recipe = self.scale.recipe(dataset, name, self.seed)
        # The same attacked images for every seed: they cost the most.
        make = partial(_make_kept, folder=self.runs / "attacked")
        return TablePairs(
            self._training_data(dataset, name).train.to(self.device), {name: self.classifier(dataset, name)},
            batch_size=batch_size, seed=self.seed, images=recipe.images or None,
            cw_images=recipe.cw_images or None, attacks=training_attacks(training), noise=recipe.noise, make=make,
        )  # fmt: skip

    def folder(self, *parts: str) -> Path:
        """Where a run of this scale and seed lies."""
        return self.runs.joinpath(self.scale.name, f"seed{self.seed}", *parts)

    def _once(self, *key: object, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _make_kept(attack: Attack, classifier: nn.Module, split: Split, *, folder: Path, seed: int, title: str) -> Tensor:
    del seed
    return attacked_images(attack, classifier, split, title=title, folder=folder)
