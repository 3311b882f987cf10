"""The loop of every training that is not the purifier's own: progress, checkpoints, resume, Ctrl-C.

A step is a function of its number and torch's random state alone, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from defense_vae_fast.atomic import replacing
from training.fit import LOG_FILE, SECONDS_BETWEEN_SAVES, STATE_FILE, _stop_signal
from training.progress import bar
from training.state import check_state


@dataclass(frozen=True)
class Run:
    """A training run's folder, and what tells it from another run.

    Args:
        out: folder of the run.
        about: everything that decides the result, in plain JSON values.
        seed: seeds the steps' randomness.
        device: where the networks are.
        resume: go on from the folder's state.
    """

    out: Path
    about: Mapping[str, Any]
    seed: int
    device: torch.device
    resume: bool = False

    def open(self) -> None:
        """Find what is wrong with the folder before any work is done.

        Raises:
            FileExistsError: it holds a run and ``resume`` was not asked for.
            FileNotFoundError: ``resume`` was asked for and it holds no run.
            ValueError: its state belongs to another run.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        state = self.out / STATE_FILE
        if self.resume:
            check_state(state, dict(self.about))
        elif state.exists():
            raise FileExistsError(f"{self.out}: holds a run already; go on with --resume, or choose another --out")

    def log(self, line: Mapping[str, float]) -> None:
        """Append a line to the run's log."""
        with (self.out / LOG_FILE).open("a") as log:
            log.write(json.dumps(dict(line)) + "\n")

    def train(
        self,
        title: str,
        step: Callable[[int], Tensor],
        steps: int,
        *,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        images: int,
        finish: Callable[[int], None],
        report: Callable[[int], Mapping[str, float]] | None = None,
        report_every: int = 0,
    ) -> int:
        """Make the steps and return how many have been made: fewer than ``steps`` after Ctrl-C or SIGTERM.

        Args:
            title: of the progress bar.
            step: makes step number ``n`` (from 0) and returns its loss.
            steps: steps to make in all, at least 1.
            modules: what is trained, by the name in the state; all of it is saved and resumed.
            optimizers: the same for their optimizers.
            images: images a step, for the rate shown.
            finish: writes the run's result; called with the steps made whenever the state is written.
            report: measures what the log is to hold, called every ``report_every`` steps and at the end; it must leave
                the modules in the mode in which it found them, and draw nothing from torch's random state.
            report_every: 0 for the end alone.
        """
        state = self.out / STATE_FILE
        torch.manual_seed(self.seed)
        made = 0
        if self.resume:
            made = check_state(state, dict(self.about), steps)
            _load(state, modules, optimizers, self.device)
        saved = time.monotonic()
        with bar(title, steps, made) as progress, _stop_signal() as stopping:
            while made < steps:
                loss = step(made)
                made += 1
                progress.update(1, images=images, loss=loss)
                ends = made == steps
                if report is not None and (ends or (report_every and made % report_every == 0)):
                    self.log({"step": made, "loss": round(float(loss), 5), **report(made)})
                stop = stopping.is_set()  # asked once: what is left behind here is written first
                if ends or stop or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    _save(state, made, modules, optimizers, self.about, self.device)
                    finish(made)
                    saved = time.monotonic()
                if stop:
                    break
        return made


def _save(
    path: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    about: Mapping[str, Any],
    device: torch.device,
) -> None:
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    for prefix, module in modules.items():
        tensors |= {f"{prefix}|{name}": value for name, value in module.state_dict().items()}
    for prefix, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{prefix}|{index}|{name}": value for name, value in values.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as file:
        file.write(save(tensors, {"run": json.dumps({"step": step, **about})}))


def _load(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    device: torch.device,
) -> None:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for prefix, module in modules.items():
            module.load_state_dict({name: tensors[f"{prefix}|{name}"] for name in module.state_dict()})
        for prefix, optimizer in optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for key, value in tensors.items():
                if not key.startswith(f"{prefix}|"):
                    continue
                _, index, name = key.split("|")
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:
                    # The fused optimizer pairs values by their place in memory: moments need their weight's strides.
                    value = torch.empty_like(parameter).copy_(value)
                state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    except (SafetensorError, KeyError, IndexError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: expected the state of this run, got {error!r}; delete it to start anew") from error
