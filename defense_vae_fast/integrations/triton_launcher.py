"""Triton Inference Server out of the wheel ``nvidia-pytriton``: ``pip install 'defense-vae-fast[triton-server]'``.

::

    python -m defense_vae_fast.integrations.triton_launcher models/ --http-port 8000

For machines without a container. The wheel's server has the Python backend alone, and runs with or without a GPU. It
ends with the program that started it, on SIGINT and SIGTERM after the requests under way.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_STUB = "triton_python_backend_stub"


class ServerUnavailable(RuntimeError):
    """The wheel's server cannot run here; the message names the missing piece."""


@contextmanager
def running(
    repository: str | os.PathLike[str], options: Sequence[str] = (), *, log: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a process of its own, in a process group of its own, ended with the block.

    Args:
        repository: a model repository.
        options: of ``tritonserver``, such as "--http-port=8000".
        log: file descriptor of what the server prints; None for this program's own.

    Raises:
        ServerUnavailable: the wheel is not installed, or has no backend for this Python.
        FileNotFoundError: ``repository`` is no folder.
    """
    if not Path(repository).is_dir():
        raise FileNotFoundError(f"{repository}: expected a model repository, found no such folder")
    package, libraries = _wheel()
    with tempfile.TemporaryDirectory(prefix="defense-vae-fast-triton-") as folder:
        backends = Path(folder)
        _gather_python_backend(package / "tritonserver", backends / "python")
        shared = f"defense_vae_fast_{backends.name[-8:]}_"  # memory that the backend shares with its Python processes
        command = [
            str(package / "tritonserver" / "bin" / "tritonserver"), f"--model-repository={repository}",
            f"--backend-directory={backends}", f"--backend-config=python,shm-region-prefix-name={shared}", *options,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=_environment(libraries), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            _end(process)
            for path in Path("/dev/shm").glob(f"{shared}*"):  # of a server that had to be killed
                path.unlink(missing_ok=True)


def _wheel() -> tuple[Path, Path]:
    """The wheel's package, which is not imported, and the folder of its libraries."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerUnavailable(
            "the package nvidia-pytriton is not installed; "
            "install it with: pip install 'defense-vae-fast[triton-server]'"
        )
    package = Path(spec.origin).parent
    return package, package.parent / "nvidia_pytriton.libs"


def _gather_python_backend(server: Path, folder: Path) -> None:
    """The Python backend with the stub for this version of Python beside it, where the backend looks for it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        known = ", ".join(sorted(path.parent.name for path in stub.parents[1].glob(f"*/{_STUB}")))
        raise ServerUnavailable(
            f"nvidia-pytriton: expected Python {known or 'of a version that it has'}, got {version}"
        )
    folder.mkdir()
    for path in (*(server / "backends" / "python").iterdir(), stub):
        if path.is_file():
            (folder / path.name).symlink_to(path)


def _environment(libraries: Path) -> dict[str, str]:
    # The stub embeds libpython, and finds this environment's packages through the python3 that is first in PATH.
    folders = [str(libraries), sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _end(process: subprocess.Popen[bytes], patience: float = 60.0) -> None:  # the server's own is 30 seconds
    """Ask the server to end, then make it: it is the leader of a process group that holds its backends too."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it ends or a signal asks for it; its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0].startswith("-"):
        print(f"usage: python -m {__spec__.name} REPOSITORY [OPTION OF tritonserver ...]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with running(words[0], words[1:]) as process:
            return process.wait()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ServerUnavailable, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
