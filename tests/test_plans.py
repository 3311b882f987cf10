"""TensorRT plans: really built by TensorRT-RTX, whose builder needs no GPU; kept, checked, rejected and built again."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_checkpoint

from defense_vae_fast import cache, onnx_graph
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.engines import plans
from defense_vae_fast.engines.buckets import BUCKETS, bucket_of, buckets_for, cut
from defense_vae_fast.nn.model import DefenseVAE

rtx = pytest.mark.skipif(plans.RTX.missing() is not None, reason=str(plans.RTX.missing()))


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(plans.TRUSTED_FOLDER, raising=False)


def key_of(checkpoint, kind="uint8", buckets=(1, 8), capabilities=("8.9",), package=plans.RTX):
    return plans.make_key(package, checkpoint, kind, {"compute_capabilities": list(capabilities)}, buckets)


@pytest.fixture(scope="module")
def built(checkpoint):
    """A small plan, built once."""
    if reason := plans.RTX.missing():
        pytest.skip(reason)
    key, graph = key_of(checkpoint)
    return key, graph, plans.build(plans.RTX, checkpoint, key, graph)


@rtx
@pytest.mark.parametrize(
    ("size", "channels", "kind"),
    [(28, 1, "uint8"), (28, 1, "float"), (28, 1, "half"), (32, 3, "uint8"), (64, 3, "half")],
    ids=lambda value: str(value),
)
def test_every_architecture_builds_for_every_compute_capability(kind, size, channels):
    config = VAEConfig(size, channels)
    checkpoint = random_checkpoint(config)
    listed = plans.compute_capabilities(plans.RTX)
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(listed)
    # All buckets where users begin; one elsewhere, for the builder's time grows with them.
    buckets = BUCKETS if (size, kind) == (28, "uint8") else (8,)
    key, graph = key_of(checkpoint, kind, buckets, listed)
    steps = []
    plan = plans.build(plans.RTX, checkpoint, key, graph, lambda phase, share: steps.append((phase, share)))

    shape = [size, size, channels] if kind == "uint8" else [channels, size, size]
    dtype = {"uint8": "uint8", "float": "float", "half": "half"}[kind]
    image = {"dtype": dtype, "shape": [-1, *shape]}
    score = {} if kind == "half" else {"score": {"dtype": "float", "shape": [-1]}}
    assert plan.header["inputs"] == {"images": image}
    assert plan.header["outputs"] == {"purified": image, **score}
    smallest = [1 if bucket == buckets[-1] else bucket for bucket in buckets]
    assert plan.header["profiles"] == [
        [[low, *shape], [bucket, *shape], [bucket, *shape]] for low, bucket in zip(smallest, buckets, strict=True)
    ]
    # The weights are in it, in fp16: less would be an empty engine.
    assert len(plan.data) > config.weight_bytes(2)
    assert all(0 <= share <= 1 for _, share in steps)
    assert ("Building engine", 1.0) in steps


@rtx
def test_a_plan_without_fp16_would_be_larger(checkpoint):
    """Strongly typed: the same network as float32 holds twice the bytes of weights, so the types were obeyed."""
    key, graph = key_of(checkpoint, "float")
    plan = plans.build(plans.RTX, checkpoint, key, graph)
    graph = onnx_graph.build(checkpoint, "fp32", "float").SerializeToString()
    twice = plans.build(plans.RTX, checkpoint, key, graph)
    assert len(twice.data) - len(plan.data) > 0.9 * checkpoint.config.weight_bytes(2)


def test_vectors_are_those_of_the_float32_module(built, checkpoint):
    _, _, plan = built
    pixels = torch.from_numpy(plan.images.transpose(0, 3, 1, 2) / np.float32(255)).double()
    with torch.no_grad():
        expected = DefenseVAE.from_checkpoint(checkpoint).double().purify(pixels)
    np.testing.assert_allclose(plan.purified, expected.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(plan.scores, (pixels - expected).abs().mean((1, 2, 3)).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_acceptance_tells_rounding_from_error(built, kind):
    _, _, plan = built
    plan = replace(plan, header={"key": {**plan.header["key"], "kind": kind}})
    given = plan.trial(11)
    turn = np.arange(11) % 4
    exact = plan.purified[turn]
    result = np.rint(255 * exact.transpose(0, 2, 3, 1)).astype(np.uint8) if kind == "uint8" else exact
    assert given.dtype == result.dtype
    assert given.shape == result.shape
    assert plan.disagreement(result, plan.scores[turn]) is None
    halved = exact.astype(np.float16).astype(np.float32)
    assert kind == "uint8" or plan.disagreement(halved, plan.scores[turn]) is None

    one_pixel = result.copy()
    last = one_pixel.reshape(11, -1)[-1]
    last[5] = (0.0 if last[5] > 127 else 255) if kind == "uint8" else (0.0 if last[5] > 0.5 else 1.0)
    assert "at most" in plan.disagreement(one_pixel, plan.scores[turn])
    assert plan.disagreement(result[[1, 0, *range(2, 11)]], plan.scores[turn]) is not None  # images changed places
    assert plan.disagreement(result, plan.scores[turn] + 0.01) is not None
    if kind == "float":
        assert plan.disagreement(np.full_like(result, np.nan), plan.scores[turn]) is not None
    assert plan.disagreement(result, np.full(11, np.nan, np.float32)) is not None


def test_the_second_time_comes_from_the_cache(built, checkpoint, monkeypatch):
    key, graph, plan = built
    monkeypatch.setattr(plans, "build", lambda *_: plan)
    first = plans.obtain(plans.RTX, checkpoint, key, graph)
    monkeypatch.setattr(plans, "build", None)  # may not be called again
    second = plans.obtain(plans.RTX, checkpoint, key, graph)
    assert first.data == second.data == plan.data
    assert second.buckets == key.buckets
    assert np.array_equal(second.purified, plan.purified)
    folder = cache.folder("plans")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock", ".plan", ".safetensors"]
    plans.discard(second)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def edit_header(path, change):
    header = json.loads(path.with_suffix(".json").read_text())
    change(header)
    path.with_suffix(".json").write_text(json.dumps(header))


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def foreign(path):
    """A plan of somebody else's, whole and with matching digests, under our name."""
    path.write_bytes(b"native code")
    edit_header(
        path,
        lambda header: header.update(
            plan_sha256=hashlib.sha256(b"native code").hexdigest(), key={**header["key"], "graph": "0" * 64}
        ),
    )


