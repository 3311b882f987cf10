"""The Purifier as its users see it, on real engines with a random network."""

from __future__ import annotations

import copy as copies
import json
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from hypothesis import given, settings
from PIL import Image
from test_images import COLOUR, FORMS, GRAY, VIEWS, arrays, pixels
from torch import nn

import defense_vae_fast
from defense_vae_fast import CheckpointError, Purifier, VAEConfig
from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from defense_vae_fast.engines import ENGINES

ROOT = Path(__file__).parents[1]
ENGINE_NAMES = [engine.name for engine in ENGINES if "cpu" in engine.devices]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def purifier(checkpoint: Checkpoint) -> Iterator[Purifier]:
    with Purifier(checkpoint, max_batch=8) as purifier:
        yield purifier


@pytest.fixture(scope="module")
def colour() -> Iterator[Purifier]:
    with Purifier(random_checkpoint(COLOUR, 4), max_batch=8) as purifier:
        yield purifier


def test_the_network_is_not_trivial(purifier: Purifier) -> None:
    """Every comparison of this file would hold for a constant answer, so the answers must differ."""
    one, other = purifier(pixels((28, 28), seed=1)), purifier(pixels((28, 28), seed=2))
    assert np.unique(one).size > 20
    assert (one != other).mean() > 0.1


@pytest.mark.parametrize(("config", "shape", "dtype", "single"), FORMS)
def test_numpy(
    purifier: Purifier, colour: Purifier, config: VAEConfig, shape: tuple[int, ...], dtype: str, single: bool
) -> None:
    purify = purifier if config == GRAY else colour
    images = pixels(shape, dtype)
    before = images.copy()
    result, score = purify(images, return_score=True)
    assert type(result) is np.ndarray
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(result, purify(images))
    if dtype != "u1":
        np.testing.assert_array_equal(result, purify(images.astype("f4")).astype(dtype))
    top = 255 if dtype == "u1" else 1
    by_hand = np.abs(images.astype("f8") - result).reshape(1 if single else len(images), -1).mean(axis=1) / top
    if single:
        assert type(score) is float
    else:
        assert (type(score), score.dtype, score.shape) == (np.ndarray, np.float32, (len(images),))
    # The engine takes the score before it rounds the images: by at most half a grey level, or half a float16 step.
    np.testing.assert_allclose(np.ravel(score), by_hand, atol=0.5 / 255 if dtype == "u1" else 3e-4)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", [((28, 28), "u1"), ((3, 1, 28, 28), "f4")], ids=["uint8", "float32"])
def test_memory_does_not_matter(purifier: Purifier, view: str, form: tuple[tuple[int, ...], str]) -> None:
    images = VIEWS[view](pixels(*form))
    plain = np.array(images, form[1], order="C", copy=True)
    np.testing.assert_array_equal(purifier(images), purifier(plain))


@settings(deadline=None, max_examples=100)
@given(array=arrays())
def test_any_array(purifier: Purifier, array: Array) -> None:
    before = array.tobytes()
    try:
        result = purifier(array)
    except (TypeError, ValueError) as error:
        message = str(error)
        with pytest.raises(type(error), match=r"^images: expected .*, got .*; .+") as again:
            purifier.submit(array)
        assert str(again.value) == message
    else:
        assert (result.shape, result.dtype) == (array.shape, array.dtype)
        plain = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
        np.testing.assert_array_equal(result, purifier(plain))
    assert array.tobytes() == before


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_torch(checkpoint: Checkpoint, engine: str, dtype: torch.dtype) -> None:
    array = pixels((3, 28, 28, 1)) if dtype == torch.uint8 else pixels((3, 1, 28, 28), "f4")
    images = torch.from_numpy(array).to(dtype)
    with Purifier(checkpoint, engine=engine) as purify:
        result, scores = purify(images, return_score=True)
        expected, expected_scores = purify(array, return_score=True)
        one, score = purify(images[0], return_score=True)
    if dtype == torch.bfloat16:  # these pixels lose bits on their way in
        assert (result.float().numpy() - expected).std() < 0.01
    else:
        assert torch.equal(result, torch.from_numpy(expected).to(dtype))
        np.testing.assert_array_equal(scores.numpy(), expected_scores)
    assert (type(result), result.dtype, result.shape) == (torch.Tensor, dtype, images.shape)
    assert (type(scores), scores.dtype, scores.shape) == (torch.Tensor, torch.float32, (3,))
    assert (one.dtype, one.shape, type(score)) == (dtype, images.shape[1:], float)


