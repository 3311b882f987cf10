"""CUDA through PyCUDA: the primary context, streams, pinned and device memory, graphs, and the kernels of ``csrc/``.

PyCUDA makes contexts, streams, memory, copies and launches. What it lacks, graphs and events on a caller's stream, is
called in NVIDIA's own bindings (``cuda.bindings.driver``); the kernels are compiled by NVRTC through ``cuda.core``. No
module here is imported before it is needed, and the kernels compile on a machine without any GPU. Kernels that run on
arrays and streams of a caller's library need neither (:class:`Kernels`), so that they work without PyCUDA.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib.util
import io
import json
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from defense_vae_fast import cache
from defense_vae_fast.atomic import replacing

EXTRA = "cuda"
# Device code lies in the installed package, or at the top of a checkout.
_HERE = Path(__file__).parent
_SOURCES = (_HERE if (_HERE / "csrc").is_dir() else _HERE.parent) / "csrc"
FRAMES = _SOURCES / "frames.cu"
REGIONS = _SOURCES / "regions.cu"
KERNELS = {
    FRAMES: ("gather_frames", "scatter_frames", "reconstruction_error"),
    REGIONS: ("crop_boxes", "paste_boxes", "blend_tiles"),
}
"""Files of device code, and the kernels in each."""
BLOCK = 256
"""Threads in a block of every kernel, as their launch bounds say."""
_CAPABILITY_ATTRIBUTES = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class CudaError(RuntimeError):
    """A CUDA call failed; the message has its name and the driver's word for the error."""


class CudaMemoryError(CudaError):
    """The GPU's memory is full."""


class CompileError(RuntimeError):
    """NVRTC refused the kernels; the message has its log."""


def missing() -> str | None:
    """None when this machine has a GPU that PyCUDA reaches, otherwise what is missing."""
    install = f"install it with: pip install 'defense-vae-fast[{EXTRA}]'"
    for module, package in (("cuda.bindings", "cuda-bindings"), ("pycuda", "pycuda")):
        if not _installed(module):
            return f"the package {package} is not installed; {install}"
    if reason := driver_missing():
        return reason
    try:
        import pycuda.driver as driver

        driver.init()
        count = driver.Device.count()
    except Exception as error:  # a missing library is an ImportError, a driver without a device pycuda's own
        return f"PyCUDA does not work here ({error})"
    return None if count else "there is no CUDA device"


class Description(NamedTuple):
    """What the driver says of a GPU; ``memory`` is in bytes, ``driver_version`` the CUDA version that it supports."""

    name: str
    compute_capability: str
    memory: int
    driver_version: str


@functools.cache
def devices() -> tuple[Description, ...]:
    """The GPUs that this process sees; asks the driver's library alone, no package."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return ()
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    library.cuDriverGetVersion(ctypes.byref(version))
    found = []
    for ordinal in range(count.value):
        device, name, memory = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
        library.cuDeviceGet(ctypes.byref(device), ordinal)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = [ctypes.c_int(0), ctypes.c_int(0)]
        for value, attribute in zip(capability, _CAPABILITY_ATTRIBUTES, strict=True):
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        text = ".".join(str(value.value) for value in capability)
        found.append(Description(name.value.decode(), text, memory.value, _cuda_version(version.value)))
    return tuple(found)


def has_device() -> bool:
    """Whether an NVIDIA driver with a device is here."""
    return bool(devices())


def _cuda_version(number: int) -> str:
    """13020 -> "13.2"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_missing() -> str | None:
    """None when an NVIDIA driver answers, otherwise that there is none; needs cuda-bindings."""
    try:
        from cuda.bindings import driver

        (result,) = driver.cuInit(0)
    except Exception as error:  # cuda-pathfinder's own error where there is no libcuda
        return f"there is no NVIDIA driver ({type(error).__name__}); install one for your GPU"
    return None if int(result) == 0 else f"the NVIDIA driver does not start ({_error_name(driver, result)})"


def current_ordinal() -> int:
    """The device whose context is current in this thread (torch's or CuPy's choice), or the first."""
    from cuda.bindings import driver

    driver.cuInit(0)
    error, ordinal = driver.cuCtxGetDevice()
    return int(ordinal) if int(error) == 0 else 0