def with_key(**values):
    return lambda path: edit_header(path, lambda header: header["key"].update(values))


DAMAGE = {
    "one bit of the plan": (flip, "does not match its digest"),
    "a truncated plan": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not match its digest"),
    "an empty plan": (lambda path: path.write_bytes(b""), "does not match its digest"),
    "no plan": (lambda path: path.unlink(), "No such file"),
    "no vectors": (lambda path: path.with_suffix(".safetensors").unlink(), "No such file"),
    "other vectors": (lambda path: flip(path.with_suffix(".safetensors")), "vectors of .* does not match"),
    "a foreign plan": (foreign, "graph: expected"),
    "an older library": (with_key(library_version="0.0.1"), "library_version: expected"),
    "an older package": (with_key(package_version="1.0"), "package_version: expected"),
    "an older format": (with_key(format=0), "format: expected"),
    "another GPU": (with_key(target={"compute_capabilities": ["7.5"]}), "target: expected"),
    "a target of another kind": (with_key(target=["8.9"]), "target: expected"),
    "fewer buckets": (with_key(buckets=[1]), r"buckets: expected \[1, 8\]"),
    "buckets that are none": (with_key(buckets="18"), "expected a list of batch sizes"),
    "a key with more in it": (with_key(more=1), "not the header of a plan"),
    "a header that is no JSON": (lambda path: path.with_suffix(".json").write_text("{"), "unreadable header"),
    "a header that is a list": (lambda path: path.with_suffix(".json").write_text("[]"), "not the header"),
    "a nested bomb": (lambda path: path.with_suffix(".json").write_text("[" * 100_000), "unreadable header"),
    "a huge header": (lambda path: path.with_suffix(".json").write_bytes(b" " * (2 << 20)), "larger than any header"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_foreign_and_outdated_plans_are_built_again(built, checkpoint, case, monkeypatch, caplog):
    key, graph, plan = built
    builds = []
    monkeypatch.setattr(plans, "build", lambda *_: builds.append(1) or plan)
    path = plans.obtain(plans.RTX, checkpoint, key, graph).path
    damage, reason = DAMAGE[case]
    damage(path)
    with pytest.raises(plans.PlanRejected, match=reason):
        plans.read(path, key)
    with caplog.at_level(logging.WARNING, "defense_vae_fast.tensorrt"):
        assert plans.obtain(plans.RTX, checkpoint, key, graph).data == plan.data
    assert len(builds) == 2
    assert "cached plan rejected, building again" in caplog.text
    assert plans.read(path, key).data == plan.data


def test_the_binary_is_not_opened_before_its_header_fits(built, checkpoint, monkeypatch):
    key, _, plan = built
    path = plans.write(plan, cache.folder("plans") / "x.plan")
    edit_header(path, lambda header: header["key"].update(graph="0" * 64))
    opened = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.suffix) or self.open("rb").read())
    with pytest.raises(plans.PlanRejected):
        plans.read(path, key)
    assert opened == [".json"]