def test_pil(purifier: Purifier) -> None:
    array = pixels((3, 28, 28))
    images = [Image.fromarray(one) for one in array]
    one, score = purifier(images[0], return_score=True)
    assert type(one) is Image.Image
    assert type(score) is float
    np.testing.assert_array_equal(np.asarray(one), purifier(array[0]))
    for kind in (list, tuple):
        results, scores = purifier(kind(images), return_score=True)
        assert type(results) is kind
        np.testing.assert_array_equal(
            np.stack([np.asarray(one) for one in results]), purifier(array[..., None])[..., 0]
        )
        assert (type(scores), scores.dtype, scores.shape) == (np.ndarray, np.float32, (3,))


def test_results_belong_to_the_caller(purifier: Purifier) -> None:
    images = [pixels((28, 28), seed=seed) for seed in range(8)]
    results = [purifier(image) for image in images]
    copies = [result.copy() for result in results]
    for image in images:
        purifier(image)[...] = 7  # neither later calls nor writing may reach an earlier result
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)


@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_sixteen_threads(purifier: Purifier, dtype: str) -> None:
    counts = [1, 2, 3, 8, 13] * 8
    batches = [
        pixels((count, 28, 28, 1) if dtype == "u1" else (count, 1, 28, 28), dtype, seed)
        for seed, count in enumerate(counts)
    ]
    alone = [purifier(batch, return_score=True) for batch in batches]
    together = threading.Barrier(16)

    def work(thread: int) -> list[tuple[Array, Array]]:
        together.wait()
        order = np.random.default_rng(thread).permutation(len(batches))
        results = {index: purifier(batches[index], return_score=True) for index in order}
        return [results[index] for index in range(len(batches))]

    with ThreadPoolExecutor(16) as pool:
        for results in pool.map(work, range(16)):
            for (images, scores), (expected, expected_scores) in zip(results, alone, strict=True):
                np.testing.assert_array_equal(images, expected)
                np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_two_purifiers_agree(checkpoint: Checkpoint, engine: str) -> None:
    images = pixels((5, 28, 28, 1))
    results = []
    for _ in range(2):
        with Purifier(checkpoint, engine=engine) as purify:
            results.append(purify(images))
    np.testing.assert_array_equal(*results)


# submit


def test_submit(purifier: Purifier) -> None:
    for images in (
        pixels((28, 28)),
        pixels((9, 28, 28, 1)),
        pixels((1, 28, 28), "f8"),
        torch.rand(3, 1, 28, 28).half(),
    ):
        future = purifier.submit(images)
        assert isinstance(future, Future)
        result = future.result(60)
        assert (type(result), result.dtype, result.shape) == (type(images), images.dtype, images.shape)
        again, score = purifier.submit(images, return_score=True).result(60)
        assert np.array_equal(result, again)
        assert type(score) is type(purifier(images, return_score=True)[1])
        # A batch may be cut up in another way there, and then go through other kernels.
        np.testing.assert_allclose(
            np.asarray(result, "f8"), np.asarray(purifier(images), "f8"), atol=2 if result.dtype == np.uint8 else 0.02
        )
    image = Image.fromarray(pixels((28, 28)))
    assert type(purifier.submit(image).result(60)) is Image.Image
    assert type(purifier.submit([image] * 3).result(60)) is list


def test_submitted_memory_may_be_reused(purifier: Purifier) -> None:
    frame = np.empty((28, 28), np.uint8)
    frames = [pixels((28, 28), seed=seed) for seed in range(50)]
    futures = []
    for image in frames:
        frame[...] = image
        futures.append(purifier.submit(frame))
    expected = [purifier.submit(image).result(60) for image in frames]
    for future, result in zip(futures, expected, strict=True):
        np.testing.assert_array_equal(future.result(60), result)


def test_submit_from_a_callback(purifier: Purifier) -> None:
    """A pipeline that chains futures must not wait for itself."""
    second: Future[Future[Array]] = Future()
    image = pixels((28, 28))
    purifier.submit(image).add_done_callback(lambda done: second.set_result(purifier.submit(done.result())))
    expected = purifier.submit(purifier.submit(image).result(60)).result(60)
    np.testing.assert_array_equal(second.result(60).result(60), expected)


def test_submit_raises_at_once(purifier: Purifier) -> None:
    with pytest.raises(ValueError, match="got NaN"):
        purifier.submit(np.full((1, 28, 28), np.nan))
    with pytest.raises(TypeError, match="expected uint8"):
        purifier.submit(np.zeros((28, 28)).astype(int))


