"""Defense-VAE as a torch module, built from the layer table."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch import distributed as dist

from defense_vae_fast.architecture import BATCH_NORM_EPSILON, Layer, VAEConfig
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.nn import small_maps
from defense_vae_fast.nn.fused import BatchNormReLU2d, reparameterize
from defense_vae_fast.nn.kernels.selection import Kernels, check

# With a KL weight of 0 nothing holds the latent's noise down but what the decoder hears of it, and the decoder's
# BatchNorm takes any scale away: at a learning rate of 2e-3 the log-variance was seen at 58 after 35 steps, and
# BatchNorm's running variance became infinite. Five deviations of exp(8) fit into float16, and trained purifiers end at
# 0.2 at most.
MAX_LOGVAR = 16.0


class VAEOutput(NamedTuple):
    """What one pass through the network gives."""

    logits: Tensor
    """(N, C, H, W) pixel logits; ``torch.sigmoid`` of them is the purified image."""
    mu: Tensor
    """(N, latent_dim) latent means."""
    logvar: Tensor
    """(N, latent_dim) logarithms of the latent variances, at most ``MAX_LOGVAR``."""
    kl: Tensor | None = None
    """(N,) divergences of equation 2, where the latent was sampled, which gives them in passing."""


class Block(nn.Module):
    """One row of the layer table: convolution or matrix product, BatchNorm where the row has it, ReLU where it has it.

    A BatchNorm and its ReLU are one module. A final sigmoid is left to the caller, so that the loss can work on logits.
    """

    def __init__(self, layer: Layer, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layer.weight_shape))
        self.bias = None if layer.batch_norm else nn.Parameter(torch.empty(layer.out_channels))
        self.norm = None
        if layer.batch_norm:
            assert layer.activation == "relu"
            self.norm = BatchNormReLU2d(layer.out_channels, eps=BATCH_NORM_EPSILON, kernels=kernels)
        self.layer = layer
        self._small = self.bias is None and small_maps.fits(layer)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if layer.kind == "linear":
            x = nn.functional.linear(x, self.weight, self.bias)
        elif self._small and x.device.type == "cpu":
            x = (small_maps.conv if layer.kind == "conv" else small_maps.conv_transpose)(x, self.weight)
        elif layer.kind == "conv":
            x = nn.functional.conv2d(x, self.weight, self.bias, layer.stride, layer.padding)
        else:
            x = nn.functional.conv_transpose2d(x, self.weight, self.bias, layer.stride, layer.padding)
        if self.norm is not None:
            return self.norm(x)  # type: ignore[no-any-return]
        return torch.relu(x) if layer.activation == "relu" else x


class DefenseVAE(nn.Module):
    """The paper's purifier (Table 6 and equations 1 to 4).

    In training mode the latent is sampled, in eval mode it is the mean, so evaluation is deterministic. The output
    has the input's layout; pixel values are in [0, 1] on both sides.

    Args:
        config: the shape; Table 6 where None.
        kernels: form of BatchNorm with ReLU and of the sampling: ``triton`` or ``torch``, or ``auto`` for Triton on
            CUDA where it works. Weights are the same in all.

    Raises:
        ValueError: ``kernels`` is none of the three.
        RuntimeError: in the forward, ``triton`` was asked for and cannot run.
    """

    def __init__(self, config: VAEConfig | None = None, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.config = config or VAEConfig()
        self.kernels = check(kernels)
        for layer in self.config.layers():
            self.add_module(layer.name, Block(layer, self.kernels))
        last = self.config.encoder[-1]
        self._bottom = (last.out_channels, last.out_size, last.out_size)
        self._rows = (0, 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initialisation (section 4.1): N(0, 0.02) convolutions, N(1, 0.02) BatchNorm scales.

        It names no rule for the linear layers; they get torch's default, as in the released code.
        """
        for block in self.modules():
            if not isinstance(block, Block):
                continue
            if block.layer.kind == "linear":
                bound = block.weight.shape[1] ** -0.5
                block.weight.uniform_(-bound, bound)
            else:
                block.weight.normal_(0.0, 0.02)
            if block.bias is not None:
                block.bias.zero_()
            if block.norm is not None:
                block.norm.reset_parameters()
                block.norm.weight.normal_(1.0, 0.02)

    def share(self, group: dist.ProcessGroup) -> None:
        """Train as a part of a larger batch: rank r of n in ``group`` is given images r, r + n, r + 2n ... of it.

        From then on, in training mode, BatchNorm has the statistics of the whole batch, and each image the noise that
        it would have in it. All ranks must call the module together. Gradients stay a rank's own.
        """
        for module in self.modules():
            if isinstance(module, BatchNormReLU2d):
                module.process_group = group
        self._rows = (group.rank(), group.size())

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, kernels: Kernels = "auto") -> DefenseVAE:
        """The network with a checkpoint's weights, as float32, in eval mode."""
        model = cls(checkpoint.config, kernels)
        state = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in checkpoint.tensors.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(name.endswith("num_batches_tracked") for name in missing)
        return model.eval()

    def checkpoint_tensors(self, dtype: torch.dtype = torch.float16) -> dict[str, npt.NDArray[Any]]:
        """Tensors for a :class:`Checkpoint`: weights as ``dtype``, biases and BatchNorm vectors as float32."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return {
            name: tensor.to(dtype if tensor.ndim > 1 else torch.float32).numpy()
            for name, tensor in tensors.items()
            if not name.endswith("num_batches_tracked")
        }

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) images in [0, 1] -> (mu, logvar), each (N, latent_dim): q(z | x) of equation 3.

        The log-variance ends at ``MAX_LOGVAR``.
        """
        for layer in self.config.encoder:
            x = self.get_submodule(layer.name)(x)
        features = x.flatten(1)
        mu, logvar = (self.get_submodule(layer.name)(features) for layer in self.config.heads)
        return mu, logvar.clamp(max=MAX_LOGVAR)

    def decode(self, z: Tensor) -> Tensor:
        """(N, latent_dim) -> (N, C, H, W) pixel logits: p(x | z) of equation 3."""
        first, *rest = self.config.decoder
        x: Tensor = self.get_submodule(first.name)(z).unflatten(1, self._bottom)
        for layer in rest:
            x = self.get_submodule(layer.name)(x)
        return x

    def forward(self, x: Tensor) -> VAEOutput:
        """(N, C, H, W) images in [0, 1] -> :class:`VAEOutput`."""
        mu, logvar = self.encode(x)
        if not self.training:
            return VAEOutput(self.decode(mu), mu, logvar)
        z, kl = reparameterize(mu, logvar, rows=self._rows, kernels=self.kernels)
        return VAEOutput(self.decode(z), mu, logvar, kl)

    def purify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> purified images of the same shape, from the mean latent.

        Differentiable in ``x``; the mode of BatchNorm is the module's (call :meth:`eval` first).
        """
        mu, _ = self.encode(x)
        return torch.sigmoid(self.decode(mu))