def test_whatever_matters_changes_the_key(checkpoint):
    if reason := plans.RTX.missing():
        pytest.skip(reason)
    other = random_checkpoint(seed=1)
    keys = [
        key_of(checkpoint),
        key_of(other),
        key_of(checkpoint, "float"),
        key_of(checkpoint, buckets=(1,)),
        key_of(checkpoint, capabilities=("8.6",)),
    ]
    first = keys[0][0]
    changes = ({"workspace": 1}, {"lean": True}, {"package_version": "9"}, {"library_version": "9"}, {"format": 9})
    stems = [key.stem for key, _ in keys] + [replace(first, **change).stem for change in changes]
    assert len(set(stems)) == len(stems)
    assert key_of(checkpoint)[0] == first


def test_a_plan_from_elsewhere_needs_the_buckets_in_use_alone(built, checkpoint, tmp_path, monkeypatch):
    key, graph, plan = built
    plans.write(plan, tmp_path / "some.plan")
    monkeypatch.setenv(plans.TRUSTED_FOLDER, str(tmp_path))
    monkeypatch.setattr(plans, "build", None)
    wide = replace(key, buckets=BUCKETS)
    assert plans.obtain(plans.RTX, checkpoint, wide, graph, (1, 8)).buckets == (1, 8)
    with pytest.raises(TypeError):  # not found, and building is forbidden here
        plans.obtain(plans.RTX, checkpoint, wide, graph, (1, 8, 32))


def test_a_trusted_folder_comes_first_and_is_left_alone(built, checkpoint, tmp_path, monkeypatch):
    key, graph, plan = built
    path = plans.write(plan, tmp_path / "shipped" / "fashion.plan")
    (tmp_path / "shipped" / "a.json").write_text("{}")  # something else lies there too
    monkeypatch.setenv(plans.TRUSTED_FOLDER, str(path.parent))
    monkeypatch.setattr(plans, "build", None)
    found = plans.obtain(plans.RTX, checkpoint, key, graph)
    assert found.path == path
    plans.discard(found)
    assert path.exists()


