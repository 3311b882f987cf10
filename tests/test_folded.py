"""The folded network: its layers' forms are the same function, and the fastest that works is the one that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.nn import folded
from defense_vae_fast.nn.folded import PLAIN, FoldedNetwork, as_subpixel, fastest, forms
from defense_vae_fast.nn.model import DefenseVAE
from defense_vae_fast.onnx_graph import fold

CPU = torch.device("cpu")
CONFIGS = [VAEConfig(), VAEConfig(32, 3), VAEConfig(64, 2, 17)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_form_of_every_layer_is_the_same_function(
    config: VAEConfig, random_checkpoint: Callable[[VAEConfig, int], Checkpoint]
) -> None:
    checkpoint = random_checkpoint(config, 1)
    seen = set()
    for layer in config.layers():
        made = forms(layer, *fold(layer, checkpoint.tensors), torch.float64, CPU)
        assert next(iter(made)) == PLAIN
        shape = (layer.in_channels,) if layer.kind == "linear" else (layer.in_channels, layer.in_size, layer.in_size)
        x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        if layer.kind != "linear":
            x = x.contiguous(memory_format=torch.channels_last)
        expected = made[PLAIN](x.clone())
        for name, form in made.items():
            seen.add((layer.kind, name))
            result = form(x.clone())
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12, msg=f"{layer.name} {name}")
            if result.ndim == 4:
                assert result.is_contiguous(memory_format=torch.channels_last), f"{layer.name} {name}"
    others = {("conv", "fused"), ("conv_transpose", "sub-pixel")}
    assert seen == {("linear", PLAIN), ("conv", PLAIN), ("conv_transpose", PLAIN), *others}


def test_a_subpixel_kernel_has_what_a_transposed_one_has() -> None:
    layer = next(layer for layer in VAEConfig().decoder if layer.kind == "conv_transpose")
    weight = np.random.default_rng(0).normal(size=layer.weight_shape)
    padding, spread, bias = as_subpixel(layer, weight, np.arange(layer.out_channels, dtype=np.float64))
    assert spread.shape == (4 * layer.out_channels, layer.in_channels, 3, 3)
    assert np.array_equal(np.sort(spread[spread != 0]), np.sort(weight.ravel()))
    assert (padding, bias[layer.out_channels]) == (1, 0)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=str)
def test_the_network_is_the_module(
    config: VAEConfig, random_checkpoint: Callable[[VAEConfig, int], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each form that its layers have: what CUDA would choose is made on the CPU."""
    checkpoint = random_checkpoint(config, 2)
    images = torch.rand(3, *config.image_shape, dtype=torch.float64)
    given = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = DefenseVAE.from_checkpoint(checkpoint).double().purify(images)
    plain = FoldedNetwork(checkpoint, torch.float64, CPU)
    torch.testing.assert_close(torch.sigmoid(plain(given)), expected, rtol=1e-9, atol=1e-9)
    assert plain.chosen() == {}

    every = forms
    monkeypatch.setattr(folded, "forms", lambda *values, plain: every(*values))
    monkeypatch.setattr(folded, "_remembered", lambda layer, made, x: list(made)[-1])
    last = FoldedNetwork(checkpoint, torch.float64, CPU)
    torch.testing.assert_close(torch.sigmoid(last(given)), expected, rtol=1e-9, atol=1e-9)
    chosen = last.chosen()[3]
    assert {chosen[layer.name] for layer in config.encoder} == {"fused"}
    assert set(chosen.values()) == {"fused", "sub-pixel"}
    last.settle()
    torch.testing.assert_close(torch.sigmoid(last(given)), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(KeyError):
        last._layers[0]._forms[PLAIN]


def made_up(**seconds: float) -> tuple[dict[str, Any], Callable[[Any, Tensor], float]]:
    """Forms by name that take so many seconds, and the clock that says so."""
    made = {name: (lambda x, name=name: x.clone().relu_()) for name in seconds}
    times = {id(form): seconds[name] for name, form in made.items()}
    return made, lambda form, x: times[id(form)]


def test_the_fastest_form_is_taken() -> None:
    for first, second in ((2.0, 1.0), (1.0, 2.0)):
        made, clock = made_up(plain=first, fused=second)
        assert fastest("layer", made, torch.zeros(2, 3), clock) == ("fused" if second < first else "plain")


@pytest.mark.parametrize("wrong", ["raises", "differs", "NaN"])
def test_a_form_that_does_not_work_is_not_taken_however_fast(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    made, clock = made_up(plain=2.0, fused=1.0)

    def broken(x: Tensor) -> Tensor:
        if wrong == "raises":
            raise RuntimeError("no engine for this configuration")
        return made["plain"](x) + (0.1 if wrong == "differs" else torch.nan)

    caplog.set_level("INFO", folded.__name__)
    assert fastest("encoder1", {"plain": made["plain"], "fused": broken}, torch.zeros(2, 3), clock) == "plain"
    assert "encoder1: form fused" in caplog.text


def test_choosing_leaves_torchs_random_state_alone() -> None:
    before = torch.get_rng_state()
    fastest("layer", *[made_up(plain=1.0, fused=2.0)[0]], torch.zeros(2, 3), lambda form, x: 1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_forms_on_cuda(count: int, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    """Each form against float64: at most twice the plain form's error; what cuDNN does not run is skipped."""
    device, skipped = torch.device("cuda"), []
    for layer in checkpoint.config.layers():
        values = fold(layer, checkpoint.tensors)
        made = forms(layer, *values, dtype, device)
        exact = forms(layer, *values, torch.float64, CPU)[PLAIN]
        shape = (layer.in_channels,) if layer.kind == "linear" else (layer.in_channels, layer.in_size, layer.in_size)
        x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        if layer.kind != "linear":
            x = x.contiguous(memory_format=torch.channels_last)
        expected = exact(x.cpu().double())
        errors = {}
        for name, form in made.items():
            torch.full((64 << 20,), float("nan"), device=device)  # what a form reads of fresh memory shows
            try:
                errors[name] = float((form(x).cpu().double() - expected).square().mean().sqrt())
            except RuntimeError as error:
                skipped.append(f"{layer.name} {name}: {error}")
        assert all(error <= 2 * errors[PLAIN] + 1e-6 for error in errors.values()), (layer.name, errors)
    print("\n".join(skipped))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_network_on_cuda_in_its_chosen_forms(checkpoint: Checkpoint) -> None:
    device = torch.device("cuda")
    images = torch.rand(33, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    exact = torch.sigmoid(FoldedNetwork(checkpoint, torch.float64, CPU)(images.double()))
    errors = []
    for plain in (True, False):
        network = FoldedNetwork(checkpoint, torch.float16, device, plain=plain)
        given = images.to(device, torch.float16).contiguous(memory_format=torch.channels_last)
        purified = torch.sigmoid(network(given).float()).cpu().double()
        errors.append(float((purified - exact).square().mean().sqrt()))
        print(network.chosen())
    assert errors[1] <= 2 * errors[0] + 1e-4