# Life


def test_close(checkpoint: Checkpoint) -> None:
    purify = Purifier(checkpoint)
    images = pixels((28, 28))
    futures = [purify.submit(images) for _ in range(20)]
    purify.close()
    purify.close()
    for future in futures:
        np.testing.assert_array_equal(future.result(0), futures[0].result(0))
    for call in (lambda: purify(images), lambda: purify.submit(images), purify.warmup):
        with pytest.raises(RuntimeError, match=r"expected an open Purifier, got a closed one; make another"):
            call()
    assert purify.info()["engine"]


def test_context_manager(checkpoint: Checkpoint) -> None:
    with Purifier(checkpoint) as purify:
        purify(pixels((28, 28)))
    with pytest.raises(RuntimeError, match="closed"):
        purify(pixels((28, 28)))


def test_warmup_leaves_nothing_to_compile(checkpoint: Checkpoint) -> None:
    with Purifier(checkpoint, engine="openvino", max_batch=64) as purify:
        purify.warmup()
        engine = purify._engine
        compiled = engine._lanes.copy()
        for shape in ((28, 28), *((count, 28, 28, 1) for count in (*range(2, 34), 64, 100))):
            images = pixels(shape)
            purify(images)
            purify.submit(images).result()
        assert engine._lanes == compiled


def test_a_purifier_is_not_pickled(checkpoint: Checkpoint) -> None:
    with Purifier(checkpoint) as purify:
        for copy in (pickle.dumps, copies.copy, copies.deepcopy):
            with pytest.raises(TypeError, match=r"expected a Purifier to stay .*; pass its checkpoint's path"):
                copy(purify)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_callback_may_not_close(checkpoint: Checkpoint, engine: str) -> None:
    """A refused close leaves the Purifier open."""
    answers: SimpleQueue[str | None] = SimpleQueue()
    image = pixels((28, 28))
    with Purifier(checkpoint, engine=engine) as purify:

        def close(_: Future[Array]) -> None:
            if threading.current_thread() is threading.main_thread():
                answers.put(None)  # added after its future was done, it runs where closing is allowed
                return
            try:
                purify.close()
            except RuntimeError as error:
                answers.put(str(error))

        answer = None
        while answer is None:
            [*_, last] = [purify.submit(image) for _ in range(8)]
            last.add_done_callback(close)
            answer = answers.get(timeout=60)
        assert "called from a future's callback" in answer
        assert purify(image).shape == image.shape


def test_warmup_changes_nothing(checkpoint: Checkpoint) -> None:
    with Purifier(checkpoint, max_batch=4) as purify:
        images = pixels((28, 28))
        before = purify(images)
        purify.warmup()
        np.testing.assert_array_equal(purify(images), before)


