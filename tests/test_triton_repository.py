"""Model repositories for Triton: what is written and what is left alone. tests/integration starts the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from defense_vae_fast import Purifier, cli
from defense_vae_fast.checkpoint import load_checkpoint
from defense_vae_fast.integrations import triton_server
from defense_vae_fast.integrations.triton_server import Batching, config, write_model


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_python_model_holds_its_checkpoint_and_says_so(tmp_path: Path, checkpoint_path: Path) -> None:
    written = write_model(tmp_path / "models", checkpoint_path, engine="openvino", precision="fp32")
    assert written == tmp_path / "models" / "purifier"
    assert sorted(tree(written)) == ["1/checkpoint.safetensors", "1/model.py", "config.pbtxt"]
    digest = load_checkpoint(checkpoint_path).digest
    assert load_checkpoint(written / "1" / "checkpoint.safetensors").digest == digest
    text = (written / "config.pbtxt").read_text()
    for part in (
        'backend: "python"', "max_batch_size: 64", '"images" data_type: TYPE_UINT8 dims: [28, 28, 1]',
        "preferred_batch_size: [8, 16, 32, 64]", digest, '"openvino"', '"fp32"',
    ):  # fmt: skip
        assert part in text
    assert "max_queue_size" not in text, "a limit makes Triton's batcher oversleep"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "models"], "nothing is left beside the repository"


def test_the_onnx_model_is_the_purifier(tmp_path: Path, checkpoint_path: Path) -> None:
    written = write_model(tmp_path, checkpoint_path, name="graph", backend="onnx", kind="float")
    assert sorted(tree(written)) == ["1/model.onnx", "config.pbtxt"]
    assert 'backend: "onnxruntime"' in (written / "config.pbtxt").read_text()
    images = np.random.default_rng(0).random((3, 1, 28, 28), dtype=np.float32)
    session = onnxruntime.InferenceSession(written / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    purified, score = session.run(["purified", "score"], {"images": images})
    with Purifier.from_pretrained(checkpoint_path, precision="fp32") as purifier:
        expected, scores = purifier(images, return_score=True)
    np.testing.assert_allclose(purified, expected, atol=1e-4)
    np.testing.assert_allclose(score, scores, atol=1e-4)


def test_the_configuration_of_a_plan_names_the_profile_of_all_batches(checkpoint_path: Path) -> None:
    network = load_checkpoint(checkpoint_path).config
    text = config("plan", "tensorrt", network, "uint8", Batching(max_batch=16, preferred=(16, 8, 99)), 2, profile=3)
    assert 'instance_group [ { kind: KIND_GPU count: 2 profile: ["3"] } ]' in text
    assert "preferred_batch_size: [8, 16]\n" in text
    assert "preferred_batch_size" not in config("plan", "onnx", network, "uint8", Batching(4))


def test_a_model_is_replaced_only_when_asked_and_only_our_own(tmp_path: Path, checkpoint_path: Path) -> None:
    written = write_model(tmp_path, checkpoint_path)
    before = tree(written)
    with pytest.raises(FileExistsError, match="use --force to replace it"):
        write_model(tmp_path, checkpoint_path)
    assert tree(written) == before
    write_model(tmp_path, checkpoint_path, batching=Batching(max_delay_us=700), force=True)
    assert "max_queue_delay_microseconds: 700" in (written / "config.pbtxt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["purifier"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: (model / "config.pbtxt").write_text('name: "purifier"\n'), "that defense-vae-fast wrote"),
        (lambda model: (model / "config.pbtxt").unlink(), "that defense-vae-fast wrote"),
        (lambda model: (model / "2").mkdir(), "got 2 among them"),
        (lambda model: (model / "1" / "labels.txt").write_text("shoe"), "got 1/labels.txt among them"),
        (lambda model: (shutil.rmtree(model), model.write_text("")), "got something else"),
        (lambda model: (model.rename(model.parent / "x"), model.symlink_to("x")), "got something else"),
    ],
    ids=["config", "no-config", "version", "file", "a-file", "a-link"],
)
def test_what_others_made_is_never_replaced(tmp_path: Path, checkpoint_path: Path, spoil: Any, reason: str) -> None:
    spoil(write_model(tmp_path, checkpoint_path))
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=reason):
        write_model(tmp_path, checkpoint_path, force=True)
    assert tree(tmp_path) == before


def test_a_failure_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "models", checkpoint_path)
    before = tree(tmp_path)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        write_model(tmp_path / "models", checkpoint_path, force=True)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_staging_is_not_in_the_repository(tmp_path: Path) -> None:
    """Triton takes any folder for a model, and one that is no model keeps the server from starting."""
    (tmp_path / "models").mkdir()
    assert triton_server._beside(tmp_path / "models") == tmp_path
    (tmp_path / "link").symlink_to("models")
    assert triton_server._beside(tmp_path / "link") == tmp_path


@pytest.mark.skipif(os.stat("/dev/shm").st_dev == os.stat("/dev").st_dev, reason="/dev/shm is no mount of its own")
def test_staging_stays_on_the_repositorys_file_system() -> None:
    assert triton_server._beside(Path("/dev/shm")) == Path("/dev/shm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../x"}, "name: expected letters"),
        ({"name": ""}, "name: expected letters"),
        ({"name": ".hidden"}, "name: expected letters"),
        ({"backend": "pytorch"}, "backend: expected one of python, onnx, tensorrt"),
        ({"kind": "half"}, "images: expected one of uint8, float"),
        ({"engine": "abacus"}, "engine: expected one of auto, "),
        ({"precision": "fp7"}, "precision: expected one of auto, "),
        ({"backend": "onnx", "precision": "fp7"}, "precision: expected fp32, fp16"),
        ({"backend": "onnx", "engine": "torch"}, "engine: expected with the backend python alone"),
        ({"instances": 0}, "instances: expected an int from 1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_write_nothing(
    tmp_path: Path, checkpoint_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "models", checkpoint_path, **options)
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batch": 0}, "max_batch: expected an int from 1"),
        ({"preferred": (0,)}, "preferred: expected an int from 1"),
        ({"max_delay_us": -1}, "max_delay_us: expected an int from 0"),
        ({"max_queue": 1.5}, "max_queue: expected an int from 0"),
    ],
    ids=str,
)
def test_bad_batching_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(**fields)


def test_the_command(tmp_path: Path, checkpoint_path: Path) -> None:
    words = ["triton-repository", str(tmp_path / "models"), "-c", str(checkpoint_path), "--max-delay", "250"]
    words += ["--preferred", "4", "--max-batch", "32", "--name", "mine"]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    assert f"tritonserver --model-repository={tmp_path / 'models'}" in result.stdout
    text = (tmp_path / "models" / "mine" / "config.pbtxt").read_text()
    assert "preferred_batch_size: [4]" in text
    assert "max_queue_delay_microseconds: 250" in text
    again = CliRunner().invoke(cli.main, words)
    assert again.exit_code == 2
    assert again.stderr.startswith("defense-vae-fast: ")
    assert "use --force to replace it" in again.stderr


def test_the_launcher_says_what_is_missing(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['pytriton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'pytriton' else find(name, *a)\n"
        "from defense_vae_fast.integrations.triton_launcher import main; sys.exit(main(sys.argv[1:]))"
    )

    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, check=False
        )

    done = launch(str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install 'defense-vae-fast[triton-server]'" in done.stderr
    missing = launch(str(tmp_path / "none"))
    assert missing.returncode == 2
    assert "expected a model repository, found no such folder" in missing.stderr
    assert launch().returncode == 2


def test_bulk_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "defense_vae_fast.integrations.ray_bulk", raising=False)
    for name in ("pyarrow", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(cli.main, ["bulk", str(tmp_path), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "pip install 'defense-vae-fast[ray]'" in result.stderr
