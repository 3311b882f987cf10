"""Train a Defense-VAE on pairs of attacked and clean images (equation 4)."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from defense_vae_fast import __version__
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import Checkpoint, save_checkpoint
from defense_vae_fast.nn.kernels.selection import Kernels
from defense_vae_fast.nn.model import DefenseVAE
from training.attacks import FGSM, predict
from training.data import Dataset, Split, to_float
from training.device import place
from training.distributed import AGREE_EVERY, ALONE, Ranks
from training.pairs import PairSource, attack_all, pair_source
from training.precision import Amp, default_amp
from training.progress import bar
from training.recipe import Recipe
from training.state import check_state, load_state, save_state
from training.step import Average, CudaGraphs, Step, make_optimizer
from training.stopping import stop_signal

STATE_FILE = "state.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE = "log.jsonl"
SECONDS_BETWEEN_SAVES = 120
VALIDATION_SUBSET = 500


@dataclass(frozen=True)
class FitResult:
    """Where a run left its files, and how far it came."""

    checkpoint: Path
    step: int
    steps: int

    @property
    def finished(self) -> bool:
        """Whether all steps were made."""
        return self.step == self.steps


def fit(
    data: Dataset,
    classifiers: Mapping[str, nn.Module],
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    pairs: PairSource | None = None,
    init: Checkpoint | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    amp: Amp | None = None,
    kernels: Kernels = "auto",
    cuda_graph: bool = True,
    ranks: Ranks = ALONE,
) -> FitResult:
    """Train, writing the state, the purifier and a log into ``out`` at the end of every epoch and every two minutes.

    Ctrl-C or SIGTERM stops after the current step and leaves a usable checkpoint; ``resume`` goes on from there, on the
    CPU with the same bits as an uninterrupted run (on CUDA, cuDNN's convolutions may sum in another order each time).

    Several ranks make the batches of one process together (see :mod:`training.distributed`), and a run may be resumed
    by another number of them. A signal to any of them stops all after the same step.

    Args:
        data: the data set; training uses its training split, the log its validation split, nothing its test split.
        classifiers: the attacked classifiers by name, in eval mode, gradients of their weights off.
        recipe: everything that decides the weights.
        out: folder of the run.
        device: where to train.
        pairs: train on these instead of those that the recipe asks for; with several ranks, each one's share.
        init: start from this purifier's weights instead of random ones; the header keeps its recipe.
        resume: go on from ``out``'s state.
        tensorboard: write TensorBoard events into ``out`` too.
        amp: precision of the networks in a step, by default the device's own; weights are float32 and ``fp16`` scales
            its loss.
        kernels: ``triton`` or ``torch``, or ``auto`` for fused kernels on CUDA where Triton works.
        cuda_graph: on CUDA, launch a whole step at once, as a CUDA graph.
        ranks: who trains together; all call with the same arguments, and ``out`` is a folder that all of them see.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` was not asked for.
        FileNotFoundError: ``resume`` was asked for and ``out`` holds no run.
        RuntimeError: ``kernels`` cannot run here, or the step cannot be captured.
        ValueError: the state to resume belongs to another recipe or other data, ``init`` is of another shape, the
            ranks cannot share a batch evenly, or ``amp`` is fp16 where the optimizer is Muon.
    """
    device = torch.device(device)
    amp = amp or default_amp(device)
    if recipe.optimizer == "muon" and amp == "fp16":
        raise ValueError(
            "optimizer 'muon': expected the precision bf16 or fp32, got fp16, whose scaled loss it cannot use"
        )
    state_path = out / STATE_FILE
    about = {
        **recipe.to_dict(),
        "dataset": data.name,
        "data_digest": data.digest,
        "init": init and init.digest,
        "amp": amp,
    }
    ranks.check_same(about)
    ranks.check_batch(attacked=recipe.attacked, clean=recipe.clean)
    # Whatever can be wrong with the folder is found before the pairs are made, which may take hours.
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        check_state(state_path, about)
    elif state_path.exists():
        raise FileExistsError(f"{out}: holds a run already; go on with --resume, or choose another --out")
    torch.manual_seed(recipe.seed)
    _, channels, size, _ = data.train.images.shape
    config = VAEConfig(size, channels, recipe.latent_dim)
    if init is not None and init.config != config:
        raise ValueError(f"init: expected a purifier of the shape {config}, got {init.config}")
    model = place(
        DefenseVAE(config, kernels) if init is None else DefenseVAE.from_checkpoint(init, kernels), device
    )  # fmt: skip
    averaged = AveragedModel(model)
    recorder = CudaGraphs(device) if cuda_graph and device.type == "cuda" else None
    optimizer = make_optimizer(model, recipe, recorded=recorder is not None)
    if ranks.group is not None:
        model.share(ranks.group)  # after it was copied for the average, which a process group cannot be
    train = (data.train.mirrored() if recipe.mirrored else data.train).to(device)
    source = pairs or pair_source(train, classifiers, recipe, ranks=ranks)
    steps = recipe.steps or recipe.epochs * source.steps_per_epoch
    # The classifiers' word on every clean image is read once, not at every step.
    judging = recipe.agreement_weight or recipe.own_agreement_weight
    pool = list(classifiers.values()) if judging else []
    clean_logits = [_logits(classifier, train) for classifier in pool]
    average = Average(averaged, model, recipe.averaging, recorded=recorder is not None) if recipe.averaging else None
    run = Step(
        model.train(), average, optimizer, recipe, train.images, pool, clean_logits, amp=amp, recorder=recorder,
        ranks=ranks,
    )  # fmt: skip
    whole: dict[str, Any] = {
        "modules": {"model": model, "averaged": averaged},
        "optimizers": {"optimizer": optimizer},
        "scaler": run.scaler,
    }
    monitor = Monitor(data, classifiers, device, out, tensorboard) if ranks.first else None
    shipped: DefenseVAE = averaged.module if recipe.averaging else model  # type: ignore[assignment]
    step = 0
    # The last use of randomness before the first step, so that nothing above shifts the stream.
    torch.manual_seed(recipe.seed)
    if resume:
        step = check_state(state_path, about, steps)
        load_state(state_path, **whole, device=device)

    # All start from the same bits, whatever hardware each has made them on.
    ranks.spread([*model.state_dict().values(), *averaged.state_dict().values()])

    saved = time.monotonic()
    title = f"Defense-VAE on {data.name}"
    with bar(title, steps, step, quiet=not ranks.first) as progress, stop_signal(ranks) as stopping:
        while step < steps:
            judge, own = _judges(recipe, list(classifiers), step)
            loss = run(source.batch(step), judge, recipe.rate(step, steps), own)
            step += 1
            progress.update(1, images=recipe.attacked + recipe.clean, loss=loss)
            epoch_ends = step % source.steps_per_epoch == 0 or step == steps
            if epoch_ends and monitor is not None:
                monitor.report(shipped, step, loss, recipe.rate(step - 1, steps))
            # Asked once: what is left behind here is written first.
            together = device.type == "cpu" or ranks.size == 1 or epoch_ends or step % AGREE_EVERY == 0
            stop = together and ranks.any(stopping.is_set())
            due = epoch_ends or stop or time.monotonic() - saved > SECONDS_BETWEEN_SAVES
            if due and monitor is not None:
                save_state(state_path, step=step, **whole, run=about, device=device)
                accuracies = {"validation": monitor.latest} if step == steps else {}
                made: dict[str, Any] = {"attacks": list(source.attacks), "steps_made": step, "steps_planned": steps}
                if init is not None:
                    made["init"] = {"digest": init.digest, **init.recipe}
                save_checkpoint(out / CHECKPOINT_FILE, _bundle(shipped, data, {**recipe.to_dict(), **made}, accuracies))
                saved = time.monotonic()
            if stop:
                break
        ranks.wait()  # a launcher that sees one rank leave may stop the others, and the first may still be writing
    return FitResult(out / CHECKPOINT_FILE, step, steps)


class Monitor:
    """Validation accuracy of the attacked classifiers behind the purifier, kept in a log while training goes on.

    It looks at a small fixed part of the validation split, clean and under FGSM 0.3.
    """

    def __init__(
        self, data: Dataset, classifiers: Mapping[str, nn.Module], device: torch.device, out: Path, tensorboard: bool
    ) -> None:
        self._split = data.validation.first(VALIDATION_SUBSET).to(device)
        self._classifiers = classifiers
        self._attacked = {name: attack_all(FGSM(0.3), model, self._split) for name, model in classifiers.items()}
        self._log = out / LOG_FILE
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(out / "tensorboard")
        self.latest: dict[str, float] = {}

    @torch.no_grad()
    def report(self, model: DefenseVAE, step: int, loss: Tensor, rate: float) -> None:
        """Measure, append a line to the log, and leave the model in the mode it was in."""
        mode = model.training
        model.eval()
        labels = self._split.labels
        purified = _purify(model, self._split.images)
        clean = sum(_accuracy(classifier, purified, labels) for classifier in self._classifiers.values())
        attacked = sum(
            _accuracy(classifier, _purify(model, self._attacked[name]), labels)
            for name, classifier in self._classifiers.items()
        )
        model.train(mode)
        count = len(self._classifiers)
        self.latest = {"clean": round(clean / count, 2), "fgsm_0.3": round(attacked / count, 2)}
        line = {"step": step, "loss": round(float(loss), 4), "learning_rate": rate, **self.latest}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for key, value in line.items():
                if key != "step":
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()


def _purify(model: DefenseVAE, images: Tensor) -> Tensor:
    return torch.cat([model.purify(to_float(part)) for part in torch.split(images, 250)])


def _accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((predict(classifier, images) == labels).float().mean())


def _judges(recipe: Recipe, pool: list[str], step: int) -> tuple[int | None, int | None]:
    """Positions in the pool of the classifiers that judge a step's images: one for all, and the attacked one."""
    judge = own = None
    if recipe.agreement_weight:
        # Half the pool away from the classifier that this batch was attacked against, shifting by one each round.
        judge = (step + len(pool) // 2 + step // len(pool)) % len(pool)
    if recipe.own_agreement_weight:
        own = pool.index(recipe.classifiers[step % len(recipe.classifiers)])
    return judge, own


@torch.no_grad()
def _logits(classifier: nn.Module, split: Split) -> Tensor:
    return torch.cat([classifier(to_float(images)).float() for images in torch.split(split.images, 100)])


def _bundle(
    model: DefenseVAE, data: Dataset, recipe: dict[str, Any], accuracies: dict[str, dict[str, float]]
) -> Checkpoint:
    return Checkpoint(
        config=model.config,
        tensors=model.checkpoint_tensors(),
        dataset=data.name,
        recipe={**recipe, "class_names": list(data.class_names)},
        accuracies=accuracies,
        versions={
            "defense_vae_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
