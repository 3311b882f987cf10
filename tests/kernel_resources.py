"""Compile every kernel for every GPU architecture, without a GPU, and print what each uses as JSON.

A program of its own: Triton decides when a kernel is defined whether it will be interpreted or compiled, and the tests
that start this one interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from defense_vae_fast.nn.kernels import bn_relu, reparameterize

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Which arguments are what; the others are int32.
DATA = {"x", "y", "dy", "dx", "mu", "logvar", "z", "dz", "dmu", "dlogvar"}
FLOAT_VECTORS = {
    "partials", "mean", "variance", "running_mean", "running_variance", "weight", "bias", "sums", "kl", "dkl",
}  # fmt: skip
INT_SCALARS = {"batches", "seed"}  # on the device
FLOATS = {"epsilon", "momentum"}


def layout(shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format) -> dict[str, Any]:
    """Compile-time arguments for a tensor of a shape, as the launcher chooses them."""
    return bn_relu.Shape.of(torch.empty(shape, device="meta").contiguous(memory_format=memory_format)).constants


LAYOUTS = {
    "channels_last": layout((256, 64, 28, 28), torch.channels_last),
    "contiguous": layout((256, 64, 28, 28)),
    "wide": layout((64, 64, 1024, 1024)),
}
TENSOR_KERNELS: dict[Any, dict[str, Any]] = {
    bn_relu.statistics_kernel: {},
    bn_relu.normalize_kernel: {"AFFINE": True},
    bn_relu.gradient_sums_kernel: {"AFFINE": True},
    bn_relu.input_gradient_kernel: {"AFFINE": True, "BATCH": True},
}
VECTOR_KERNELS: dict[Any, dict[str, Any]] = {
    bn_relu.merge_statistics_kernel: {
        "TRACKED": True, "CUMULATIVE": False, "COUNTED": True, "BLOCKS": bn_relu.MAX_BLOCKS,
        **bn_relu.MERGE_OPTIONS,
    },
    bn_relu.merge_sums_kernel: {"BLOCKS": bn_relu.MAX_BLOCKS, **bn_relu.MERGE_OPTIONS},
}  # fmt: skip
LATENT_KERNELS: dict[Any, dict[str, Any]] = {
    reparameterize.sample_kernel: {},
    reparameterize.sample_backward_kernel: {"SAMPLED": True, "DIVERGED": True},
}
PLAIN = {"weight": None, "bias": None, "AFFINE": False}
WITHOUT_OPTIONAL: dict[Any, dict[str, Any]] = {
    bn_relu.normalize_kernel: PLAIN,
    bn_relu.gradient_sums_kernel: PLAIN,
    bn_relu.input_gradient_kernel: {**PLAIN, "sums": None, "BATCH": False},
    bn_relu.merge_statistics_kernel: {
        "running_mean": None, "running_variance": None, "batches": None, "TRACKED": False, "CUMULATIVE": True,
        "COUNTED": False,
    },
    reparameterize.sample_backward_kernel: {
        "dkl": None, "DIVERGED": False, "SAMPLED": True, **reparameterize.tile(128),
    },
}  # fmt: skip
KERNELS = {**TENSOR_KERNELS, **VECTOR_KERNELS, **LATENT_KERNELS}


def cases() -> Iterator[tuple[Any, int, str, str, dict[str, Any]]]:
    """(kernel, architecture, dtype, variant, constants): the training's own case everywhere, others on two."""
    for architecture in ARCHITECTURES:
        for kernel, constants in TENSOR_KERNELS.items():
            yield kernel, architecture, "fp16", "channels_last", {**constants, **LAYOUTS["channels_last"]}
        for kernel, constants in VECTOR_KERNELS.items():
            yield kernel, architecture, "fp32", "vectors", constants
        for kernel, constants in LATENT_KERNELS.items():
            yield kernel, architecture, "fp16", "128", {**constants, **reparameterize.tile(128)}
    for architecture, dtype, variant in (
        (75, "bf16", "contiguous"), (90, "fp32", "channels_last"), (90, "fp32", "wide"),
    ):  # fmt: skip
        for kernel, constants in TENSOR_KERNELS.items():
            yield kernel, architecture, dtype, variant, {**constants, **LAYOUTS[variant]}
    for kernel, constants in WITHOUT_OPTIONAL.items():
        rest = LAYOUTS["channels_last"] if kernel in TENSOR_KERNELS else KERNELS[kernel]
        yield kernel, 90, "fp16", "without optional arguments", {**rest, **constants}
    for kernel, constants in LATENT_KERNELS.items():
        shape = reparameterize.tile(reparameterize.MAX_LATENT)
        yield kernel, 90, "fp32", str(reparameterize.MAX_LATENT), {**constants, **shape}


def resources(kernel: Any, architecture: int, dtype: str, constants: dict[str, Any]) -> dict[str, int]:
    """Registers a thread, stack and local memory in bytes, as the assembler wrote them into the cubin."""
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in DATA:
            return f"*{dtype}"
        if name in FLOAT_VECTORS:
            return "*fp32"
        if name in INT_SCALARS:
            return "*i64"
        return "fp32" if name in FLOATS else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    # What the launcher finds out about the arguments of the training: addresses and sizes are multiples of 16.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, given in enumerate(signature.values())
        if given.startswith("*") or given == "i32"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert found is not None, listing
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "local": local, "cubin": len(compiled.asm["cubin"])}


def main() -> None:
    """Print a list with one entry a case."""
    found = []
    for kernel, architecture, dtype, variant, constants in cases():
        used = resources(kernel, architecture, dtype, constants)
        name = kernel.fn.__name__
        found.append({"kernel": name, "architecture": architecture, "dtype": dtype, "variant": variant, **used})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
