"""Defense-VAE-E2E (equation 5): purifier and classifier trained together, fine-tuned or from scratch."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense_vae_fast import __version__
from defense_vae_fast.checkpoint import Checkpoint, save_checkpoint
from defense_vae_fast.nn.losses import end_to_end_loss
from defense_vae_fast.nn.model import DefenseVAE
from training.attacks import FGSM
from training.data import Dataset, to_float
from training.defences import defense_vae, measure
from training.device import place
from training.fit import CHECKPOINT_FILE, VALIDATION_SUBSET
from training.loop import Run
from training.pairs import PairSource, attack_all
from training.precision import autocast
from training.retrain import CLASSIFIER_FILE, classifier_identity
from training.train_classifier import save_classifier, weights_digest


@dataclass(frozen=True)
class FinetuneSettings:
    """How purifier and classifier are trained together.

    Args:
        steps: optimizer steps; 0 means ``epochs`` passes over the pairs.
        epochs: passes over the pairs where ``steps`` is 0.
        learning_rate: Adam's at the start; it falls linearly to 0.
        classifier_weight: lambda of equation 5. The paper does not give its own; the larger it is, the more the pair
            learns to read labels off a single step's pattern of signs. Pixels count by the hundred in the other term.
        kl_weight: weight of the KL term: 1 in the paper's text, 0 in its released code.
        from_scratch: random weights on both sides, instead of those given.
        seed: seeds weights, dropout and the latent's noise.
    """

    steps: int = 0
    epochs: int = 1
    learning_rate: float = 3e-4
    classifier_weight: float = 5.0
    kl_weight: float = 0.0
    from_scratch: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.epochs < 1:
            raise ValueError(f"finetune: expected steps >= 0 and epochs >= 1, got {self.steps} and {self.epochs}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"finetune learning_rate: expected above 0, got {self.learning_rate}")
        for name in ("classifier_weight", "kl_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"finetune {name}: expected at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class EndToEnd:
    """A purifier and the classifier that was trained with it, both in eval mode."""

    purifier: DefenseVAE
    classifier: nn.Module
    finished: bool


def finetune(
    data: Dataset,
    name: str,
    attacked: nn.Module,
    purifier: DefenseVAE,
    classifier: nn.Module,
    pairs: Callable[[], PairSource],
    settings: FinetuneSettings,
    out: Path,
    *,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    report_every: int = 0,
) -> EndToEnd:
    """Train both; ``out`` gets ``checkpoint.safetensors`` (the purifier), ``classifier.safetensors`` and ``log.jsonl``.

    The log holds the accuracy on 500 validation images, clean and under FGSM 0.3 on the attacked classifier, which is
    the curve of the paper's Figure 4.

    Args:
        data: the data set; its training split is used, the log its validation split.
        name: the classifier's name, for the header.
        attacked: the classifier that the attacker knows, for the log; it is left as it is.
        purifier: where its weights start, and its shape; it is left as it is.
        classifier: the same for the classifier: the attacked one, or one retrained on purified images.
        pairs: makes the source of attacked and clean images, once the folder is known to be good.
        settings: how to train.
        out: folder of the run.
        about: what else decides the result, such as the recipe of the pairs.
        device: where to train.
        resume: go on from ``out``'s state.
        report_every: steps between two lines of the log; 0 for the start and the end alone.

    Raises:
        FileExistsError, FileNotFoundError: the folder is a run's already, or there is none to resume.
        ValueError: it is another run's; or ``from_scratch`` and the classifier has layers that cannot be reset.
    """
    device = torch.device(device)
    description = {
        "kind": "finetune", "classifier": name, **asdict(settings), **(about or {}), "data_digest": data.digest,
        "classifier_digest": weights_digest(classifier), "purifier_digest": weights_digest(purifier),
    }  # fmt: skip
    run = Run(out, description, settings.seed, device, resume)
    run.open()
    torch.manual_seed(settings.seed)
    vae = DefenseVAE(purifier.config) if settings.from_scratch else copy.deepcopy(purifier)
    student = copy.deepcopy(classifier)
    if settings.from_scratch:
        reset(student)
    vae, student = place(vae, device).requires_grad_(True), place(student, device).requires_grad_(True)
    source = pairs()
    steps = settings.steps or settings.epochs * source.steps_per_epoch
    train = data.train.to(device)
    optimizer = torch.optim.Adam([*vae.parameters(), *student.parameters()], settings.learning_rate)
    validation = data.validation.first(VALIDATION_SUBSET).to(device)
    attacks = attack_all(FGSM(0.3), attacked, validation)

    def step(number: int) -> Tensor:
        batch = source.batch(number)
        clean = to_float(train.images[batch.clean_index])
        with autocast(device):
            output = vae(batch.inputs)
            logits = student(torch.sigmoid(output.logits.float()))
        labels = train.labels[batch.clean_index]
        loss = end_to_end_loss(output, clean, logits, labels, settings.classifier_weight, settings.kl_weight)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (steps - number) / steps
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def report(_: int) -> dict[str, float]:
        vae.eval()
        student.eval()
        defence = defense_vae(attacked, vae, student)
        figures = {
            "clean": measure(defence, validation.images, validation.labels).accuracy,
            "fgsm_0.3": measure(defence, attacks, validation.labels).accuracy,
        }
        vae.train()
        student.train()
        return figures

    def finish(made: int) -> None:
        recipe = {**description, "steps_made": made, "steps": steps, "class_names": list(data.class_names)}
        versions = {"defense_vae_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
        bundle = Checkpoint(vae.config, vae.checkpoint_tensors(), data.name, recipe, versions=versions)
        digest = save_checkpoint(out / CHECKPOINT_FILE, bundle)
        header = {**classifier_identity(data), **recipe, "purifier": digest}
        save_classifier(out / CLASSIFIER_FILE, name, student, header, half=False)

    if not resume:
        run.log({"step": 0, **report(0)})
    vae.train()
    student.train()
    made = run.train(
        f"purifier and {name} on {data.name}", step, steps, modules={"purifier": vae, "classifier": student},
        optimizers={"adam": optimizer}, images=len(source.batch(0).inputs), finish=finish, report=report,
        report_every=report_every,
    )  # fmt: skip
    for module in (vae, student):
        module.eval().requires_grad_(False)
    return EndToEnd(vae, student, made == steps)


@torch.no_grad()
def reset(module: nn.Module) -> None:
    """Draw all weights of a module anew, by the ``reset_parameters`` that torch's layers have.

    Raises:
        ValueError: a parameter belongs to no layer that has it.
    """
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    covered: set[int] = set()
    for layer in reversed(list(module.modules())):  # a container's own rule comes after its layers'
        redraw = getattr(layer, "reset_parameters", None)
        if callable(redraw):
            redraw()
            covered.update(map(id, layer.parameters(recurse=False)))
    missed = [
        name for name, parameter in module.named_parameters()
        if id(parameter) not in covered and torch.equal(parameter, before[name])
    ]  # fmt: skip
    if missed:
        raise ValueError(
            f"from scratch: expected layers with reset_parameters, got none for {', '.join(missed[:4])}; "
            "fine-tune instead, or give the classifier's module a reset_parameters of its own"
        )
