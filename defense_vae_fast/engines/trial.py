"""Fixed images on which an engine's numbers are compared with float32 before it is trusted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def trial_images(shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Four fixed uint8 images of ``shape`` (H, W, C): a bright box on black, a ramp, that box in noise, noise alone."""
    height, width, _ = shape
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    box = np.zeros(shape, np.uint8)
    box[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 200
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], shape)
    noisy = np.clip(box + (noise.astype(np.int16) - 128) // 2, 0, 255).astype(np.uint8)
    return np.stack([box, ramp, noisy, noise])
