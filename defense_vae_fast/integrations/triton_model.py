"""What runs inside Triton Inference Server's Python backend, by the ``model.py`` that :mod:`.triton_server` writes.

``triton_python_backend_utils`` exists in the server's own Python processes alone, so nothing else imports this module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as triton

from defense_vae_fast.checkpoint import load_checkpoint
from defense_vae_fast.integrations.triton_server import CHECKPOINT_FILE
from defense_vae_fast.onnx_graph import INPUT, PURIFIED, SCORE
from defense_vae_fast.purifier import Purifier

Array = npt.NDArray[Any]


class TritonPythonModel:
    """One Purifier; the requests that the server has gathered go through it as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint beside ``model.py`` and make everything ready.

        Raises:
            triton.TritonModelException: the checkpoint is not the one that the configuration was written for.
            EngineUnavailable: among others; the server reports the text and does not serve the model.
        """
        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        path = Path(args["model_repository"]) / args["model_version"] / CHECKPOINT_FILE
        checkpoint = load_checkpoint(path)
        if checkpoint.digest != parameters["digest"]:
            raise triton.TritonModelException(
                f"{path}: expected the checkpoint {parameters['digest']}, got {checkpoint.digest}; "
                "write the model again"
            )
        self._purifier = Purifier(
            checkpoint,
            engine=parameters["engine"],
            precision=parameters["precision"],
            max_batch=int(parameters["max_batch"]),
            name=args["model_name"],
        )
        self._purifier.warmup()
        state = self._purifier.info()
        triton.Logger.log_info(
            f"{args['model_name']}: {state['engine']} on {state['device']} in {state['precision']}, {state['why']}"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests, in their order. A request with images that cannot be purified fails alone."""
        batches = [triton.get_input_tensor_by_name(request, INPUT).as_numpy() for request in requests]
        try:
            purified, scores = self._purifier(_joined(batches), return_score=True)
        except (ValueError, TypeError):
            # The server has checked types and shapes, but not values, and not that there are any.
            return [self._answer_alone(batch) for batch in batches]
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [_response(*one) for one in zip(np.split(purified, ends), np.split(scores, ends), strict=True)]

    def finalize(self) -> None:
        """The server unloads the model."""
        self._purifier.close()

    def _answer_alone(self, batch: Array) -> Any:
        try:
            return _response(*self._purifier(batch, return_score=True))
        except (ValueError, TypeError) as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error), triton.TritonError.INVALID_ARG))


def _joined(batches: list[Array]) -> Array:
    return batches[0] if len(batches) == 1 else np.concatenate(batches)


def _response(purified: Array, scores: Array) -> Any:
    return triton.InferenceResponse([triton.Tensor(PURIFIED, purified), triton.Tensor(SCORE, scores)])
