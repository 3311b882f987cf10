"""The whole state of a training run in one safetensors file, so that ``--resume`` continues bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from defense_vae_fast.atomic import replacing


def save_state(
    path: Path,
    *,
    step: int,
    model: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    run: dict[str, Any],
    device: torch.device,
) -> None:
    """Write models, optimizer moments, the loss's scale, random states and the step, to a file that is then renamed.

    ``run`` describes the run (its recipe and data) in plain JSON values; a later run must describe itself the same.
    """
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    for prefix, module in (("model", model), ("averaged", averaged)):
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    state = optimizer.state_dict()["state"]
    for index, values in state.items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors |= {f"scaler.{name}": torch.tensor(value) for name, value in scaler.state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as file:
        file.write(save(tensors, {"run": json.dumps({"step": step, **run})}))


def check_state(path: Path, run: dict[str, Any], steps: int | None = None) -> int:
    """Step of the state at ``path``, once it is clear that it belongs to this run.

    Args:
        path: what :func:`save_state` wrote.
        run: the description of the run that wants to go on; ``steps`` in it may differ: a run may be made longer.
        steps: how many steps the run wants to have made in the end; None where that is not known yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another run, or further than ``steps``.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the state of a run to resume, found none; start without --resume")
    try:
        with safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["run"])
        step = int(found["step"])
        # States of before there was a choice have no such entry.
        found.setdefault("amp", "bf16")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise _damaged(path, error) from error
    differing = [key for key in run if key != "steps" and found.get(key) != run[key]]
    if differing:
        raise ValueError(
            f"{path}: the run to resume is another one; it differs in "
            + ", ".join(f"{key} ({found.get(key)!r} there, {run[key]!r} here)" for key in differing)
        )
    if steps is not None and step > steps:
        raise ValueError(
            f"{path}: expected a run of at most {steps} steps, got one that has made {step}; raise --steps"
        )
    return step


def load_state(
    path: Path, *, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, device: torch.device,
) -> None:  # fmt: skip
    """Restore what :func:`save_state` wrote, in place.

    Raises:
        ValueError: the file does not hold this network's training.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for prefix, module in (("model", model), ("averaged", averaged)):
            module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in module.state_dict()})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:
                    # The fused optimizer pairs values by their place in memory, so moments need their weight's strides.
                    value = torch.empty_like(parameter).copy_(value)
                state.setdefault(int(index), {})[name] = value
        if scaler.is_enabled():
            scaler.load_state_dict({name: tensors[f"scaler.{name}"].item() for name in scaler.state_dict()})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    except (SafetensorError, KeyError, IndexError, RuntimeError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: expected the state of a training run, got {error!r}; delete it to start anew")
