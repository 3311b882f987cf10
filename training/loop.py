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
from torch import Tensor, nn

from training.fit import LOG_FILE, SECONDS_BETWEEN_SAVES, STATE_FILE
from training.progress import bar
from training.state import check_state, load_state, save_state
from training.stopping import stop_signal


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
            check_state(state, self.about)
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
            made = check_state(state, self.about, steps)
            load_state(state, modules=modules, optimizers=optimizers, device=self.device)
        saved = time.monotonic()
        with bar(title, steps, made) as progress, stop_signal() as stopping:
            while made < steps:
                loss = step(made)
                made += 1
                progress.update(1, images=images, loss=loss)
                ends = made == steps
                if report is not None and (ends or (report_every and made % report_every == 0)):
                    self.log({"step": made, "loss": round(float(loss), 5), **report(made)})
                stop = stopping.is_set()  # asked once: what is left behind here is written first
                if ends or stop or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    save_state(
                        state, step=made, modules=modules, optimizers=optimizers, run=self.about, device=self.device
                    )
                    finish(made)
                    saved = time.monotonic()
                if stop:
                    break
        return made
