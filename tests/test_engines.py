"""Every engine against the torch module, and the promises of the engine contract."""

from __future__ import annotations

import ast
import functools
import logging
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_checkpoint

import defense_vae_fast
from defense_vae_fast import Purifier, engines
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.engines import ENGINES, Engine, EngineUnavailable, select
from defense_vae_fast.engines import torch as torch_engine
from defense_vae_fast.engines.openvino import OpenVINOEngine
from defense_vae_fast.engines.torch import TorchEngine, _IdleStreams
from defense_vae_fast.nn.model import DefenseVAE

PACKAGE = Path(defense_vae_fast.__file__).parent
ROW = {engine.name: engine for engine in ENGINES if "cpu" in engine.devices}


def pixels(count, config=None, seed=0):
    """uint8 NHWC images and the same as float32 NCHW."""
    channels, height, width = (config or VAEConfig()).image_shape
    levels = np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return levels, np.ascontiguousarray(levels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def reference(checkpoint, images, dtype=torch.float64):
    model = DefenseVAE.from_checkpoint(checkpoint).to(dtype)
    with torch.no_grad():
        return model.purify(torch.from_numpy(images).to(dtype)).double().numpy()


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def load_or_skip(name, checkpoint, precision, **options):
    try:
        return ROW[name].load(checkpoint, precision, device="cpu", **options)
    except EngineUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=[f"{name}-{p}" for name in ROW for p in ("fp32", "bf16")])
def engine(request, checkpoint):
    """Each engine in each precision, with pieces small enough that every batch of the tests is cut."""
    name, precision = request.param.split("-")
    with load_or_skip(name, checkpoint, precision, max_batch=5) as loaded:
        yield loaded


@pytest.fixture(scope="module", params=list(ROW))
def fresh(request, checkpoint):
    """A function that loads an engine for a test to break or close."""
    loaded = []

    def load(**options):
        loaded.append(ROW[request.param].load(checkpoint, "fp32", device="cpu", **options))
        return loaded[-1]

    yield load
    for each in loaded:
        each.close()


@pytest.fixture(scope="module")
def plain_torch(checkpoint):
    """What the plain module makes of ``pixels(count)`` in a precision, each computed once."""
    return functools.cache(lambda count, dtype: reference(checkpoint, pixels(count)[1], dtype))


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_error_is_at_most_twice_that_of_plain_torch(engine, plain_torch, count):
    levels, images = pixels(count)
    expected = plain_torch(count, torch.float64)
    plain = plain_torch(count, {"fp32": torch.float32, "bf16": torch.bfloat16}[engine.precision])
    purified, scores = engine.run(images)
    assert (purified.dtype, purified.shape, scores.dtype, scores.shape) == (
        np.float32,
        images.shape,
        np.float32,
        (count,),
    )
    assert rms(purified - expected) <= 2 * rms(plain - expected)
    # The score is that of the image returned, so only float32's own rounding separates them.
    np.testing.assert_allclose(scores, np.abs(images - purified).mean((1, 2, 3)), rtol=0, atol=1e-6)

    as_bytes, byte_scores = engine.run(levels)
    assert (as_bytes.dtype, as_bytes.shape) == (np.uint8, levels.shape)
    # The same arithmetic as for floats, up to the last bit of the division by 255.
    np.testing.assert_allclose(
        as_bytes, 255 * purified.transpose(0, 2, 3, 1), rtol=0, atol=0.5 + (1 if engine.precision == "bf16" else 1e-2)
    )
    np.testing.assert_allclose(byte_scores, scores, rtol=0, atol=1e-3 if engine.precision == "bf16" else 1e-6)


