"""The purifier as a Ray Serve deployment: ``pip install 'defense-vae-fast[ray]'``.

::

    serve run defense_vae_fast.integrations.ray_serve:app checkpoint=fashion_mnist max_delay_ms=2

Over HTTP an image file goes in and a PNG file comes out, its score in the header ``Defense-VAE-Score``::

    curl --data-binary @shoe.png http://127.0.0.1:8000/ -o clean.png

From other deployments, ``await handle.purify.remote(pixels)`` takes and gives uint8 (H, W, C) arrays. Requests share
batches; one that cannot be purified fails alone, before it joins one.
"""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from defense_vae_fast.engines.base import DEFAULT_MAX_BATCH
from defense_vae_fast.files import decode_image
from defense_vae_fast.purifier import Purifier

Pixels = npt.NDArray[np.uint8]

SCORE_HEADER = "Defense-VAE-Score"
_OVERHEAD = 1 << 20  # bytes that a file may have beyond its pixels


@dataclass(frozen=True)
class Settings:
    """Of a deployment.

    Attributes:
        checkpoint: a shipped name or a path that the replicas can read.
        engine, precision, device: of a Purifier.
        max_batch: most images of a batch.
        max_delay_ms: how long a request waits for others to share a batch with.
    """

    checkpoint: str = "fashion_mnist"
    engine: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    max_batch: int = DEFAULT_MAX_BATCH
    max_delay_ms: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_delay_ms <= 60_000:
            raise ValueError(f"max_delay_ms: expected 0 to 60000, got {self.max_delay_ms!r}")


@serve.deployment(max_ongoing_requests=256)
class PurifierDeployment:
    """One Purifier a replica; see the module. Options of the deployment are set with ``.options(...)``."""

    def __init__(self, settings: Settings) -> None:
        self._purifier = Purifier.from_pretrained(
            settings.checkpoint,
            engine=settings.engine,
            precision=settings.precision,
            device=settings.device,
            max_batch=settings.max_batch,
        )
        self._purifier.warmup()
        channels, height, width = self._purifier.config.image_shape
        self._shape = (height, width, channels)
        self._sizes: Counter[int] = Counter()
        self._largest = 4 * channels * height * width + _OVERHEAD
        self._batched.set_max_batch_size(settings.max_batch)
        self._batched.set_batch_wait_timeout_s(settings.max_delay_ms / 1000)

    async def purify(self, pixels: Pixels) -> tuple[Pixels, float]:
        """One uint8 (H, W, C) image -> the purified one and its score.

        Raises:
            TypeError, ValueError: another dtype or shape.
        """
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            got = getattr(pixels, "dtype", type(pixels).__name__)
            raise TypeError(f"pixels: expected a uint8 array, got {got}; convert it first")
        if pixels.shape != self._shape:
            raise ValueError(f"pixels: expected the shape {self._shape}, got {pixels.shape}; resize it first")
        answer: tuple[Pixels, float] = await self._batched(pixels)
        return answer

    @serve.batch  # type: ignore[untyped-decorator]  # one image in, one answer out, for those who call it
    async def _batched(self, images: list[Pixels]) -> list[tuple[Pixels, float]]:
        self._sizes[len(images)] += 1
        # In a thread, so that the next batch gathers meanwhile.
        purified, scores = await asyncio.to_thread(self._purifier, np.stack(images), True)
        return [(image.copy(), float(score)) for image, score in zip(purified, scores, strict=True)]

    def batch_sizes(self) -> dict[int, int]:
        """How many batches of each size this replica has purified; whether sharing them pays."""
        return dict(self._sizes)

    async def __call__(self, request: Request) -> Response:
        """An image file in the body -> a PNG file."""
        if request.method != "POST":
            return _error(405, f"expected POST with an image file, got {request.method}")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._largest:
                return _error(413, f"expected an image file of at most {self._largest} bytes, got more")
        try:
            pixels = decode_image(bytes(body), self._purifier.config)
        except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error and more for damaged files
            return _error(400, " ".join(str(error).split()) or type(error).__name__)
        purified, score = await self.purify(np.ascontiguousarray(pixels))
        file = io.BytesIO()
        Image.fromarray(purified[:, :, 0] if purified.shape[2] == 1 else purified).save(file, format="PNG")
        return Response(file.getvalue(), media_type="image/png", headers={SCORE_HEADER: f"{score:.9g}"})

    def check_health(self) -> None:
        """Purify a black image, as Serve asks from time to time.

        Raises:
            RuntimeError: the engine no longer works.
        """
        self._purifier(np.zeros(self._shape, np.uint8))


def app(settings: dict[str, Any]) -> serve.Application:
    """The application for ``serve run`` and ``serve.run``.

    Args:
        settings: of :class:`Settings`, by name; numbers may be strings, as the command line gives them.

    Raises:
        TypeError, ValueError: an unknown setting, or a value that it does not take.
    """
    known = {name: type(default)(settings[name]) for name, default in vars(Settings()).items() if name in settings}
    if unknown := sorted(set(settings) - set(known)):
        raise TypeError(f"expected settings among {', '.join(vars(Settings()))}, got {unknown[0]!r}")
    return PurifierDeployment.bind(Settings(**known))  # type: ignore[attr-defined]


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
