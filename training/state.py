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
    recipe: dict[str, Any],
) -> None:
    """Write models, optimizer moments, random states and the step, to a temporary file that is then renamed."""
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for prefix, module in (("model", model), ("averaged", averaged)):
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    state = optimizer.state_dict()["state"]
    for index, values in state.items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as file:
        file.write(save(tensors, {"run": json.dumps({"step": step, "recipe": recipe})}))


def load_state(
    path: Path, *, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]
) -> int:
    """Restore what :func:`save_state` wrote, in place, and return the step to go on from.

    Raises:
        ValueError: the file is damaged, or belongs to a run with another recipe (``steps`` may differ: a run may be
            made longer or shorter).
    """
    try:
        with safe_open(path, "pt") as file:
            run = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path}: expected the state of a training run, got {error!r}; delete it to start anew"
        ) from error
    differing = [key for key in recipe if key != "steps" and run["recipe"].get(key) != recipe[key]]
    if differing:
        raise ValueError(
            f"{path}: the run to resume has another recipe; it differs in "
            + ", ".join(f"{key} ({run['recipe'].get(key)!r} there, {recipe[key]!r} here)" for key in differing)
        )
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
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return int(run["step"])
