"""Data sets: IDX files, image folders, the split, and what happens when they are missing or damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import data
from training.data import load_dataset, read_idx, to_float, to_uint8


@pytest.mark.parametrize("intact", [True, False], ids=["intact", "other-contents"])
def test_a_download_is_checked_before_it_is_kept(
    intact: bool, idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server on this machine that has the files under the publisher's names."""
    served = tmp_path / "served"
    served.mkdir()
    digests = {}
    for stem in data._FASHION_MNIST_SHA256:
        raw = read_idx(data._idx_path(idx_folder, stem))
        write_idx(served / f"{stem}.gz", raw, compress=True)
        digests[stem] = hashlib.sha256(gzip.decompress((served / f"{stem}.gz").read_bytes())).hexdigest()
    if not intact:
        digests["t10k-labels-idx1-ubyte"] = "0" * 64
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    monkeypatch.setattr(data, "_FASHION_MNIST_SHA256", digests)
    monkeypatch.setattr(data, "_DEBIAN_FOLDERS", {})
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv("DEFENSE_VAE_DATA", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "_FASHION_MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
        try:
            if intact:
                assert len(load_dataset("fashion_mnist").test) == 20
            else:
                with pytest.raises(FileNotFoundError, match=r"other contents.*--data DIR"):
                    load_dataset("fashion_mnist")
        finally:
            server.shutdown()
    assert intact == (tmp_path / "cache" / "defense-vae-fast" / "fashion_mnist" / "t10k-labels-idx1-ubyte").exists()


def write_idx(path: Path, array: np.ndarray, compress: bool) -> None:
    raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count, compress in (("train", 60, True), ("test", 20, False)):
        images, labels = data._IDX_FILES[part]
        ending = ".gz" if compress else ""
        write_idx(folder / f"{images}{ending}", random.integers(0, 256, (count, 28, 28)), compress)
        write_idx(folder / f"{labels}{ending}", random.integers(0, 10, count), compress)
    return folder


@pytest.mark.parametrize("where", ["folder", "parent", "environment"])
def test_idx_files_are_found(where: str, idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEFENSE_VAE_DATA", raising=False)
    if where == "environment":
        monkeypatch.setenv("DEFENSE_VAE_DATA", str(idx_folder.parent))
    loaded = load_dataset("mnist", {"folder": idx_folder, "parent": idx_folder.parent}.get(where))
    assert loaded.train.images.shape == (54, 1, 28, 28)
    assert loaded.validation.images.shape == (6, 1, 28, 28)
    assert loaded.test.images.shape == (20, 1, 28, 28)
    everything = read_idx(idx_folder / "train-images-idx3-ubyte.gz")
    joined = torch.cat([loaded.train.images, loaded.validation.images])
    assert np.array_equal(joined.squeeze(1).numpy(), everything)
    assert loaded.classes == 10


def test_missing_data_names_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFENSE_VAE_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"elsewhere.*--data DIR or \$DEFENSE_VAE_DATA"):
        load_dataset("mnist")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file"),
        (b"\x00\x00\x0d\x03" + bytes(40), "expected an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x03\x00\x00", "header is cut short"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "expected 5 bytes of data"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x03abc")[:-6], "damaged gzip"),
    ],
    ids=["empty", "float-idx", "short-header", "short-data", "cut-gzip"],
)
def test_damaged_idx(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_label_count_must_match(idx_folder: Path) -> None:
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.zeros(19), compress=False)
    with pytest.raises(ValueError, match="20 test images but 19 labels"):
        load_dataset("mnist", idx_folder)


def image_folder(root: Path, per_class: int, size: int, mode: str) -> None:
    random = np.random.default_rng(1)
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            shape = (size, size, 3) if mode == "RGB" else (size, size)
            Image.fromarray(random.integers(0, 256, shape).astype(np.uint8), mode).save(root / name / f"{number}.png")


