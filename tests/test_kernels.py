"""Triton's kernels against their twins in float64: interpreted on the CPU, or on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import python_path
from torch import Tensor, nn

from defense_vae_fast.nn.fused import BatchNormReLU2d, reparameterize
from defense_vae_fast.nn.kernels import reference, selection
from defense_vae_fast.nn.losses import defense_vae_loss, kl_divergence
from defense_vae_fast.nn.model import DefenseVAE, VAEOutput

triton = pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux on x86-64")
bn_relu = pytest.importorskip("defense_vae_fast.nn.kernels.bn_relu")
latent = pytest.importorskip("defense_vae_fast.nn.kernels.reparameterize")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: the CPU interprets them, CUDA runs them; a process does one of the two."""
    name = str(request.param)
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if reason := selection.unavailable(name):
        pytest.skip(reason)
    if name == "cuda" and selection.unavailable("cpu") is None:
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted in this process")
    return name


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks so small that tiny tensors go through every loop and merge."""
    monkeypatch.setattr(bn_relu, "TILE", 32)
    monkeypatch.setattr(bn_relu, "MAX_TILE_CHANNELS", 4)
    monkeypatch.setattr(bn_relu, "MAX_BLOCKS", 8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Sides of 1, primes, more channels than a tile, sizes that no block divides, and views of every kind.
INPUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: noise(3, 5, 7, 3),
    "channels_last": lambda: channels_last(noise(3, 5, 7, 3)),
    "two-values": lambda: noise(1, 3, 2, 1),
    "one-channel": lambda: channels_last(noise(5, 1, 3, 7)),
    "one-pixel": lambda: noise(11, 13, 1, 1),
    "two-tiles-of-channels": lambda: channels_last(noise(2, 67, 3, 3)),
    "many-blocks": lambda: channels_last(noise(4, 64, 5, 7)),
    "slice-of-channels": lambda: channels_last(noise(3, 9, 5, 4))[:, 2:7],
    "every-other-column": lambda: noise(3, 4, 5, 8)[..., ::2],
    "transposed": lambda: noise(3, 5, 7, 4).transpose(2, 3),
    "expanded": lambda: noise(1, 5, 7, 4).expand(3, -1, -1, -1),
}


class Run(dict[str, Tensor]):
    """Output, gradients and running statistics of one module on one input, in float64."""


def run(module: nn.Module, x: Tensor, gradient: Tensor) -> Run:
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(gradient.to(y))
    named = {"y": y, "x": x.grad}
    named |= {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
    named |= dict(module.named_buffers())
    return Run({name: value.detach().double().cpu() for name, value in named.items() if value is not None})


def norm(kernels: selection.Kernels, channels: int, device: str = "cpu", **options: Any) -> BatchNormReLU2d:
    module = BatchNormReLU2d(channels, kernels=kernels, **options)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(1 + 0.3 * noise(channels, seed=1))
            module.bias.copy_(0.5 * noise(channels, seed=2))
    return module.to(device)


def assert_as_exact(ours: Run, plain: Run, exact: Run, *, cut_off: bool = False) -> None:
    """Our error is at most twice plain torch's, or a few roundings of float32 where that happens to be nearly none.

    ``cut_off``: Triton's interpreter cuts a float32 off to bfloat16 where hardware rounds it; allow for that.
    """
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        rounding = torch.finfo(torch.bfloat16).eps if cut_off else 4 * torch.finfo(torch.float32).eps
        floor = rounding * (1 + float(value.abs().max()))
        for measure in (lambda error: float(error.abs().max()), lambda error: float(error.square().mean().sqrt())):
            error, allowed = measure(ours[name] - value), 2 * measure(plain[name] - value) + floor
            assert error <= allowed, f"{name}: error {error}, allowed {allowed}"


# BatchNorm and ReLU


@pytest.mark.parametrize(
    ("training", "dtype"),
    [*((True, dtype) for dtype in DTYPES), (False, torch.float16)],
    ids=["training-float32", "training-float16", "training-bfloat16", "eval-float16"],
)
@pytest.mark.parametrize("name", INPUTS)
def test_batch_norm_relu(name: str, dtype: torch.dtype, training: bool, device: str) -> None:
    x = (3 + 2 * INPUTS[name]()).to(dtype)
    gradient = noise(*x.shape, seed=3).to(dtype)
    channels = x.shape[1]
    modules = [norm("triton", channels, device), norm("torch", channels), norm("torch", channels).double()]
    for module in modules:
        module.running_mean.fill_(2.5)
        module.running_var.fill_(3.0)
        module.train(training)
    ours, plain, exact = (
        run(module, value, gradient)
        for module, value in zip(modules, (x.to(device), x, x.double()), strict=True)
    )  # fmt: skip
    assert_as_exact(ours, plain, exact, cut_off=device == "cpu" and dtype is torch.bfloat16)


@pytest.mark.parametrize(
    "x",
    [noise(4, 3, 5, 11), noise(1, 3, 5, 11).expand(4, -1, -1, -1), channels_last(noise(4, 7, 5, 7))],
    ids=["contiguous", "expanded", "channels_last"],
)
def test_every_loop_and_merge(x: Tensor, device: str, small_tiles: None) -> None:
    x = 3 + 2 * x
    shape = bn_relu.Shape.of(x)
    assert shape.blocks > 1
    assert shape.rows_per_block > shape.tile_rows
    gradient = noise(*x.shape, seed=3)
    ours = run(norm("triton", x.shape[1], device), x.to(device), gradient)
    plain, exact = (
        run(module, value, gradient)
        for module, value in ((norm("torch", x.shape[1]), x), (norm("torch", x.shape[1]).double(), x.double()))
    )
    assert_as_exact(ours, plain, exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_large_mean_costs_no_digits_of_the_variance(layout: torch.memory_format, device: str) -> None:
    x = (1e4 + noise(6, 3, 11, 13)).contiguous(memory_format=layout)
    exact = x.double().var((0, 2, 3), correction=0)
    _, variance = bn_relu.batch_statistics(x.to(device), None, None, None, 0.1)
    torch.testing.assert_close(variance.double().cpu(), exact, rtol=1e-5, atol=0)
    # The formula that a kernel is tempted by fails here, so this input can tell.
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert float((naive - exact).abs().max()) > 0.1


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.7, "eps": 0.1}],
    ids=str,
)
def test_three_batches_and_eval_as_batch_norm_2d(options: dict[str, Any], device: str) -> None:
    ours, theirs = norm("triton", 5, device, **options), nn.BatchNorm2d(5, **options)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        x = 2 + noise(4, 5, 3, 2, seed=seed)
        torch.testing.assert_close(ours(x.to(device)).cpu(), theirs(x).relu(), atol=1e-5, rtol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x.to(device)).cpu(), theirs(x).relu(), atol=1e-5, rtol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name].cpu(), value, atol=1e-6, rtol=1e-5)


def test_checkpoints_move_between_fused_and_plain_networks() -> None:
    fused, plain = (DefenseVAE(kernels=kernels) for kernels in ("triton", "torch"))
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    module, theirs = norm("torch", 3), nn.BatchNorm2d(3)
    theirs.load_state_dict(module.state_dict())
    module.load_state_dict(theirs.state_dict())
    assert list(module.state_dict()) == list(theirs.state_dict())


def test_gradients_that_are_not_wanted_are_not_made(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = norm("triton", 5, device).eval().requires_grad_(False)
    x = noise(2, 5, 3, 3).to(device).requires_grad_()
    monkeypatch.setattr(bn_relu, "normalize_relu_sums", None)
    module(x).sum().backward()
    exact = noise(2, 5, 3, 3).requires_grad_()
    norm("torch", 5).eval()(exact).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), exact.grad)


def test_nan_is_not_hidden(device: str) -> None:
    x = noise(2, 3, 4, 4)
    x[0, 1, 2, 2] = torch.nan
    y = norm("triton", 3, device)(x.to(device)).cpu()
    assert bool(y[:, 1].isnan().all())
    assert not bool(y[:, [0, 2]].isnan().any())


def test_the_same_input_gives_the_same_bits(device: str, small_tiles: None) -> None:
    x, gradient = channels_last(noise(4, 7, 5, 7)).to(device), noise(4, 7, 5, 7, seed=1).to(device)
    first, second = (run(norm("triton", 7, device), x, gradient) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_batch_in_eval_mode(device: str) -> None:
    module = norm("triton", 3, device).eval()
    x = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert bool((module.weight.grad == 0).all())


def test_bad_inputs_are_refused(device: str) -> None:
    for kernels in ("triton", "torch"):
        with pytest.raises(ValueError, match=r"[Ee]xpected .* 4D|expected 4D"):
            norm(kernels, 3, device)(torch.zeros(2, 3, 4, device=device))
        with pytest.raises(ValueError, match=r"xpected .*value"):
            norm(kernels, 3, device)(torch.zeros(1, 3, 1, 1, device=device))
    x, vector = torch.zeros(1, 3, 1, 1, device=device), torch.ones(3, device=device)
    with pytest.raises(ValueError, match="weight: expected a contiguous vector of 3 channels"):
        bn_relu.normalize_relu(x, vector[:2], vector[:2], vector, vector, 0.1, False)


def test_a_second_derivative_is_an_error(device: str) -> None:
    x = noise(2, 3, 4, 4).to(device).requires_grad_()
    (first,) = torch.autograd.grad(norm("triton", 3, device)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


# The latent


def standard(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The noise behind a sample."""
    return (z.double() - mu.double()) / (logvar.double() / 2).exp()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 7), (1, 1), (5, 128), (2, 130), (600, 1)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_sample_and_divergence(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    rows, width = shape
    # Both heads as one matrix product may give them: halves of wider rows.
    both = noise(rows, 2 * width).to(dtype)
    mu, logvar = (half.to(device).requires_grad_() for half in both.chunk(2, 1))
    seed = torch.tensor(1234567890123, device=device)
    z, kl = latent.sample(mu, logvar, seed)
    dz, dkl = noise(*shape, seed=1).to(dtype), noise(rows, seed=2)
    torch.autograd.backward([z, kl], [dz.to(device), dkl.to(device)])

    unit_z, _ = latent.sample(torch.zeros(shape, device=device), torch.zeros(shape, device=device), seed)
    eps = unit_z.double().cpu()

    def twin(kind: torch.dtype) -> list[Tensor]:
        mean, log = (half.to(kind).requires_grad_() for half in both.chunk(2, 1))
        sample = mean + (0.5 * log).exp() * eps.to(kind)
        divergence = reference.divergence(mean, log)
        torch.autograd.backward([sample, divergence], [dz.to(kind), dkl.to(divergence.dtype)])
        return [sample, divergence, mean.grad, log.grad]

    names = ("z", "kl", "mu", "logvar")
    ours, plain, exact = (
        Run({name: value.detach().double().cpu() for name, value in zip(names, values, strict=True)})
        for values in ([z, kl, mu.grad, logvar.grad], twin(dtype), twin(torch.float64))
    )
    assert_as_exact(ours, plain, exact, cut_off=device == "cpu" and dtype is torch.bfloat16)


def test_noise_is_standard_normal_and_independent_across_calls(device: str) -> None:
    zeros = torch.zeros(300, 128, device=device)
    torch.manual_seed(0)
    first, second = (reparameterize(zeros, zeros, kernels="triton")[0].double().cpu() for _ in range(2))
    count = first.numel()
    for eps in (first, second):
        # Mean, variance, skewness and kurtosis within four standard errors.
        assert abs(float(eps.mean())) < 4 / count**0.5
        assert abs(float(eps.var()) - 1) < 4 * (2 / count) ** 0.5
        assert abs(float((eps**3).mean())) < 4 * (15 / count) ** 0.5
        assert abs(float((eps**4).mean()) - 3) < 4 * (96 / count) ** 0.5
        distance = (eps.flatten().sort().values.mul(0.5**0.5).erf() / 2 + 0.5) - torch.arange(count) / count
        assert float(distance.abs().max()) < 1.95 / count**0.5  # Kolmogorov-Smirnov, 0.1 %
    for one, other in ((first, second), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:])):
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5


