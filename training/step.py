"""One training step as a whole, which a CUDA graph can hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from defense_vae_fast.nn.losses import agreement_loss, defense_vae_loss
from defense_vae_fast.nn.model import DefenseVAE, VAEOutput
from training.data import to_float
from training.distributed import ALONE, Ranks
from training.muon import Muon
from training.pairs import Pairs
from training.precision import Amp, autocast
from training.recipe import Recipe

# Steps made one operation at a time before the step is captured: what libraries set up at first use is then there.
WARM_UP = 3

_Judges = tuple[int | None, int | None]


class Recorder(Protocol):
    """Makes of a function one that does the same work on the same tensors again, without running the function."""

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run ``body`` where :meth:`record` will."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """What repeats ``body``; whether it is run here too is not said."""


class CudaGraphs:
    """CUDA graphs as a :class:`Recorder`: recording runs nothing, and a repetition is one launch.

    Args:
        device: the CUDA device of all the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # One pool for all graphs: they never run at the same time, and none leaves anything behind for another.
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run ``body`` on a stream of its own, as capture wants it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            body()
        current.wait_stream(self._stream)

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Capture ``body``.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                body()
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step cannot be captured as a CUDA graph: {error}; a classifier of your own may read "
                "values back to the host: train without the graph (--no-cuda-graph)"
            ) from error
        return graph.replay


def make_optimizer(model: DefenseVAE, recipe: Recipe, *, recorded: bool) -> torch.optim.Optimizer:
    """A recipe's optimizer; ``recorded`` keeps rate and step number on the device, where a recording reads them.

    Adam is one fused kernel. Muon gets the weights between the first layer and the last, which see pixels, and not
    the log-variance's: without a KL term its gradient vanishes, and Muon would make whole steps of what is left.
    """
    lr: float | Tensor = recipe.learning_rate
    if recorded:
        lr = torch.tensor(recipe.learning_rate, device=next(model.parameters()).device)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr, fused=True, capturable=recorded)
    layers = model.config.layers()
    names = {f"{layer.name}.weight" for layer in layers[1:-1] if layer.name != "logvar"}
    weights = dict(model.named_parameters())
    matrices = [weight for name, weight in weights.items() if name in names]
    return Muon(matrices, [weight for name, weight in weights.items() if name not in names], lr)