@pytest.mark.parametrize(("mode", "channels", "size"), [("L", 1, 28), ("RGB", 3, 32)], ids=["gray28", "rgb32"])
def test_image_folder(mode: str, channels: int, size: int, tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", 30, size, mode)
    loaded = load_dataset(str(tmp_path / "pets"))
    assert loaded.name == "pets"
    assert loaded.class_names == ("cats", "dogs")
    assert loaded.train.images.shape[1:] == (channels, size, size)
    assert len(loaded.train) + len(loaded.validation) + len(loaded.test) == 60
    assert len(loaded.test) == 6
    pixels = np.asarray(Image.open(tmp_path / "pets" / "dogs" / "7.png")).reshape(size, size, channels)
    parts = (loaded.train, loaded.validation, loaded.test)
    found = [
        int(part.labels[row])
        for part in parts
        for row in range(len(part))
        if np.array_equal(part.images[row].permute(1, 2, 0).numpy(), pixels)
    ]
    assert found == [1]


def test_image_folder_with_its_own_test_part(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 20, 28, "L")
    image_folder(tmp_path / "test", 5, 28, "L")
    loaded = load_dataset(str(tmp_path))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (36, 4, 10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "empty").mkdir(), "expected images of this class"),
        (lambda root: Image.new("L", (28, 28)).save(root / "cats" / "small.png"), "one side"),
        (lambda root: Image.new("I;16", (32, 32)).save(root / "cats" / "deep.png"), "got Pillow mode I;16"),
        (lambda root: Image.new("RGBA", (32, 32)).save(root / "cats" / "clear.png"), "got Pillow mode RGBA"),
        (lambda root: (root / "cats" / "bad.png").write_bytes(b"not an image"), "not a readable image"),
    ],
    ids=["empty-class", "two-sizes", "16-bit", "alpha", "unreadable"],
)
def test_bad_image_folder(spoil: object, message: str, tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", 12, 32, "L")
    assert callable(spoil)
    spoil(tmp_path / "pets")
    with pytest.raises(ValueError, match=message):
        load_dataset(str(tmp_path / "pets"))


def test_a_folder_named_like_a_data_set_is_not_that_data_set(tmp_path: Path) -> None:
    image_folder(tmp_path / "fashion_mnist", 12, 28, "L")
    (tmp_path / "fashion_mnist" / ".hidden").mkdir()
    loaded = load_dataset(str(tmp_path / "fashion_mnist"))
    assert loaded.name == "fashion_mnist-folder"
    assert loaded.class_names == ("cats", "dogs")


def test_too_few_images(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", 4, 28, "L")
    with pytest.raises(ValueError, match="expected 10 or more training images"):
        load_dataset(str(tmp_path / "pets"))


def test_test_classes_must_be_training_classes(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 20, 28, "L")
    image_folder(tmp_path / "test", 5, 28, "L")
    (tmp_path / "test" / "dogs").rename(tmp_path / "test" / "wolves")
    with pytest.raises(ValueError, match="got also wolves"):
        load_dataset(str(tmp_path))


def test_other_images_do_not_pass_for_fashion_mnist(idx_folder: Path) -> None:
    with pytest.raises(ValueError, match="expected Fashion-MNIST as published"):
        load_dataset("fashion_mnist", idx_folder)


def test_a_named_folder_is_the_only_one_searched(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFENSE_VAE_DATA", str(idx_folder))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_dataset("mnist", idx_folder / "nowhere")


def test_unsupported_image_size(tmp_path: Path) -> None:
    image_folder(tmp_path / "pets", 12, 30, "L")
    with pytest.raises(ValueError, match=r"28, 32, 64.*resize or crop"):
        load_dataset(str(tmp_path / "pets"))


def test_every_byte_survives_the_float_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)


def cifar10_zip(path: Path, *, side: int = 32, test_classes: tuple[str, ...] = ("cat", "ship")) -> None:
    """A few made-up images in the layout of the JPEG copy: cats dark, ships light."""
    with zipfile.ZipFile(path, "w") as archive:
        for part, names, count in (("train", ("cat", "ship"), 20), ("test", test_classes, 5)):
            for name in names:
                for number in range(count):
                    raw = io.BytesIO()
                    level = number + (200 if name == "ship" else 0)
                    Image.new("RGB", (side, side), (level, level, level)).save(raw, "JPEG", quality=95)
                    archive.writestr(f"{part}/{name}/{number:04}.jpg", raw.getvalue())
        archive.writestr("README.txt", "not an image")


def test_cifar10_jpeg_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10_zip(tmp_path / "cifar10_jpeg.zip")
    monkeypatch.setenv("DEFENSE_VAE_DATA", str(tmp_path))
    loaded = load_dataset("cifar10_jpeg")
    assert loaded.name == "cifar10_jpeg"
    assert loaded.class_names == ("cat", "ship")
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [36, 4, 10]
    for part in (loaded.train, loaded.validation, loaded.test):
        light = part.images.float().mean((1, 2, 3)) > 100
        assert torch.equal(light.long(), part.labels)
    assert loaded.train.images.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"PK no zip"), "damaged zip"),
        (lambda path: cifar10_zip(path, side=28), "expected 32x32 RGB"),
        (lambda path: cifar10_zip(path, test_classes=("cat",)), "the same two or more classes"),
        (lambda path: path.unlink(), "looked in"),
    ],
    ids=["damaged", "size", "classes", "missing"],
)
def test_bad_cifar10(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cifar10_jpeg.zip"
    path.touch()
    spoil(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_dataset("cifar10_jpeg", tmp_path)


def celeba(folder: Path) -> None:
    """Eight made-up faces in CelebA's own file format: light ones male, and a frame that the crop takes off."""
    (folder / "img_align_celeba").mkdir(parents=True)
    attributes, partition = ["8", "Bald Male Young"], []
    for number, part in enumerate((0, 0, 0, 0, 1, 1, 2, 2), 1):
        male = number % 2 == 0
        face = Image.new("RGB", (178, 218), (255, 0, 0))
        face.paste((200, 200, 200) if male else (50, 50, 50), (0, 20, 178, 198))
        face.save(folder / "img_align_celeba" / f"{number:06}.jpg", quality=95)
        attributes.append(f"{number:06}.jpg -1 {'1' if male else '-1'}  1")
        partition.append(f"{number:06}.jpg {part}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")


def test_celeba_labels_by_gender_and_keeps_the_official_split(tmp_path: Path) -> None:
    celeba(tmp_path / "celeba")
    loaded = load_dataset("celeba", tmp_path)
    assert loaded.class_names == ("female", "male")
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [4, 2, 2]
    for part in (loaded.train, loaded.validation, loaded.test):
        assert part.images.shape[1:] == (3, 64, 64)
        assert part.labels.tolist() == [0, 1] * (len(part) // 2)
        for image, label in zip(part.images.float(), part.labels, strict=True):
            assert (image - (200 if label else 50)).abs().max() < 60  # no red frame is left


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("list_attr_celeba.txt", "8\nBald Young\n", "expected CelebA's list"),
        ("list_attr_celeba.txt", "1\nBald Male Young\n000001.jpg 1 1\n", "line 3: expected 3 values"),
        ("list_eval_partition.txt", "000001.jpg 7\n", "line 1: expected a file of"),
        ("list_eval_partition.txt", "000001.jpg 0\n000002.jpg 2\n", "got none in 1"),
        ("img_align_celeba/000003.jpg", "no image", "not a readable image"),
    ],
    ids=["no-gender", "short-line", "part", "empty-part", "image"],
)
def test_bad_celeba(file: str, text: str, message: str, tmp_path: Path) -> None:
    celeba(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset("celeba", tmp_path)