def test_info(checkpoint_path: Path) -> None:
    with Purifier.from_pretrained(checkpoint_path, max_batch=4) as purify:
        info = purify.info()
        assert repr(purify).startswith(f"<Purifier {checkpoint_path.stem} ")
    json.dumps(info, allow_nan=False)
    loaded = load_checkpoint(checkpoint_path)
    assert info["checkpoint"]["name"] == checkpoint_path.stem
    assert info["checkpoint"]["digest"] == loaded.digest
    assert info["checkpoint"]["dataset"] == loaded.dataset
    assert info["architecture"]["image_size"] == loaded.config.image_size
    assert info["architecture"]["parameters"] == loaded.config.parameter_count()
    assert info["engine"] == ENGINE_NAMES[0]
    assert info["why"] == "the first in the list that works here"
    assert info["skipped"] == {}
    assert info["max_batch"] == 4
    assert {"precision", "device"} <= info.keys()
    assert info["versions"]["defense-vae-fast"] == defense_vae_fast.__version__
    assert info["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_named_engine(checkpoint: Checkpoint, engine: str) -> None:
    with Purifier(checkpoint, engine=engine) as purify:
        info = purify.info()
        assert (info["engine"], info["why"], info["skipped"]) == (engine, "asked for by name", {})
        assert (purify.config, purify.bounds) == (GRAY, (0.0, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"engine": "abacus"}, "engine: expected 'auto' or one of .*openvino", id="engine"),
        pytest.param({"precision": "fp3"}, "precision: expected .*got 'fp3'", id="precision"),
        pytest.param({"device": "tpu"}, "device: expected .*got 'tpu'", id="device"),
        pytest.param({"max_batch": 0}, "max_batch: expected .*got 0", id="max_batch"),
        pytest.param({"max_batch": 2.5}, "max_batch: expected .*got 2.5", id="fractional max_batch"),
        pytest.param({"streams": 0}, "streams: expected .*got 0", id="streams"),
    ],
)
def test_bad_options(checkpoint: Checkpoint, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Purifier(checkpoint, **options)


def test_from_pretrained_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not one of the shipped names"):
        Purifier.from_pretrained("no-such-purifier")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(CheckpointError, match="not a usable Defense-VAE checkpoint"):
        Purifier.from_pretrained(tmp_path / "bad.safetensors")


def test_fp16_storage(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = {name: tensor.astype(np.float16) for name, tensor in checkpoint.tensors.items()}
    save_checkpoint(tmp_path / "half", Checkpoint(GRAY, tensors, "noise"))
    images = pixels((4, 1, 28, 28), "f4")
    with (
        Purifier.from_pretrained(tmp_path / "half", precision="fp32") as half,
        Purifier(checkpoint, precision="fp32") as full,
    ):
        assert np.abs(half(images) - full(images)).mean() < 0.01


# defend


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(x.flatten(1))
        return logits


def test_defend(purifier: Purifier) -> None:
    classifier = Classifier().eval()
    images = torch.rand(4, 1, 28, 28, requires_grad=True)
    logits = purifier.defend(classifier)(images)
    logits.square().sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.5
    purified = purifier(images.detach())
    assert torch.allclose(logits, classifier(purified), atol=0.05)  # bf16 there, float32 here
    shifted = purifier.defend(classifier, mean=[0.3], std=[0.5])(images)
    assert torch.allclose(shifted, classifier((purified - 0.3) / 0.5), atol=0.1)
    assert not torch.allclose(shifted, logits, atol=0.1)
    assert isinstance(purifier.defend(nn.Flatten())(images), torch.Tensor)  # a classifier may have no parameters


def test_defend_refuses_what_is_no_classifier(purifier: Purifier) -> None:
    wrong: list[Any] = [None, lambda x: x]
    for classifier in wrong:
        with pytest.raises(TypeError, match=r"classifier: expected a torch\.nn\.Module, got"):
            purifier.defend(classifier)
    number: Any = 0.5
    with pytest.raises(TypeError, match=r"mean: expected a sequence of 1 number\(s\), one a channel, got 0\.5"):
        purifier.defend(Classifier(), number, number)


def test_gradients_are_not_lost_silently(purifier: Purifier) -> None:
    with pytest.raises(ValueError, match=r"purifier\.defend\(classifier\)"):
        purifier(torch.rand(1, 28, 28, requires_grad=True))


# Import


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    code = """
import time, sys
before = set(sys.modules)
start = time.perf_counter()
import defense_vae_fast
taken = time.perf_counter() - start
heavy = {"numpy", "torch", "openvino", "onnx", "safetensors", "PIL", "click", "rich"} & set(sys.modules)
print(taken, *sorted(heavy))
"""
    taken, *heavy = min((run_python(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert heavy == []
    assert float(taken) < 0.15


def test_names() -> None:
    for name in defense_vae_fast.__all__:
        assert getattr(defense_vae_fast, name) is not None
        assert name in dir(defense_vae_fast)
    assert defense_vae_fast.list_pretrained() == defense_vae_fast.checkpoint.list_pretrained()
    with pytest.raises(AttributeError, match="has no attribute 'Purifer'"):
        defense_vae_fast.Purifer  # noqa: B018


def test_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert defense_vae_fast.__version__ == version[1]


def test_without_torch(checkpoint_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # import torch now raises, as where it is not installed
import numpy
from PIL import Image
from defense_vae_fast import Purifier, list_pretrained
list_pretrained()
with Purifier.from_pretrained({str(checkpoint_path)!r}) as purifier:
    side, channels = purifier.config.image_size, purifier.config.channels
    array = numpy.zeros((side, side, channels), "u1")
    assert purifier(array).shape == array.shape
    assert purifier.submit(array, return_score=True).result()[0].shape == array.shape
    image = Image.new("L" if channels == 1 else "RGB", (side, side))
    assert isinstance(purifier(image), Image.Image)
    for wrong in (None, "text", array.astype(int)):
        try:
            purifier(wrong)
        except TypeError as error:
            assert "expected" in str(error)
        else:
            raise AssertionError(wrong)
    try:
        purifier.defend(None)
    except ImportError as error:
        print(error)
"""
    assert run_python(code) == "defend: torch is not installed; pip install 'defense-vae-fast[torch]'"