@pytest.mark.parametrize("name", ROW)
@pytest.mark.parametrize("shape", [(32, 3), (64, 3)], ids=["32x3", "64x3"])
def test_larger_colour_networks(name, shape):
    config = VAEConfig(*shape)
    checkpoint = random_checkpoint(config, 1)
    levels, images = pixels(3, config)
    expected = reference(checkpoint, images)
    with ROW[name].load(checkpoint, "fp32", device="cpu") as loaded:
        np.testing.assert_allclose(loaded.run(images)[0], expected, rtol=0, atol=1e-4)
        assert np.abs(loaded.run(levels)[0] - 255 * expected.transpose(0, 2, 3, 1)).max() <= 0.53


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_an_image_gets_the_same_bytes_in_any_openvino_batch(checkpoint, precision):
    """Not promised across CPUs, but held where the tests run: images do not mix, whatever a request's size."""
    levels, _ = pixels(40)
    with OpenVINOEngine.load(checkpoint, precision) as loaded:
        purified, scores = loaded.run(levels)
        for count in range(1, len(levels)):
            part, part_scores = loaded.run(levels[-count:])
            assert np.array_equal(part, purified[-count:])
            assert np.array_equal(part_scores, scores[-count:])
        loaded.batch_step = 128  # as with sixteen streams, each of which gets single images of the forty
        one_by_one, their_scores = loaded.run(levels)
        assert ("uint8", 1, loaded.streams) in loaded._lanes
        assert np.array_equal(one_by_one, purified)
        assert np.array_equal(their_scores, scores)


@pytest.mark.parametrize("count", [1, 12])
def test_results_belong_to_the_caller(engine, count):
    levels, _ = pixels(2 * count)
    first, second = levels[:count], levels[count:]
    purified, scores = engine.run(first)
    kept, kept_scores = purified.copy(), scores.copy()
    engine.run(second)
    engine.run(second)
    assert np.array_equal(purified, kept)
    assert np.array_equal(scores, kept_scores)
    purified[:] = 0
    scores[:] = 0
    again, again_scores = engine.run(first)
    assert np.array_equal(again, kept)
    assert np.array_equal(again_scores, kept_scores)


@pytest.mark.parametrize("count", [1, 12])
def test_out_receives_the_images(engine, count):
    levels, images = pixels(count)
    for batch in (levels, images):
        expected, _ = engine.run(batch)
        out = np.zeros_like(batch)
        assert engine.run(batch, out=out)[0] is out
        assert np.array_equal(out, expected)
        in_place = batch.copy()
        engine.run(in_place, out=in_place)
        assert np.array_equal(in_place, expected)


def test_read_only_images_are_fine(engine):
    levels, _ = pixels(3)
    expected, _ = engine.run(levels)
    levels.flags.writeable = False
    assert np.array_equal(engine.run(levels)[0], expected)


def test_sixteen_threads_get_the_bytes_of_one(engine):
    levels, images = pixels(16)
    batches = [levels[i : i + 1] for i in range(6)] + [images[i : i + 1] for i in range(6)]
    batches += [levels[:3], images[:11], levels[2:15], levels]
    alone = [engine.run(batch) for batch in batches]
    ready = threading.Barrier(16)

    def work(index):
        ready.wait()
        order = np.random.default_rng(index).permutation(len(batches))
        results = {i: engine.run(batches[i]) for i in order}
        return [results[i] for i in range(len(batches))]

    with ThreadPoolExecutor(16) as pool:
        for results in pool.map(work, range(16)):
            for (purified, scores), (expected, expected_scores) in zip(results, alone, strict=True):
                assert purified.tobytes() == expected.tobytes()
                assert scores.tobytes() == expected_scores.tobytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("name", list(ROW))
def test_a_forked_child_is_told(name, checkpoint_path):
    """In a process of its own: forking this one, full of threads, would be the test's own danger."""
    code = f"""
        import os, sys
        import numpy as np
        from defense_vae_fast import EngineUnavailable, Purifier
        purifier = Purifier.from_pretrained(sys.argv[1], engine="{name}", precision="fp32")
        images = np.zeros((4, 28, 28, 1), np.uint8)
        purifier(images)
        purifier.submit(images).result()
        stream = purifier.stream()
        stream.put(images[0]).result()
        child = os.fork()
        if child == 0:
            told = 0
            for call in (lambda: purifier(images), lambda: purifier.submit(images), lambda: stream.put(images[0])):
                try:
                    call()
                except RuntimeError as error:
                    told += "create the Purifier after the fork" in str(error)
            stream.close()
            stream.cancel()
            purifier.close()
            if purifier.info()["engine"] == "openvino":  # a new one would wait for the parent's threads as well
                try:
                    Purifier.from_pretrained(sys.argv[1], engine="openvino")
                except EngineUnavailable as error:
                    told -= "OpenVINO was loaded before the fork" not in str(error)
                else:
                    told = 0
            os._exit(told)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(checkpoint_path)], timeout=120, check=False)
    assert done.returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_signal_is_survived_when_models_went_in_another_thread(checkpoint_path):
    """A core of OpenVINO that ends elsewhere leaves the main thread without the stack of its signal handlers."""
    code = """
        import os, signal, sys, threading
        import numpy as np
        from defense_vae_fast import Purifier
        from defense_vae_fast.demo import load_classifier
        heard = []
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        made = [Purifier.from_pretrained(sys.argv[1], engine="openvino", precision="fp32"), load_classifier("mnist")]
        for one in made:
            one(np.zeros((1, 28, 28, 1), np.uint8))
        del one
        thread = threading.Thread(target=made.clear)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(0 if heard else 1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(checkpoint_path)], timeout=120, check=False)
    assert done.returncode == 0


