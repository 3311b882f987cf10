"""Checkpoints: what is written can be read, and nothing damaged or hostile gets through."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from defense_vae_fast import checkpoint as module
from defense_vae_fast.architecture import VAEConfig
from defense_vae_fast.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    CheckpointError,
    Quantization,
    list_pretrained,
    load_checkpoint,
    save_checkpoint,
)

# A narrow latent keeps the file small; its layout is the same.
SMALL = VAEConfig(28, 1, 1)
QUANTIZATION = Quantization({"encoder1": 1.0, "mu": 0.125, "decoder1": 68.4}, {"seed": 0}, {"worst": -0.1})
RECIPE = {"attacks": ["fgsm", "cw"], "kl_weight": 1e-05, "epochs": {"first": 3}, "note": 'quoted "é"'}


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    checkpoint = random_checkpoint(SMALL, 0)
    return replace(
        checkpoint, dataset="noise", recipe=RECIPE, accuracies={"A": 91.5}, versions={"numpy": np.__version__}
    )


@pytest.fixture(scope="module")
def good(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "good.safetensors"
    save_checkpoint(path, small)
    return path.read_bytes()


@pytest.fixture(scope="module")
def good_int8(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "int8.safetensors"
    save_checkpoint(path, replace(small, quantization=QUANTIZATION))
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "damaged.safetensors"


def refuse(path: Path, raw: bytes, match: str | None = None) -> None:
    """``raw`` as a file raises exactly CheckpointError, naming the file."""
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path)
    assert type(caught.value) is CheckpointError
    assert str(path) in str(caught.value)


def header_of(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(safetensors header, our header, tensor bytes)."""
    (length,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + length])
    return outer, json.loads(outer["__metadata__"][METADATA_KEY]), raw[8 + length :]


def with_outer(outer: object, data: bytes) -> bytes:
    text = outer if isinstance(outer, bytes) else json.dumps(outer).encode()
    return struct.pack("<Q", len(text)) + text + data