def compute_capability(ordinal: int) -> str:
    """Such as "9.0", without a context."""
    return devices()[ordinal].compute_capability


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


class Closable(Protocol):
    """What holds GPU memory and must let go of it before the context does."""

    def close(self) -> None:
        """Free everything."""


class Device:
    """One GPU, by its primary context, which torch, CuPy and TensorRT share.

    As a context manager it makes that context current in this thread; every call into CUDA happens inside.

    Attributes:
        ordinal: number among the visible devices.
        name: the GPU's own name.
        compute_capability: such as "9.0".
        driver_version: the CUDA version that the driver supports, such as "13.0".
    """

    def __init__(self, ordinal: int) -> None:
        import pycuda.driver as driver

        driver.init()
        device = driver.Device(ordinal)
        self.driver: Any = driver
        self.ordinal = ordinal
        self.name = str(device.name())
        self.compute_capability = "{}.{}".format(*device.compute_capability())
        self.driver_version = _cuda_version(int(driver.get_driver_version()))
        # Not a context of our own: memory of one context is not another's, and each costs some 300 MB.
        self._context = device.retain_primary_context()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._modules: dict[str, Any] = {}
        self._loading = threading.Lock()
        atexit.register(self._leave_at_exit)

    @staticmethod
    @functools.cache
    def get(ordinal: int) -> Device:
        """The one object for a GPU: PyCUDA compares contexts by the object, so there must be no second."""
        return Device(ordinal)

    def __enter__(self) -> Device:
        self._context.push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.driver.Context.pop()

    def free_memory(self) -> tuple[int, int]:
        """Free and total bytes of device memory."""
        with self:
            free, total = self.driver.mem_get_info()
        return int(free), int(total)

    def sticky_error(self) -> str | None:
        """The error that every further call in this process will meet, or None: most errors pass, this one stays."""
        from cuda.bindings import driver

        with self:
            (error,) = driver.cuCtxSynchronize()
        return None if int(error) == 0 else _error_name(driver, error)

    def kernel(self, name: str, arguments: str) -> Any:
        """A kernel of ``csrc/frames.cu``, prepared for ``prepared_async_call`` with arguments of these struct codes."""
        with self._loading, self:
            if "frames" not in self._modules:
                self._modules["frames"] = self.driver.module_from_buffer(kernels(FRAMES, self.compute_capability))
            function = self._modules["frames"].get_function(name)
        return function.prepare(arguments)

    def add_user(self, user: Closable) -> None:
        """Close ``user`` before the context goes when the interpreter ends."""
        self._users.add(user)

    def _leave_at_exit(self) -> None:
        for user in list(self._users):
            user.close()
        with self:
            self._modules.clear()
        # By name: left to its destructor, PyCUDA releases a primary context by the call for ordinary ones.
        self._context.detach()


