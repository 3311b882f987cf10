"""Convolutions with small maps as matrix products: torch's own convolutions are the oracle."""

import pytest
import torch
from torch.nn import functional as F

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.nn import small_maps
from defense_vae_fast.nn.model import DefenseVAE


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 2), (4, 4), (2, 6), (1, 1)])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_it_is_the_convolution(kind, size, layout):
    torch.manual_seed(0)
    shape = (4, 3) if kind == "conv" else (3, 4)
    size = [2 * side for side in size] if kind == "conv" else size
    x = torch.randn(5, 3, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(*shape, 4, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    found = getattr(small_maps, kind)(x, weight)
    right = getattr(F, f"{kind}2d")(x, weight, stride=2, padding=1)
    assert found.shape == right.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    weights = torch.randn_like(right)
    gradients = [torch.autograd.grad((y * weights).sum(), (x, weight)) for y in (found, right)]
    for ours, theirs in zip((found, *gradients[0]), (right, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "names"), [(28, []), (32, ["encoder5", "decoder2"]), (64, ["encoder6", "decoder2"])])
def test_only_the_layers_about_the_bottom_are_products(size, names, monkeypatch):
    model = DefenseVAE(VAEConfig(size, 3 if size > 28 else 1))
    assert [layer.name for layer in model.config.layers() if small_maps.fits(layer)] == names
    calls = []

    def counted(kind, plain):
        return lambda *tensors: calls.append(kind) or plain(*tensors)

    for kind in ("conv", "conv_transpose"):
        monkeypatch.setattr(small_maps, kind, counted(kind, getattr(small_maps, kind)))
    model(torch.rand(2, model.config.channels, size, size))
    assert calls == ["conv", "conv_transpose"][: len(names)]
