"""The whole state of a training run in one safetensors file, so that ``--resume`` continues bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    run: Mapping[str, Any],
    device: torch.device,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write weights, optimizer moments, the loss's scale, random states and the step, to a file that is then renamed.

    Modules and optimizers are told apart by their names. ``run`` describes the run (its recipe and data) in plain JSON
    values; a later run must describe itself the same.
    """
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    for prefix, module in modules.items():
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    for prefix, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{prefix}.{index}.{name}": value for name, value in values.items()}
    if scaler is not None:
        tensors |= {f"scaler.{name}": torch.tensor(value) for name, value in scaler.state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as file:
        file.write(save(tensors, {"run": json.dumps({"step": step, **run})}))


def check_state(path: Path, run: Mapping[str, Any], steps: int | None = None) -> int:
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
        if "amp" in run:  # states of before there was a choice have no such entry
            found.setdefault("amp", "bf16")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise _damaged(path, error) from error
    differing = [key for key in {**run, **found} if key not in ("step", "steps") and found.get(key) != run.get(key)]
    if differing:
        raise ValueError(
            f"{path}: the run to resume is another one; it differs in "
            + ", ".join(f"{key} ({found.get(key)!r} there, {run.get(key)!r} here)" for key in differing)
        )
    if steps is not None and step > steps:
        raise ValueError(
            f"{path}: expected a run of at most {steps} steps, got one that has made {step}; raise --steps"
        )
    return step


def load_state(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    device: torch.device,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Restore what :func:`save_state` wrote, in place.

    Raises:
        ValueError: the file does not hold this training of these networks.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for prefix, module in modules.items():
            module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in module.state_dict()})
        for prefix, optimizer in optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": _moments(tensors, prefix, optimizer)})
        if scaler is not None and scaler.is_enabled():
            scaler.load_state_dict({name: tensors[f"scaler.{name}"].item() for name in scaler.state_dict()})
        torch.set_rng_state(tensors["random.cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    except (SafetensorError, KeyError, IndexError, RuntimeError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _moments(
    tensors: Mapping[str, Tensor], prefix: str, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            _, index, name = key.split(".")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # The fused optimizer pairs values by their place in memory, so moments need their weight's strides.
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[name] = value
    return state


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: expected the state of a training run, got {error!r}; delete it to start anew")