class Average:
    """Exponential average of all weights and statistics.

    It forgets fast at first: BatchNorm statistics start far from what they become, by a factor of hundreds for the
    first layer's variance, and would spoil the average for thousands of steps.

    Args:
        averaged: holds the average, and how many models are in it.
        model: the model to average.
        decay: of the average; 0 keeps none.
        recorded: keep the new model's share on the device, where a recording reads it.
    """

    def __init__(self, averaged: AveragedModel, model: nn.Module, decay: float, *, recorded: bool) -> None:
        self._averaged, self._decay = averaged, decay
        pairs = list(zip(_tensors(averaged.module), _tensors(model), strict=True))
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._share = 1.0
        self._on_device = torch.ones((), device=pairs[0][0].device) if recorded else None

    def advance(self) -> None:
        """Set the share that the next :meth:`update` takes; the count lies on the host."""
        made = int(self._averaged.n_averaged)
        self._share = 1 - min(self._decay, (1 + made) / (10 + made)) if made else 1.0
        if self._on_device is not None:
            self._on_device.fill_(self._share)
        self._averaged.n_averaged += 1

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model."""
        averages, currents = (list(side) for side in zip(*self._floating, strict=True))
        if self._on_device is None:
            for average, current in self._floating:
                average.lerp_(current, self._share)
        else:
            # A lerp over lists takes its share from the host alone.
            difference = torch._foreach_sub(currents, averages)
            torch._foreach_mul_(difference, self._on_device)
            torch._foreach_add_(averages, difference)
        for average, current in self._counters:
            average.copy_(current)


class Step:
    """Forward, both losses, backward, Adam and the weights' average, on one batch of pairs.

    What changes from step to step is in tensors (the pairs, the learning rate, the average's share), so that a
    :class:`Recorder` can repeat the step: the first few are made one operation at a time, then one is recorded for
    each pair of judges, and all later ones repeat it. Nothing here waits for the device.

    Args:
        model: the network, in training mode; or whatever makes a :class:`VAEOutput` of images with its weights.
        average: of its weights; None where the recipe has none.
        optimizer: from :func:`make_optimizer`, ``recorded`` if there is a recorder.
        recipe: weights of the losses.
        images: uint8 (N, C, H, W), all clean images, on the device.
        judges: classifiers for the agreement loss.
        clean_logits: their logits on ``images``, in the same order.
        amp: precision of the networks, by default the device's own. With ``fp16`` the loss is scaled, by ``scaler``.
        recorder: how the step is repeated; None makes each one operation at a time.
        ranks: with whom every batch is shared. Gradients and the loss are means over them before Adam sees them, and a
            step that one rank leaves out for an infinite gradient is left out by all.
    """

    def __init__(
        self,
        model: Callable[[Tensor], VAEOutput],
        average: Average | None,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        images: Tensor,
        judges: Sequence[nn.Module] = (),
        clean_logits: Sequence[Tensor] = (),
        *,
        amp: Amp | None = None,
        recorder: Recorder | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._average, self._optimizer, self._recipe = model, average, optimizer, recipe
        self._images, self._judges, self._clean_logits = images, judges, clean_logits
        self._amp = amp
        self.scaler = torch.amp.GradScaler(images.device.type, enabled=amp == "fp16")
        self._recorder, self._ranks = recorder, ranks
        self._loss = torch.zeros((), device=images.device)
        self._pairs: Pairs | None = None
        self._warm_ups: Counter[_Judges] = Counter()
        self._replays: dict[_Judges, Callable[[], None]] = {}

    def __call__(self, pairs: Pairs, judge: int | None, rate: float, own: int | None = None) -> Tensor:
        """Make a step and return its loss, a tensor that the next step overwrites.

        Args:
            pairs: the batch; of one size for all steps.
            judge: index of the classifier whose agreement on all images counts, or None for none.
            rate: learning rate.
            own: index of the attacked classifier where its agreement on the attacked images counts too, or None.
        """
        judges = judge, own
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self._average is not None:
            self._average.advance()
        if self._recorder is None:
            self._body(pairs, judges)
        elif self._warm_ups[judges] < WARM_UP:
            self._warm_ups[judges] += 1
            self._recorder.warm_up(lambda: self._body(pairs, judges))
        else:
            static = self._take(pairs)
            if judges not in self._replays:
                self._replays[judges] = self._recorder.record(lambda: self._body(static, judges))
            self._replays[judges]()
        return self._loss

    def _take(self, pairs: Pairs) -> Pairs:
        """Copy a batch to where recordings read it."""
        if self._pairs is None:
            self._pairs = Pairs(*map(torch.clone, pairs))
        for place, value in zip(self._pairs, pairs, strict=True):
            place.copy_(value)
        return self._pairs

    def _body(self, pairs: Pairs, judges: _Judges) -> None:
        clean = to_float(self._images[pairs.clean_index])
        with autocast(clean.device, self._amp):
            output = self._model(pairs.inputs)
        loss = defense_vae_loss(output, clean, self._recipe.kl_weight)
        judge, own = judges
        if judge is not None:
            agreement = self._agreement(judge, output.logits, pairs.clean_index)
            loss = loss + self._recipe.agreement_weight * agreement
        if own is not None:
            count = self._recipe.attacked // self._ranks.size
            agreement = self._agreement(own, output.logits[:count], pairs.clean_index[:count])
            loss = loss + self._recipe.own_agreement_weight * agreement
        self._optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._loss.copy_(loss.detach())
        weights = (weight for group in self._optimizer.param_groups for weight in group["params"])
        self._ranks.average([*(weight.grad for weight in weights if weight.grad is not None), self._loss])
        self.scaler.step(self._optimizer)
        self.scaler.update()
        if self._average is not None:
            self._average.update()

    def _agreement(self, judge: int, pixel_logits: Tensor, clean_index: Tensor) -> Tensor:
        """What a judge says of purified images against what it says of the clean ones."""
        with autocast(pixel_logits.device, self._amp):
            logits = self._judges[judge](torch.sigmoid(pixel_logits.float()))
        return agreement_loss(logits, self._clean_logits[judge][clean_index])


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*(parameter.detach() for parameter in module.parameters()), *module.buffers()]