@rtx
def test_two_processes_build_once(checkpoint_path, tmp_path):
    code = """
        import logging, sys
        from defense_vae_fast.checkpoint import load_checkpoint
        from defense_vae_fast.engines import plans
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        checkpoint = load_checkpoint(sys.argv[1])
        key, graph = plans.make_key(plans.RTX, checkpoint, "half", {"compute_capabilities": ["8.9"]}, (1,))
        print("ready", flush=True)
        sys.stdin.readline()
        print(len(plans.obtain(plans.RTX, checkpoint, key, graph).data))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(checkpoint_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(plans.__file__).parents[2],
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("building for half images" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


@rtx
def test_a_graph_that_is_none_is_a_build_error(checkpoint):
    key, _ = key_of(checkpoint)
    with pytest.raises(plans.BuildError, match="tensorrt_rtx does not understand the graph"):
        plans.build(plans.RTX, checkpoint, key, b"not a graph")


@rtx
def test_timing_cache_and_lean_flags_pass_through_a_builder(checkpoint):
    """TensorRT's alone, but its builder is not here; TensorRT-RTX's has the same calls."""
    package = replace(plans.RTX, times=True)
    key, graph = key_of(checkpoint, "half", (1,), package=package)
    for _ in range(2):  # the second reads what the first wrote
        assert plans.build(package, checkpoint, replace(key, lean=True), graph).data
        (times,) = cache.folder("plans").glob("*.timing")
        assert times.stat().st_size > 0


LEAN_KEY = plans.Key(
    package="tensorrt_lean",
    package_version="10.9.0",
    library_version="0",
    checkpoint="",
    graph="0" * 64,
    precision="fp16",
    kind="uint8",
    buckets=(1, 8),
    workspace=1,
    lean=True,
    target={"gpu": "X", "compute_capability": "9.0", "driver": "13.0"},
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"package_version": "10.3.0.26"}, None),
        ({"target": {**LEAN_KEY.target, "driver": "12.4"}}, None),
        ({"buckets": (1, 8, 32)}, None),
        ({"package_version": "10.10"}, "which the lean runtime 10.9.0 does not run"),
        ({"package_version": "9.9"}, "which the lean runtime"),
        ({"package_version": "new"}, "which the lean runtime"),
        ({"package": "tensorrt_rtx"}, "package: expected 'tensorrt'"),
        ({"lean": False}, "lean: expected True"),
        ({"precision": "int8"}, "precision: expected 'fp16'"),
        ({"target": {**LEAN_KEY.target, "gpu": "Y"}}, "target: expected"),
    ],
    ids=str,
)
def test_the_lean_runtime_takes_plans_of_the_full_one(change, reason):
    plan = replace(LEAN_KEY, **{"package": "tensorrt", **change}).to_dict()
    misfit = plans._misfit(plan, LEAN_KEY)
    assert misfit is None if reason is None else reason in misfit


def test_the_lean_runtime_says_how_to_get_a_plan(checkpoint):
    with pytest.raises(plans.BuildError, match="export CHECKPOINT --format tensorrt --lean"):
        plans.obtain(plans.LEAN, checkpoint, LEAN_KEY, b"")


def test_a_cache_that_others_may_write_to_is_refused(tmp_path):
    folder = cache.folder("plans")
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="only this user"):
        cache.folder("plans")


@pytest.mark.parametrize("package", [plans.TENSORRT, plans.LEAN], ids=lambda package: package.module)
def test_a_missing_package_names_its_extra(package):
    if package.missing() is None:
        pytest.skip(f"{package.module} is installed here")
    assert f"pip install 'defense-vae-fast[{package.extra}]'" in package.missing()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 64, 65, 255, 256, 257, 1000])
@pytest.mark.parametrize("max_batch", [1, 5, 64, 256, 300])
@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_cover_a_batch_in_order_and_fit_their_buckets(count, max_batch, workers):
    buckets = buckets_for(max_batch)
    pieces = list(cut(count, buckets, workers))
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == count
    for start, stop in pieces:
        assert 0 < stop - start <= bucket_of(stop - start, buckets) <= max_batch
    if count >= 64 * workers and max_batch >= 64:
        assert len(pieces) >= workers
