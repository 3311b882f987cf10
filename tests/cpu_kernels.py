"""The kernels of csrc/ compiled by the C++ compiler, as functions on NumPy arrays."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
REGISTERS = 64  # with 256 threads a block, four blocks share the 65,536 registers of a multiprocessor
_SHIM = Path(__file__).parent / "cuda_on_cpu"


def compiled(source: Path, folder: Path) -> ctypes.CDLL:
    """A file of csrc/ behind the C functions of the file of its name in cuda_on_cpu/; skips without such a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernels for the CPU with")
    probe = folder / "probe.cpp"
    probe.write_text("#include <barrier>\nint main() { _Float16 half = 1; return static_cast<int>(half) - 1; }")
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-fPIC", "-shared", "-w"]
    if subprocess.run([compiler, *options, "-o", folder / "probe.so", probe], capture_output=True).returncode:
        pytest.skip("this g++ has no _Float16 or no std::barrier")
    library, stem = folder / "kernels.so", source.stem
    command = [compiler, *options, f'-D{stem.upper()}_CU="{source}"', "-I", _SHIM, "-o", library, _SHIM / f"{stem}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def resources(report: str, name: str) -> SimpleNamespace:
    """What the assembler says that a kernel uses: registers, bytes of shared memory, and of the stack and spills."""
    (text,) = re.findall(rf"entry function '{name}'.*?Compile time", report, re.DOTALL)
    return SimpleNamespace(
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        shared=int((re.search(r"(\d+) bytes smem", text) or [0, 0])[1]),
        stack=list(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", text))),
    )