def test_auto_goes_on_when_an_engine_does_not_load(checkpoint, monkeypatch):
    def refuse(*_):
        raise EngineUnavailable("no such arithmetic here")

    monkeypatch.setattr(OpenVINOEngine, "load", refuse)
    with Purifier(checkpoint) as purifier:
        assert purifier.info()["engine"] == "torch"
        assert purifier.info()["skipped"] == {"openvino": "no such arithmetic here"}
    with pytest.raises(EngineUnavailable, match="no such arithmetic"):
        Purifier(checkpoint, engine="openvino")


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_broken_torch_is_named(error, checkpoint_path, tmp_path):
    """Installed, for its files are found, but its import raises: a missing shared library, for instance."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(f"raise {error}('libtorch.so: no such file')")
    output = python(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        from defense_vae_fast import Purifier
        from defense_vae_fast.engines import EngineUnavailable, select
        sys.modules["openvino"] = None
        for engine in ("torch", "auto"):
            try:
                Purifier.from_pretrained(sys.argv[1], engine=engine)
            except EngineUnavailable as error:
                print(error)
        """,
        checkpoint_path,
        tmp_path,
    )
    named, auto = output.splitlines()
    for message in (named, auto):
        assert "the package torch does not import (libtorch.so: no such file); install it again" in message
    assert auto.startswith("no engine can work here: openvino: ")


def test_a_closed_engine_says_so(fresh):
    engine = fresh()
    levels, _ = pixels(20)
    engine.run(levels)
    assert not engine.closed
    engine.close()
    engine.close()
    assert engine.closed
    with pytest.raises(RuntimeError, match=f"the {engine.name} engine is closed; load another one"):
        engine.run(levels)


def test_a_stream_that_a_closed_engine_has_left_serves_the_next(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    streams, first, second = _IdleStreams(), torch.device("cuda", 0), torch.device("cuda", 1)
    one, two = streams.take(first), streams.take(first)
    assert one is not two
    streams.give(first, one)
    assert streams.take(second) is not one
    assert streams.take(first) is one
    assert streams.take(first) not in (one, two)


def test_close_waits_for_calls_in_other_threads(fresh):
    engine = fresh()
    levels, _ = pixels(40)
    expected, _ = engine.run(levels)
    started = threading.Barrier(5)

    def work():
        started.wait()
        results = []
        while True:
            try:
                results.append(engine.run(levels)[0])
            except RuntimeError as error:  # noqa: PERF203 - the error is what ends the loop
                return results, str(error)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for _ in range(4)]
        started.wait()
        engine.close()
        for future in futures:
            results, error = future.result(60)
            assert all(np.array_equal(result, expected) for result in results)
            assert "is closed" in error


def test_an_error_under_way_reaches_the_caller_and_frees_the_request(checkpoint, monkeypatch):
    from defense_vae_fast.engines import openvino

    def finish_and_fail(slot, *_):
        slot.request.wait()
        raise ZeroDivisionError

    levels, _ = pixels(20)
    with OpenVINOEngine.load(checkpoint, "fp32") as engine:
        expected, _ = engine.run(levels)
        with monkeypatch.context() as patch:  # no image makes a real request fail
            patch.setattr(openvino._Slot, "finish", finish_and_fail)
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    engine.run(levels)
        for _ in range(3):
            assert np.array_equal(engine.run(levels)[0], expected)