def signed(header: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """A file with a right digest, as a hostile writer would make it."""
    header = {**header, "digest": module._digest(header, tensors)}
    return save(tensors, {METADATA_KEY: module._canonical(header)})


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize(
    "config",
    [VAEConfig(28, 1), VAEConfig(32, 3), VAEConfig(64, 3, 32), VAEConfig(28, 4, 3)],
    ids=["28", "32x3", "64x3", "28x4"],
)
def test_round_trip(config: VAEConfig, dtype: type, tmp_path: Path) -> None:
    written = random_checkpoint(config, 1)
    tensors = {name: tensor.astype(dtype) for name, tensor in written.tensors.items()}
    written = replace(
        written, tensors=tensors, dataset="noise", recipe=RECIPE, accuracies={"A": 91.5}, versions={"a": "1"}
    )
    digest = save_checkpoint(tmp_path / "new" / "folder" / "a.safetensors", written)
    read = load_checkpoint(tmp_path / "new" / "folder" / "a.safetensors")
    assert read.config == config
    assert (read.dataset, read.recipe, read.accuracies, read.versions) == ("noise", RECIPE, {"A": 91.5}, {"a": "1"})
    assert read.digest == digest
    assert read.bounds == (0.0, 1.0)
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == dtype
        np.testing.assert_array_equal(read.tensors[name], tensor)
        assert not read.tensors[name].flags.writeable


def test_round_trip_of_odd_descriptions(small: Checkpoint, tmp_path: Path) -> None:
    odd = {"steps": (1, 2), 10: "ten", 2: "two", None: 0.1, "lone": "\ud800", "tiny": 5e-324}
    save_checkpoint(tmp_path / "a", replace(small, recipe=odd))
    read = load_checkpoint(tmp_path / "a").recipe
    assert read == {"steps": [1, 2], "10": "ten", "2": "two", "null": 0.1, "lone": "\ud800", "tiny": 5e-324}


def test_digest_is_of_the_contents(small: Checkpoint, tmp_path: Path) -> None:
    first, again = save_checkpoint(tmp_path / "a", small), save_checkpoint(tmp_path / "b", small)
    assert first == again
    assert save_checkpoint(tmp_path / "c", replace(small, dataset="other")) != first
    tensors = dict(small.tensors)
    tensors["mu.bias"] = tensors["mu.bias"] + np.float32(1)
    assert save_checkpoint(tmp_path / "d", replace(small, tensors=tensors)) != first


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_truncated(good: bytes, scratch: Path, data: st.DataObject) -> None:
    header = 8 + struct.unpack("<Q", good[:8])[0]
    length = data.draw(st.integers(0, header + 64) | st.integers(0, len(good) - 1))
    refuse(scratch, good[:length])


def test_lengthened(good: bytes, scratch: Path) -> None:
    refuse(scratch, good + b"\0")
    refuse(scratch, good + good)


@settings(deadline=None, max_examples=250)
@given(data=st.data())
def test_one_bit_flipped(good: bytes, scratch: Path, data: st.DataObject) -> None:
    header = 8 + struct.unpack("<Q", good[:8])[0]
    bit = data.draw(st.integers(0, 8 * header - 1) | st.integers(0, 8 * len(good) - 1))
    raw = bytearray(good)
    raw[bit // 8] ^= 1 << bit % 8
    refuse(scratch, bytes(raw))


def test_every_bit_of_the_header(good: bytes) -> None:
    """No flip there goes unseen, not even one that keeps the meaning: 1e-05 and 1E-05 are one number."""
    _, header, data = header_of(good)
    text = module._canonical(header)
    good = good[: len(good) - len(data)]
    assert b"1e-05" in good
    refused = 0
    start = good.index(METADATA_KEY.encode()) + len(METADATA_KEY) + 3
    for bit in range(8 * start, 8 * (start + len(json.dumps(text)) - 2)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        try:
            changed = module._read_header(bytes(raw))
        except ValueError:
            refused += 1
        else:
            assert module._canonical(changed) != text  # then the digest does not match, or the digest itself is damaged
    assert 0 < refused < 8 * len(text)


@settings(deadline=None, max_examples=100)
@given(raw=st.binary(max_size=300))
def test_noise(scratch: Path, raw: bytes) -> None:
    refuse(scratch, raw)


@settings(deadline=None, max_examples=40)
@given(
    text=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
)
def test_any_json_for_a_header(good: bytes, scratch: Path, text: object) -> None:
    outer, _, data = header_of(good)
    refuse(scratch, with_outer(text, data))
    refuse(scratch, with_outer({**outer, "__metadata__": text}, data))
    refuse(scratch, with_outer({**outer, "__metadata__": {METADATA_KEY: text}}, data))
    refuse(scratch, with_outer({**outer, "__metadata__": {METADATA_KEY: json.dumps(text)}}, data))


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(2**64 - 1, id="2**64-1"),
        pytest.param(2**63, id="2**63"),
        pytest.param(10**9, id="1 GB"),
        pytest.param((1 << 20) + 1, id="just above the limit"),
        pytest.param(0, id="zero"),
        pytest.param(1, id="one"),
    ],
)
def test_header_length(good: bytes, scratch: Path, length: int) -> None:
    refuse(scratch, struct.pack("<Q", length) + good[8:] + bytes(1 << 20), "safetensors header")


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"[" * 500_000, id="deep lists"),
        pytest.param(b'{"a":' * 150_000, id="deep objects"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="deep and closed"),
        pytest.param(b"9" * 100_000, id="long integer"),
        pytest.param(b"1e" + b"9" * 1000, id="huge exponent"),
        pytest.param(b'{"a":NaN}', id="NaN"),
        pytest.param(b"\xff\xfe" * 10, id="not UTF-8"),
        pytest.param(b'{"__metadata__":{"defense_vae_fast":"' + b"[" * 400_000 + b'"}}', id="deep inner header"),
    ],
)
def test_json_bombs(good: bytes, scratch: Path, bomb: bytes) -> None:
    refuse(scratch, with_outer(bomb, header_of(good)[2]))