class Memory:
    """Device and pinned memory that is freed together; use inside the device's context.

    Addresses of device memory are aligned to 256 bytes, as CUDA gives them. It is zeroed in the order of ``stream``,
    the only one that may use it: others would not wait for that.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._allocations: list[Any] = []
        self._pinned: list[Any] = []

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes of device memory, zeroed.

        Raises:
            CudaMemoryError: there is not enough.
        """
        driver = self._device.driver
        try:
            allocation = driver.mem_alloc(max(size, 1))
            self._allocations.append(allocation)
            driver.memset_d8_async(int(allocation), 0, max(size, 1), self._stream.pycuda)
        except driver.MemoryError as error:
            raise CudaMemoryError(f"{size} bytes of device memory: {error}") from error
        return int(allocation)

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A zeroed array in page-locked memory, from and to which copies run beside computing.

        Raises:
            CudaMemoryError: there is not enough.
        """
        driver = self._device.driver
        try:
            array: npt.NDArray[Any] = driver.pagelocked_empty(shape, dtype)
        except driver.MemoryError as error:
            raise CudaMemoryError(f"pinned memory for {shape} {np.dtype(dtype)}: {error}") from error
        self._pinned.append(array.base)
        array[...] = 0
        return array

    def free(self) -> None:
        """Give everything back; arrays and addresses from here are dead afterwards."""
        for allocation in (*self._allocations, *self._pinned):
            allocation.free()
        self._allocations.clear()
        self._pinned.clear()


class Stream:
    """A stream that does not wait for the default one; use inside the device's context.

    Attributes:
        handle: the CUstream as an integer.
        pycuda: the object that PyCUDA's functions take.
    """

    def __init__(self, device: Device) -> None:
        from cuda.bindings import driver

        self._cuda = driver
        self.pycuda: Any = device.driver.Stream(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.handle = int(self.pycuda.handle)

    def synchronize(self) -> None:
        """Wait for the end of what was queued, without holding the interpreter's lock."""
        self.pycuda.synchronize()

    def capture(self, queue: Callable[[], None]) -> Graph:
        """Record what ``queue`` queues on this stream, without running it. It has run once before, uncaptured."""
        cuda, stream = self._cuda, self._cuda.CUstream(self.handle)
        # Thread-local: what other threads allocate or copy meanwhile is not our graph's concern.
        self._call(cuda.cuStreamBeginCapture, stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            queue()
        except BaseException:
            cuda.cuStreamEndCapture(stream)  # or the stream would stay in capture
            raise
        graph = self._call(cuda.cuStreamEndCapture, stream)
        try:
            executable = self._call(cuda.cuGraphInstantiate, graph, 0)
        finally:
            cuda.cuGraphDestroy(graph)
        return Graph(cuda, executable, stream)

    def free(self) -> None:
        """Destroy the stream, which must be idle."""
        del self.pycuda

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return call(self._cuda, function, *arguments)


def order(first: int, then: int) -> None:
    """What the stream ``then`` is given from now on waits for what the stream ``first`` holds now; no host waits.

    Both are handles, 0 being the default stream; of the context that is current.
    """
    from cuda.bindings import driver

    event = call(driver, driver.cuEventCreate, int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    try:
        call(driver, driver.cuEventRecord, event, driver.CUstream(first))
        call(driver, driver.cuStreamWaitEvent, driver.CUstream(then), event, 0)
    finally:
        driver.cuEventDestroy(event)  # takes effect once the event has passed


class Graph:
    """A captured piece of work, launched in one call."""

    def __init__(self, cuda: Any, executable: Any, stream: Any) -> None:
        self._cuda, self._executable, self._stream = cuda, executable, stream

    def launch(self) -> None:
        """Queue it on the stream that it was captured from."""
        call(self._cuda, self._cuda.cuGraphLaunch, self._executable, self._stream)

    def free(self) -> None:
        """Destroy it; it must not be running."""
        call(self._cuda, self._cuda.cuGraphExecDestroy, self._executable)


class Kernels:
    """The kernels of a file on one GPU, launched on whichever stream of its primary context.

    Attributes:
        ordinal: number of the GPU among the visible ones.
    """

    def __init__(self, ordinal: int, source: Path) -> None:
        from cuda.bindings import driver

        self.ordinal = ordinal
        self._cuda = driver
        cubin = kernels(source, compute_capability(ordinal))
        call(driver, driver.cuInit, 0)
        # Kept until the process ends, as torch and CuPy keep it.
        self._context = call(driver, driver.cuDevicePrimaryCtxRetain, call(driver, driver.cuDeviceGet, ordinal))
        call(driver, driver.cuCtxPushCurrent, self._context)
        try:
            module = call(driver, driver.cuModuleLoadData, cubin)
            self._functions = {
                name: call(driver, driver.cuModuleGetFunction, module, name.encode()) for name in KERNELS[source]
            }
        finally:
            call(driver, driver.cuCtxPopCurrent)

    @staticmethod
    @functools.cache
    def get(ordinal: int, source: Path) -> Kernels:
        """The one object for a GPU and a file.

        Raises:
            CompileError: NVRTC is not installed or refuses the source.
            CudaError: there is no such GPU, or it does not load the kernels.
        """
        return Kernels(ordinal, source)

    def launch(self, name: str, grid: tuple[int, int], stream: int, *arguments: int | ctypes.c_void_p) -> None:
        """Queue a kernel with ``BLOCK`` threads a block on the stream of this handle; ints are C ints."""
        cuda = self._cuda
        values = tuple((value.value or 0) if isinstance(value, ctypes.c_void_p) else value for value in arguments)
        kinds = tuple(ctypes.c_void_p if isinstance(value, ctypes.c_void_p) else ctypes.c_int for value in arguments)
        call(cuda, cuda.cuCtxPushCurrent, self._context)
        try:
            call(
                cuda, cuda.cuLaunchKernel, self._functions[name], *grid, 1, BLOCK, 1, 1, 0, cuda.CUstream(stream),
                (values, kinds), 0,
            )  # fmt: skip
        finally:
            call(cuda, cuda.cuCtxPopCurrent)


def call(cuda: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of ``cuda.bindings.driver`` and give its one result, or None.

    Raises:
        CudaMemoryError, CudaError: it did not return CUDA_SUCCESS.
    """
    error, *results = function(*arguments)
    if int(error) != 0:
        full = error == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        kind = CudaMemoryError if full else CudaError
        raise kind(f"{function.__name__}: {_error_name(cuda, error)}")
    return results[0] if results else None


def kernels(source: Path, compute_capability: str) -> bytes:
    """The cubin of a file of ``csrc/`` for a compute capability, from the cache or compiled now.

    Raises:
        CompileError: NVRTC is not installed or refuses the source.
    """
    try:
        import cuda.core
        from cuda.bindings import nvrtc

        _, *version = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-pathfinder's own error where the library is missing
        raise CompileError(f"{error}; install NVRTC with: pip install 'defense-vae-fast[nvrtc]'") from error
    key = {
        "source": hashlib.sha256(source.read_bytes()).hexdigest(),
        "compute_capability": compute_capability,
        "nvrtc": ".".join(map(str, version)),
        "cuda-core": cuda.core.__version__,
    }
    stem = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache.folder("kernels") / f"{stem}.cubin"
    if (cubin := _cached(path, key)) is not None:
        return cubin
    cubin, _ = compile_kernels(source, compute_capability)
    path.with_suffix(".json").unlink(missing_ok=True)
    with replacing(path) as file:
        file.write(cubin)
    with replacing(path.with_suffix(".json")) as file:
        file.write(json.dumps({"key": key, "sha256": hashlib.sha256(cubin).hexdigest()}).encode())
    return cubin


def compile_kernels(source: Path, compute_capability: str) -> tuple[bytes, str]:
    """Compile a file of ``csrc/`` with NVRTC, which needs no GPU.

    Returns:
        The cubin, and the assembler's report of registers, shared memory and spills.

    Raises:
        CompileError: NVRTC or the CUDA headers are not installed, or the source is refused.
    """
    try:
        from cuda import pathfinder
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise CompileError(f"{error}; install NVRTC with: pip install 'defense-vae-fast[{EXTRA}]'") from error
    headers = pathfinder.find_nvidia_header_directory("cudart")
    if headers is None:
        raise CompileError(f"the CUDA headers are missing; install them with: pip install 'defense-vae-fast[{EXTRA}]'")
    options = ProgramOptions(
        name=source.name,
        arch=f"sm_{compute_capability.replace('.', '')}",
        std="c++17",
        include_path=[headers],
        ptxas_options="-v",
    )
    log = io.StringIO()
    try:
        code = Program(source.read_text(), "c++", options).compile("cubin", logs=log)
    except Exception as error:  # cuda.core's errors have no common class
        raise CompileError(f"{source.name} for {options.arch}: {error} {log.getvalue()}".strip(" \0\n")) from error
    return bytes(code.code), log.getvalue()


def _cached(path: Path, key: dict[str, Any]) -> bytes | None:
    try:
        header = json.loads(path.with_suffix(".json").read_bytes())
        if not isinstance(header, dict) or header.get("key") != key:
            return None
        cubin = path.read_bytes()
    except (OSError, ValueError, RecursionError):
        return None
    return cubin if hashlib.sha256(cubin).hexdigest() == header.get("sha256") else None


def _error_name(cuda: Any, error: Any) -> str:
    found, name = cuda.cuGetErrorName(error)
    return name.decode() if int(found) == 0 and name else str(error)