def test_the_seed_decides_the_noise(device: str) -> None:
    zeros = torch.zeros(4, 9, device=device)

    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [reparameterize(zeros, zeros, kernels="triton")[0] for _ in range(2)]

    assert all(torch.equal(one, other) for one, other in zip(draw(5), draw(5), strict=True))
    assert not torch.equal(draw(5)[0], draw(6)[0])
    generator = torch.Generator(device).manual_seed(5)
    assert torch.equal(draw(5)[0], reparameterize(zeros, zeros, generator, kernels="triton")[0])


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_share_of_a_batch_gets_the_noise_that_it_has_in_the_whole(kernels: selection.Kernels, device: str) -> None:
    """And in the backward the same: logvar's gradient is noise / 2 here."""

    def draw(mu: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        logvar = torch.zeros_like(mu).requires_grad_()
        torch.manual_seed(3)
        z, _ = reparameterize(mu, logvar, rows=rows, kernels=kernels)
        z.sum().backward()
        assert logvar.grad is not None
        return z.detach(), logvar.grad

    z, gradient = draw(torch.zeros(9, 5, device=device), (0, 1))
    for first in range(3):
        part, part_gradient = draw(torch.zeros(3, 5, device=device), (first, 3))
        assert torch.equal(part, z[first::3])
        assert torch.equal(part_gradient, gradient[first::3])
    assert not torch.equal(z[0::3], z[1::3])


def test_an_unused_infinite_divergence_does_no_harm(device: str) -> None:
    mu = torch.zeros(2, 3, device=device, requires_grad=True)
    logvar = torch.full((2, 3), 100.0, device=device, requires_grad=True)
    z, kl = reparameterize(mu, logvar, kernels="triton")
    assert bool(kl.isinf().all())
    z.sum().backward()
    assert bool(logvar.grad.isfinite().all())


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_loss_takes_the_divergence_that_came_with_the_sample(kernels: selection.Kernels, device: str) -> None:
    mu, logvar = noise(3, 5).to(device), noise(3, 5, seed=1).to(device)
    _, kl = reparameterize(mu, logvar, kernels=kernels)
    torch.testing.assert_close(kl.mean(), kl_divergence(mu, logvar))
    images = torch.rand(3, 1, 4, 4, device=device)
    outputs = [VAEOutput(images, mu, logvar), VAEOutput(images, mu, logvar, kl), VAEOutput(images, mu, logvar, 2 * kl)]
    without, with_it, twice = (defense_vae_loss(output, images, 3.0) for output in outputs)
    torch.testing.assert_close(with_it, without)
    torch.testing.assert_close(twice - with_it, 3 * kl.mean())
    assert torch.equal(*(defense_vae_loss(output, images, 0.0) for output in outputs[1:]))


# Registration


def samples(device: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every operation with arguments for it."""
    x = channels_last(noise(2, 5, 3, 4)).to(device)
    weight, bias, mean, variance = ((1 + noise(5, seed=seed).abs()).to(device) for seed in range(4))
    yield bn_relu.batch_statistics, (x, mean.clone(), variance.clone(), torch.tensor(3, device=device), 0.1)
    yield bn_relu.batch_statistics, (x, None, None, None, None)
    for given, batch in ((x, True), (x.contiguous(), False), (x[..., ::2], True)):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (given, weight, bias)]
        yield bn_relu.normalize_relu, (*leaves, mean, variance, 1e-5, batch)
    dy, sums = torch.ones_like(x), torch.ones(2, 5, device=device)
    yield bn_relu.normalize_relu_sums, (dy, x, weight, bias, mean, variance, 1e-5)
    yield bn_relu.normalize_relu_input_gradient, (dy, x, weight, bias, mean, variance, 1e-5, sums)
    yield bn_relu.normalize_relu_input_gradient, (dy, x, None, None, mean, variance, 1e-5, None)
    mu, logvar = (noise(3, 5, seed=seed).to(device).requires_grad_() for seed in range(2))
    seed = torch.tensor(5, device=device)
    yield latent.sample, (mu, logvar, seed)
    yield latent.sample_backward, (mu.detach(), None, mu.detach(), logvar.detach(), seed)


def test_opcheck(device: str) -> None:
    names = set()
    for operation, arguments in samples(device):
        torch.library.opcheck(operation, arguments)
        names.add(operation._name)
    assert len(names) == 6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str, device: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm("triton", 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            z, kl = reparameterize(y.flatten(1), x.flatten(1), kernels="triton")
            return z, kl

    x = noise(3, 4, 2, 5).to(device)
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        module = Both().to(device)
        call = torch.compile(module, fullgraph=True, backend=backend) if compiled else module
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        z, kl = call(leaf)
        (z.sum() + kl.sum()).backward()
        results.append([z, kl, leaf.grad, *(parameter.grad for parameter in module.parameters()), *module.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_and_checkpointing(device: str) -> None:
    convolution = nn.Conv2d(2, 4, 3, bias=False).to(device)
    module = norm("triton", 4, device)

    def forward(x: Tensor) -> Tensor:
        y = module(convolution(x))
        assert y.dtype is torch.bfloat16
        z, kl = reparameterize(y.flatten(1), y.flatten(1), kernels="triton")
        return z.float().sum() + kl.sum()

    gradients = []
    for checkpointed in (False, True):
        convolution.zero_grad()
        torch.manual_seed(0)
        x = noise(3, 2, 5, 5).to(device)
        with torch.autocast(device, torch.bfloat16):
            call = torch.utils.checkpoint.checkpoint
            result = call(forward, x, use_reentrant=False) if checkpointed else forward(x)
        result.backward()
        gradients.append(convolution.weight.grad.clone())
    assert torch.equal(*gradients)


# Selection


def test_auto_on_the_cpu_is_plain_torch_to_the_bit() -> None:
    x = noise(3, 5, 4, 4)
    module, theirs = norm("auto", 5), nn.BatchNorm2d(5)
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(module(x), theirs(x).relu())
    torch.manual_seed(0)
    z, _ = reparameterize(x[0, 0], x[0, 1])
    torch.manual_seed(0)
    assert torch.equal(z, x[0, 0] + torch.exp(0.5 * x[0, 1]) * torch.randn(4, 4))


def test_what_was_asked_for_and_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (lambda: BatchNormReLU2d(3, kernels="cuda"), lambda: DefenseVAE(kernels="cuda")):
        with pytest.raises(ValueError, match="kernels: expected one of auto, triton, torch, got 'cuda'"):
            make()
    with pytest.raises(RuntimeError, match=r"expected float32, float16 or bfloat16, got torch.float64"):
        norm("triton", 3)(noise(2, 3, 4, 4).double())
    selection.unavailable.cache_clear()
    try:
        monkeypatch.setattr(selection, "_interpreted", lambda: False)
        with pytest.raises(RuntimeError, match="expected tensors on a CUDA device, got cpu"):
            norm("triton", 3)(noise(2, 3, 4, 4))
        selection.unavailable.cache_clear()
        monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r"pip install 'defense-vae-fast\[triton\]'.*kernels='torch'"):
            reparameterize(noise(2, 3), noise(2, 3), kernels="triton")
        assert not selection.use_triton("auto", "cuda", torch.float16)
    finally:
        selection.unavailable.cache_clear()


def test_auto_takes_triton_on_cuda_and_leaves_it_where_it_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selection, "_interpreted", lambda: False)
    monkeypatch.setattr(selection, "unavailable", lambda device_type: None)
    assert selection.use_triton("auto", "cuda", torch.float16)
    assert not selection.use_triton("auto", "cuda", torch.float64)
    assert not selection.use_triton("torch", "cuda", torch.float16)
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("the rest is for a machine on which CUDA fails")
    selection.unavailable.cache_clear()
    try:
        assert not selection.use_triton("auto", "cuda", torch.float16)
        assert not selection.use_triton("auto", "cuda", torch.float16)
    finally:
        selection.unavailable.cache_clear()
    assert [record.message.startswith("fused kernels are off") for record in caplog.records] == [True]


def test_triton_stays_out_until_it_is_needed() -> None:
    code = (
        "import sys, torch; from defense_vae_fast.nn.model import DefenseVAE; "
        "DefenseVAE()(torch.rand(2, 1, 28, 28)).logits.sum().backward(); "
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Process groups


def test_statistics_of_all_ranks(tmp_path: Path) -> None:
    """Two gloo processes with batches of three and two images do what one does with all five."""
    script = Path(__file__).with_name("two_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(ROOT), "TRITON_INTERPRET": "1"}
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)], env=environment, cwd=tmp_path)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


# Compiled without a GPU


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every kernel for every architecture, and what each uses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kernel_resources.py")],
        env={**environment, "PYTHONPATH": python_path(ROOT)}, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_compiles_to_a_cubin_without_spills(architecture: int, compiled: list[dict[str, Any]]) -> None:
    mine = [entry for entry in compiled if entry["architecture"] == architecture]
    kernels = {
        name for module in (bn_relu, latent) for name in vars(module) if name.endswith("_kernel")
    }  # fmt: skip
    assert {entry["kernel"] for entry in mine} == kernels
    for entry in mine:
        assert entry["cubin"] > 1000, entry
        assert entry["stack"] == entry["local"] == 0, entry
        assert entry["registers"] <= 128, entry