def edit(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(edit("format", 2), "expected format 1, got 2", id="newer format"),
        pytest.param(lambda header: header.pop("format"), "expected format 1, got None", id="no format"),
        pytest.param(
            edit("architecture", {"image_size": 32, "channels": 1, "latent_dim": 1}), "tensors missing", id="deeper"
        ),
        pytest.param(
            edit("architecture", {"image_size": 28, "channels": 3, "latent_dim": 1}), "expected shape", id="channels"
        ),
        pytest.param(
            edit("architecture", {"image_size": 28, "channels": 1, "latent_dim": 2}), "expected shape", id="latent"
        ),
        pytest.param(
            edit("architecture", {"image_size": 30, "channels": 1, "latent_dim": 1}), "expected one of", id="size 30"
        ),
        pytest.param(edit("architecture", {"image_size": 28, "channels": 1}), "expected the keys", id="missing key"),
        pytest.param(edit("architecture", [28, 1, 1]), "'architecture': expected dict, got list", id="a list"),
        pytest.param(
            edit("architecture", {"image_size": 10**400, "channels": 1, "latent_dim": 1}), "expected", id="10**400"
        ),
        pytest.param(edit("bounds", [-1.0, 1.0]), "expected image bounds", id="other bounds"),
        pytest.param(edit("dataset", None), "'dataset': expected str", id="no data set"),
        pytest.param(edit("recipe", []), "'recipe': expected dict", id="recipe is a list"),
        pytest.param(edit("accuracies", 1), "'accuracies': expected dict", id="accuracies are a number"),
        pytest.param(edit("versions", "1"), "'versions': expected dict", id="versions are a string"),
    ],
)
def test_header_with_a_right_digest(
    good: bytes, scratch: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    header = header_of(good)[1]
    del header["digest"]
    change(header)
    refuse(scratch, signed(header, load(good)), message)


def test_signed_as_written_is_accepted(good: bytes, scratch: Path) -> None:
    """The two tests around would pass for the wrong reason if ``signed`` made bad files."""
    header = header_of(good)[1]
    digest = header.pop("digest")
    scratch.write_bytes(signed(header, load(good)))
    assert load_checkpoint(scratch).digest == digest


def test_round_trip_of_int8_scales(small: Checkpoint, good: bytes, good_int8: bytes, scratch: Path) -> None:
    scratch.write_bytes(good_int8)
    read = load_checkpoint(scratch)
    assert read.quantization == QUANTIZATION
    scratch.write_bytes(good)
    without = load_checkpoint(scratch)
    assert without.quantization is None
    assert without.digest != read.digest
    assert "quantization" not in header_of(good)[1]  # a file without scales is what it was before there were any
    tensors = {name: (value.dtype, value.tobytes()) for name, value in without.tensors.items()}
    assert tensors == {name: (value.dtype, value.tobytes()) for name, value in read.tensors.items()}


def scales(**amax: object) -> Callable[[dict[str, Any]], None]:
    return edit("quantization", {"amax": amax, "recipe": {}, "accuracies": {}})


SCALE_DAMAGE = [
    pytest.param(edit("quantization", None), "'quantization': expected dict, got NoneType", id="null"),
    pytest.param(edit("quantization", [1.0]), "'quantization': expected dict, got list", id="a list"),
    pytest.param(edit("quantization", {"amax": {"mu": 1.0}}), "expected the keys", id="keys missing"),
    pytest.param(
        edit("quantization", {"amax": {"mu": 1.0}, "recipe": {}, "accuracies": {}, "code": ""}),
        "expected the keys",
        id="a key too many",
    ),
    pytest.param(
        edit("quantization", {"amax": [1.0], "recipe": {}, "accuracies": {}}), "'amax': expected dict", id="amax list"
    ),
    pytest.param(
        edit("quantization", {"amax": {"mu": 1.0}, "recipe": 1, "accuracies": {}}), "'recipe': expected", id="recipe"
    ),
    pytest.param(
        edit("quantization", {"amax": {"mu": 1.0}, "recipe": {}, "accuracies": ""}),
        "'accuracies': exp",
        id="accuracies",
    ),
    pytest.param(scales(), "amax: expected some of encoder1", id="no layer"),
    pytest.param(scales(encoder9=1.0), "amax: expected some of encoder1", id="unknown layer"),
    pytest.param(scales(logvar=1.0), "amax: expected some of encoder1", id="a layer that inference leaves out"),
    pytest.param(scales(mu=0.0), "amax of mu: expected a number from", id="zero"),
    pytest.param(scales(mu=-1.0), "amax of mu: expected a number from", id="negative"),
    pytest.param(scales(mu=5e-324), "amax of mu: expected a number from", id="denormal"),
    pytest.param(scales(mu=1e300), "amax of mu: expected a number from", id="overflows float32"),
    pytest.param(scales(mu=10**400), "amax of mu: expected a number from", id="10**400"),
    pytest.param(scales(mu=True), "amax of mu: expected a number from", id="bool"),
    pytest.param(scales(mu="1.0"), "amax of mu: expected a number from", id="string"),
    pytest.param(scales(mu=[1.0]), "amax of mu: expected a number from", id="per channel"),
    pytest.param(scales(mu=None), "amax of mu: expected a number from", id="none"),
    pytest.param(scales(encoder1=0.5), "amax of encoder1: expected 1.0", id="image bound"),
]


@pytest.mark.parametrize(("change", "message"), SCALE_DAMAGE)
def test_int8_scales_with_a_right_digest(
    good_int8: bytes, scratch: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    header = header_of(good_int8)[1]
    del header["digest"]
    change(header)
    refuse(scratch, signed(header, load(good_int8)), message)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_one_bit_flipped_with_int8_scales(good_int8: bytes, scratch: Path, data: st.DataObject) -> None:
    header = 8 + struct.unpack("<Q", good_int8[:8])[0]
    bit = data.draw(st.integers(0, 8 * header - 1))
    raw = bytearray(good_int8)
    raw[bit // 8] ^= 1 << bit % 8
    refuse(scratch, bytes(raw))


@pytest.mark.parametrize("amax", [{}, {"mu": float("nan")}, {"mu": 0.0}, {"nothing": 1.0}, {"encoder1": 2.0}], ids=str)
def test_bad_int8_scales_are_not_written(small: Checkpoint, tmp_path: Path, amax: dict[str, float]) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        save_checkpoint(tmp_path / "a", replace(small, quantization=Quantization(amax)))
    assert not list(tmp_path.iterdir())


def fill(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    return change


def cast(name: str, dtype: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensors[name].astype(dtype)})


TENSOR_DAMAGE = [
    pytest.param(fill("encoder2.weight", np.nan), "encoder2.weight: holds NaN or infinity", id="NaN"),
    pytest.param(fill("decoder5.bias", np.inf), "decoder5.bias: holds NaN or infinity", id="infinity"),
    pytest.param(
        fill("encoder1.norm.running_var", -1e-3), "running_var: a variance is negative", id="negative variance"
    ),
    pytest.param(fill("decoder2.norm.running_var", -np.inf), "holds NaN or infinity", id="infinite variance"),
    pytest.param(
        lambda tensors: tensors.pop("mu.bias"), "tensors missing for the 28x28 network: mu.bias", id="missing"
    ),
    pytest.param(
        lambda tensors: tensors.update({"fc3_bn.weight": np.ones(2, np.float32)}),
        "does not have: fc3_bn.weight",
        id="extra",
    ),
    pytest.param(cast("mu.weight", "f8"), "mu.weight: expected float16 or float32, got float64", id="float64"),
    pytest.param(cast("mu.weight", "i4"), "mu.weight: expected float16 or float32, got int32", id="int32"),
    pytest.param(cast("mu.weight", "?"), "mu.weight: expected float16 or float32, got bool", id="bool"),
    pytest.param(
        lambda tensors: tensors.update({"mu.weight": tensors["mu.weight"].T.copy()}), "expected shape", id="transposed"
    ),
    pytest.param(lambda tensors: tensors.clear(), "tensors missing", id="none at all"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_DAMAGE)
def test_tensors_with_a_right_digest(
    good: bytes, scratch: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    tensors = load(good)
    change(tensors)
    header = header_of(good)[1]
    del header["digest"]
    refuse(scratch, signed(header, tensors), message)


@pytest.mark.parametrize(("change", "message"), TENSOR_DAMAGE)
def test_bad_tensors_are_not_written(
    small: Checkpoint, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    tensors = dict(small.tensors)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "a", replace(small, tensors=tensors))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F64", "U32", "C64", "NONE"])
def test_dtypes_of_safetensors(good: bytes, scratch: Path, dtype: str) -> None:
    outer, _, data = header_of(good)
    outer["decoder5.bias"]["dtype"] = dtype
    refuse(scratch, with_outer(outer, data))


def test_other_models(scratch: Path, good: bytes) -> None:
    refuse(scratch, save({"weight": np.zeros((2, 2), np.float32)}), "is it another model's file")
    refuse(scratch, save({"weight": np.zeros((2, 2), np.float32)}, {"format": "pt"}), "is it another model's file")
    refuse(scratch, b"PK\x03\x04" + bytes(5000))  # torch.save writes a zip of pickles
    refuse(scratch, b"", "length of 0")
    header = header_of(good)[1]
    refuse(
        scratch, save({"weight": np.zeros(2, np.float32)}, {METADATA_KEY: module._canonical(header)}), "tensors missing"
    )


@pytest.mark.parametrize(
    "name",
    ["no-such-name", "../fashion_mnist", "", "a\0b", "x" * 5000],
    ids=["unknown", "outside", "empty", "NUL", "long"],
)
def test_no_such_file(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, and not one of the shipped names"):
        load_checkpoint(name)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [None, 3, b"fashion_mnist", ["fashion_mnist"]], ids=str)
def test_not_a_path(value: Any) -> None:
    with pytest.raises(TypeError, match="checkpoint: expected a name or a path, got"):
        load_checkpoint(value)


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(module.MAX_FILE_BYTES + 1)  # takes no room on the disk
    with pytest.raises(CheckpointError, match="expected at most"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", list_pretrained())
def test_shipped(name: str) -> None:
    checkpoint = load_checkpoint(name)
    assert checkpoint.dataset
    assert checkpoint.recipe
    assert checkpoint.accuracies


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param({"loss": float("nan")}, id="NaN"),
        pytest.param({"seed": np.int64(3)}, id="NumPy integer"),
        pytest.param({"path": Path("a")}, id="path"),
        pytest.param({(1, 2): 3}, id="tuple as key"),
    ],
)
def test_descriptions_that_json_cannot_hold(small: Checkpoint, tmp_path: Path, recipe: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="expected what JSON can hold"):
        save_checkpoint(tmp_path / "a", replace(small, recipe=recipe))
    assert not list(tmp_path.iterdir())


def test_header_too_long_to_be_read_again(small: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a safetensors header of at most"):
        save_checkpoint(tmp_path / "a", replace(small, recipe={"log": "x" * module.MAX_HEADER_BYTES}))
    assert not list(tmp_path.iterdir())


def test_save_replaces_and_leaves_nothing_beside(small: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", small)
    digest = save_checkpoint(tmp_path / "a", replace(small, dataset="second"))
    assert load_checkpoint(tmp_path / "a").digest == digest
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_failing_write_leaves_the_old_file(small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = save_checkpoint(tmp_path / "a", small)

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "a", replace(small, dataset="second"))
    assert load_checkpoint(tmp_path / "a").digest == digest
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_written_with_the_usual_permissions(small: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "a", small)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
