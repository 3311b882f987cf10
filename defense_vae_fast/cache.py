"""The per-user cache: ONNX is cheap and not kept; TensorRT plans and compiled kernels are."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def folder(name: str) -> Path:
    """The folder ``name`` of the cache, made for this user alone.

    Raises:
        PermissionError: it belongs to another user, or others may write to it: what lies there could be anybody's.
    """
    path = platformdirs.user_cache_path("defense-vae-fast") / name
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        state = path.stat()
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise PermissionError(
                f"{path}: expected a folder that only this user (uid {os.getuid()}) may write to, got owner "
                f"{state.st_uid} and mode {state.st_mode & 0o777:o}; use chmod 700, or remove it"
            )
    return path