BAD_BATCHES = {
    "dtype": (np.zeros((1, 1, 28, 28)), "got float64"),
    "layout": (np.zeros((1, 28, 28, 1), np.float32), r"got float32 \(1, 28, 28, 1\)"),
    "size": (np.zeros((1, 32, 32, 1), np.uint8), r"got uint8 \(1, 32, 32, 1\)"),
    "one image": (np.zeros((28, 28, 1), np.uint8), r"got uint8 \(28, 28, 1\)"),
    "empty": (np.zeros((0, 28, 28, 1), np.uint8), "N at least 1"),
    "strided": (np.zeros((4, 28, 28, 1), np.uint8)[::2], "not contiguous"),
    "scalar": (np.array(0, np.uint8), r"got uint8 \(\)"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_wrong_batches_say_what_was_expected(engine, case):
    batch, message = BAD_BATCHES[case]
    with pytest.raises(ValueError, match=rf"expected a C-contiguous .*\(N, 1, 28, 28\).*{message}|{message}"):
        engine.run(batch)


@pytest.mark.parametrize("case", ["dtype", "shape", "read-only"])
def test_wrong_out_says_what_was_expected(engine, case):
    levels, _ = pixels(2)
    out = {"dtype": np.zeros(levels.shape, np.float32), "shape": levels[:1].copy(), "read-only": levels.copy()}[case]
    out.flags.writeable = case != "read-only"
    with pytest.raises(ValueError, match="out: expected a writable C-contiguous uint8 array"):
        engine.run(levels, out=out)


@pytest.mark.parametrize("name", ROW)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"precision": "int4"}, "precision: expected 'auto' or one of fp32, bf16.*got 'int4'"),
        ({"device": "tpu"}, "device: expected 'auto' or one of cpu.*got 'tpu'"),
        ({"max_batch": 0}, "max_batch: expected an int from 1"),
        ({"streams": 0}, "streams: expected an int from 1"),
        ({"streams": 10**6}, "streams: expected an int from 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(name, checkpoint, option, message):
    with pytest.raises(ValueError, match=message):
        ROW[name].load(checkpoint, **option)


def test_fp16_is_refused_on_the_cpu(checkpoint):
    with pytest.raises(ValueError, match="expected 'auto', 'fp32' or 'bf16' on the CPU"):
        TorchEngine.load(checkpoint, "fp16", device="cpu")


@pytest.mark.parametrize("name", ROW)
def test_one_stream_gives_the_same_bytes(name, checkpoint):
    levels, _ = pixels(20)
    with (
        ROW[name].load(checkpoint, "fp32", device="cpu") as many,
        ROW[name].load(checkpoint, "fp32", "cpu", streams=1) as one,
    ):
        assert np.array_equal(many.run(levels)[0], one.run(levels)[0])
        assert one.info()["streams"] == 1


def test_auto_precision_falls_back_where_bf16_disagrees(checkpoint):
    """A last layer a hundred times too strong turns bf16's rounding into black and white pixels."""
    name = f"{checkpoint.config.layers()[-1].name}.weight"
    harsh = replace(checkpoint, tensors={**checkpoint.tensors, name: checkpoint.tensors[name] * 100})
    with OpenVINOEngine.load(checkpoint) as gentle, OpenVINOEngine.load(harsh) as engine:
        assert engine.precision == "fp32"
        if gentle.precision == "fp32":
            pytest.skip(f"auto is fp32 for every network here: {gentle.info()['precision_reason']}")
        assert "bf16 differs from fp32 by" in engine.info()["precision_reason"]


def test_run_tensor_stays_in_torch(checkpoint):
    levels, images = pixels(7)
    with TorchEngine.load(checkpoint, "fp32", device="cpu", max_batch=3) as engine:
        for batch in (levels, images):
            tensor = torch.from_numpy(batch)
            purified, scores = engine.run_tensor(tensor)
            expected, expected_scores = engine.run(batch)
            assert np.array_equal(purified.numpy(), expected)
            assert np.array_equal(scores.numpy(), expected_scores)
            assert np.array_equal(tensor.numpy(), batch)
            assert not purified.requires_grad
            assert purified.is_contiguous()
        with pytest.raises(ValueError, match=r"expected uint8 \(N, 28, 28, 1\) or float32 \(N, 1, 28, 28\) on cpu"):
            engine.run_tensor(torch.zeros(1, 28, 28))
    with pytest.raises(RuntimeError, match="is closed"):
        engine.run_tensor(tensor)


def fp32_settings():
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def test_tf32_is_off_while_any_engine_is_inside():
    before = fp32_settings()
    with torch_engine._without_tf32:
        with torch_engine._without_tf32:
            assert fp32_settings() == ("ieee", "ieee")
        assert fp32_settings() == ("ieee", "ieee")
    assert fp32_settings() == before
    assert torch.backends.cudnn.allow_tf32 in (True, False)  # torch's older name for it may still be read


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp32_on_cuda_is_not_tf32(checkpoint):
    _, images = pixels(64)
    expected = reference(checkpoint, images)
    before = fp32_settings()
    with TorchEngine.load(checkpoint, "fp32", device="cuda") as engine:
        purified, _ = engine.run(images)
    assert fp32_settings() == before
    assert rms(purified - expected) <= 2 * rms(reference(checkpoint, images, torch.float32) - expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_tensor_of_another_cuda_device(checkpoint):
    _, images = pixels(3)
    with Purifier(checkpoint, engine="torch", device="cuda") as purifier:
        here, there = (purifier(torch.from_numpy(images).to(f"cuda:{index}")) for index in range(2))
        assert (here.device.index, there.device.index) == (0, 1)
        assert torch.equal(here.cpu(), there.cpu())
        with pytest.raises(ValueError, match=r"on cuda:0 with N at least 1, got .* on cuda:1"):
            purifier._engine.run_tensor(torch.from_numpy(images).to("cuda:1"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_torch_on_cuda(checkpoint):
    levels, images = pixels(20)
    expected = reference(checkpoint, images)
    plain = reference(checkpoint, images, torch.float16)
    with TorchEngine.load(checkpoint, device="cuda") as engine:
        assert (engine.device, engine.precision) == ("cuda", "fp16")
        purified, _ = engine.run(images)
        assert rms(purified - expected) <= 2 * rms(plain - expected)
        assert np.array_equal(engine.run_tensor(torch.from_numpy(images).cuda())[0].cpu().numpy(), purified)
        assert np.abs(engine.run(levels)[0] - 255 * expected.transpose(0, 2, 3, 1)).max() <= 4


def test_the_table_names_each_engine_once():
    names = [engine.name for engine in ENGINES]
    assert len(set(names)) == len(names)
    assert "auto" not in names
    assert all(issubclass(engine, Engine) and engine.devices and engine.precisions for engine in ENGINES)


def test_auto_takes_the_first_that_works_and_logs_it_once(caplog, monkeypatch):
    monkeypatch.setattr(engines, "_logged", set())
    with caplog.at_level(logging.INFO, "defense_vae_fast"):
        selection = select()
        assert select() == selection
    assert selection.engine is OpenVINOEngine
    assert selection.skipped == {}
    assert [record.getMessage() for record in caplog.records] == ["engine: openvino"]


def test_auto_skips_what_cannot_do_the_precision():
    selection = select(precision="fp16")
    assert selection.engine is TorchEngine
    assert selection.skipped == {"openvino": "precision: expected 'auto' or one of fp32, bf16, int8, got 'fp16'"}


@pytest.mark.parametrize("name", ROW)
def test_a_named_engine_is_taken(name):
    assert select(name).engine is ROW[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx",), "engine: expected 'auto' or one of tensorrt, .*openvino, torch.*got 'onnx'"),
        (("openvino", "cuda"), "device: expected 'auto' or one of cpu, got 'cuda'"),
        (("auto", "tpu"), "openvino: device: .*torch: device: .*got 'tpu'"),
        (("auto", "auto", "int4"), "openvino: precision: .*torch: precision: .*got 'int4'"),
    ],
    ids=["name", "device of one", "device of none", "precision of none"],
)
def test_impossible_wishes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(*arguments)


def python(script, *arguments):
    """Run a script in a fresh interpreter and return what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_torch_the_openvino_path_works_and_torch_says_what_it_needs(checkpoint_path):
    output = python(
        """
        import sys
        sys.modules["torch"] = None
        import numpy as np
        from defense_vae_fast.checkpoint import load_checkpoint
        from defense_vae_fast.engines import EngineUnavailable, select
        with select().engine.load(load_checkpoint(sys.argv[1])) as engine:
            for batch in (np.zeros((1, 28, 28, 1), np.uint8), np.zeros((20, 1, 28, 28), np.float32)):
                purified, scores = engine.run(batch)
                assert purified.shape == batch.shape and (scores > 0).all()
            print(engine.name)
        try:
            select("torch")
        except EngineUnavailable as error:
            print(error)
        """,
        checkpoint_path,
    )
    name, error = output.splitlines()
    assert name == "openvino"
    assert "torch is not installed; install it with: pip install 'defense-vae-fast[torch]'" in error


def test_without_openvino_auto_takes_torch_and_says_why():
    output = python(
        """
        import sys
        sys.modules["openvino"] = None
        from defense_vae_fast.engines import EngineUnavailable, select
        selection = select()
        print(selection.engine.name, dict(selection.skipped))
        try:
            select("openvino")
        except EngineUnavailable as error:
            print(error)
        sys.modules["torch"] = None
        try:
            select()
        except EngineUnavailable as error:
            print(error)
        """
    )
    chosen, named, none = output.splitlines()
    missing = "the package openvino does not import"
    assert chosen.startswith("torch {'openvino': ")
    assert missing in chosen
    assert missing in named
    assert none.startswith("no engine can work here: openvino: ")
    assert "defense-vae-fast[torch]" in none


def test_importing_loads_no_vendor_library():
    output = python(
        """
        import sys
        import defense_vae_fast, defense_vae_fast.engines
        vendors = ("torch", "openvino", "onnx", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "pycuda", "cuda")
        print([name for name in vendors if name in sys.modules])
        """
    )
    assert output.strip() == "[]"


def imported_modules(node):
    """Modules that code imports anywhere, except for the type checker."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""
    elif not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from imported_modules(child)


def test_torch_is_imported_in_nn_and_its_engine_alone():
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "torch" for name in imported_modules(ast.parse(path.read_text())))
    }
    assert "engines/torch.py" in importing
    # Beside its engine, only what works with a toolbox that is made of torch.
    toolboxes = {f"integrations/{name}.py" for name in ("art", "foolbox", "torchvision")}
    assert {path for path in importing if not path.startswith("nn/")} == {"engines/torch.py", *toolboxes}


# Each may import those of an earlier row, and modules of its own folder where it is one.
ROWS = [
    {"architecture", "atomic", "cache"},
    {"checkpoint", "files", "images", "frames"},
    {"onnx_graph", "contact_sheet", "cuda"},
    {"nn"},
    {"engines"},
    {"joined_graph", "backlog", "histogram"},
    {"stream", "regions"},
    {"regions_on_gpu"},
    {"purifier"},  # its ``submit`` and ``stream`` are a stream's
    {"boxes_file", "video_reading"},
    {"video_writing"},
    {"demo", "purify", "video", "export", "doctor"},
    {"integrations"},
    {"cli"},
]


def imported_parts(node):
    """Parts of the package (a module or folder at its top), and other modules that code imports anywhere."""
    if isinstance(node, ast.ImportFrom) and node.module == "defense_vae_fast":
        yield from (f"defense_vae_fast.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        assert not getattr(node, "level", 0), "imports are absolute, so that this test can follow them"
        yield from imported_modules(node)
    elif not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from imported_parts(child)


def package_files():
    return {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", package_files())
def test_imports_go_one_way(name):
    row = {part: index for index, parts in enumerate(ROWS) for part in parts}
    own = Path(name).parts[0].removesuffix(".py")
    names = set(imported_parts(ast.parse(package_files()[name].read_text())))
    assert not {module for module in names if module.split(".")[0] in ("training", "bench", "tests")}
    parts = {module.split(".")[1] for module in names if module.startswith("defense_vae_fast.")} & {*row, own}
    if own == "__init__":
        assert not parts  # what it exports is imported when asked for
        return
    assert own in row, f"{name}: give it a row in ROWS"
    wrong = {part for part in parts - {own} if row[part] >= row[own]}
    assert not wrong, f"{name} imports {wrong}, which stand above or beside it"


def test_the_rows_hold_every_part_of_the_package():
    parts = {Path(name).parts[0].removesuffix(".py") for name in package_files()} - {"__init__"}
    assert parts == set().union(*ROWS)
