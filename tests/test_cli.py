"""The command line: run as a user runs it, on real files with a small random purifier."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from conftest import random_checkpoint
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import defense_vae_fast
from defense_vae_fast import Purifier, checkpoint, cli, demo, files

GRAY = np.random.default_rng(0).integers(0, 256, (70, 28, 28, 1), dtype=np.uint8)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def purify(model: Path, *words: str | Path) -> Result:
    return run("purify", *words, "--checkpoint", model)


def assert_one_line_error(result: Result, *parts: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("defense-vae-fast: ")
    for part in parts:
        assert part in lines[0]


def save_gray(path: Path, index: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GRAY[index, :, :, 0]).save(path, **options)
    return path


def load_gray(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).reshape(28, 28, 1)


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def unprintable(folder: Path, name: str) -> Path:
    """A path whose name holds a byte that is not UTF-8."""
    path = folder / name
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes only names that are UTF-8")
    path.unlink()
    return path


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding: another batch size may take another kernel."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    unit = 1 if got.dtype == np.uint8 else 255
    assert np.abs(got.astype(float) - expected.astype(float)).max() * unit <= 2


@pytest.fixture
def model(checkpoint_path: Path) -> Path:
    return checkpoint_path


@pytest.fixture
def purifier(model: Path) -> Iterator[Purifier]:
    with Purifier.from_pretrained(model) as purifier:
        yield purifier


# --- purify: what is written -----------------------------------------------------------------------------------------


def test_lossless_pictures_keep_name_format_and_mode(tmp_path, model, purifier):
    names = ["a.png", "b.PNG", "c.bmp", "d.tif", "e.tiff", "f.pgm"]
    sources = [save_gray(tmp_path / name, index) for index, name in enumerate(names)]
    result = purify(model, *sources, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "6 images in 6 files" in result.stdout
    assert tree(tmp_path / "out") == names
    for index, source in enumerate(sources):
        target = tmp_path / "out" / source.name
        with Image.open(source) as before, Image.open(target) as after:
            assert (after.format, after.mode, after.size) == (before.format, before.mode, before.size)
        assert_close(load_gray(target), purifier(GRAY[index]))
        assert not np.array_equal(load_gray(target), GRAY[index])


def test_a_jpeg_stays_a_jpeg_at_quality_95(tmp_path, model):
    source = save_gray(tmp_path / "shoe.jpg", quality=100)
    reference = save_gray(tmp_path / "reference.jpg", quality=95)
    assert purify(model, source, "-o", tmp_path / "out").exit_code == 0
    with Image.open(tmp_path / "out" / "shoe.jpg") as image, Image.open(reference) as expected:
        assert image.format == "JPEG"
        assert image.quantization == expected.quantization


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}], ids=["lossless", "lossy"])
def test_a_gray_webp_goes_through_a_gray_purifier_and_comes_back_gray(tmp_path, model, purifier, options):
    source = save_gray(tmp_path / "shoe.webp", **options)
    with Image.open(source) as image:
        green = np.asarray(image)[:, :, 1:2]  # Pillow decodes every WebP as RGB
    assert purify(model, source, "-o", tmp_path / "out").exit_code == 0
    with Image.open(tmp_path / "out" / "shoe.webp") as image:
        assert (image.format, image.mode) == ("WEBP", "RGB")
        got = np.asarray(image)
    assert (got == got[:, :, :1]).all()
    assert_close(got[:, :, :1], purifier(green))


@pytest.mark.parametrize("words", [["purify", "a.png", "-o"], ["demo", "-o"]], ids=["purify", "demo"])
def test_an_output_that_cannot_be_printed_is_escaped_on_a_strict_stdout(tmp_path, monkeypatch, stand_in, words):
    output = unprintable(tmp_path, "o\udcff.png")
    monkeypatch.chdir(tmp_path)
    save_gray(Path("a.png"))
    result = run(*words, output)  # click's runner has a strict UTF-8 stdout
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "o\\udcff.png" in result.stdout
    assert output.exists()


def test_rgb_pictures_go_through_a_colour_purifier(tmp_path):
    config = defense_vae_fast.VAEConfig(32, 3, 16)
    model = tmp_path / "colour.safetensors"
    checkpoint.save_checkpoint(model, random_checkpoint(config, 1))
    colours = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for suffix in (".png", ".webp", ".ppm"):
        Image.fromarray(colours).save(tmp_path / f"shoe{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    gray = save_gray(tmp_path / "gray.png")
    result = purify(
        model, *(tmp_path / f"shoe{suffix}" for suffix in (".png", ".webp", ".ppm")), gray, "-o", tmp_path / "o"
    )
    assert_one_line_error(result, "gray.png", "expected a 32x32 8-bit RGB image, got 28x28 in Pillow mode L", code=1)
    with Purifier.from_pretrained(model) as purifier:
        expected = purifier(colours)
    for suffix in (".png", ".webp", ".ppm"):  # all three keep the channels' order and lose nothing
        with Image.open(tmp_path / "o" / f"shoe{suffix}") as image:
            assert_close(np.asarray(image), expected)


def test_a_folder_is_searched_to_any_depth_and_keeps_relative_names(tmp_path, model, purifier):
    photos = tmp_path / "photos"
    for index in range(70):  # more than one batch
        save_gray(photos / ("deep/er" if index % 2 else "") / f"{index:02}.png", index)
    np.save(photos / "deep" / "frames.npy", GRAY[:3])
    save_gray(photos / ".hidden.png")
    (photos / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    assert purify(model, photos, "-o", out).exit_code == 0
    expected = purifier(GRAY)
    assert tree(out) == [name for name in tree(photos) if name not in (".hidden.png", "notes.txt")]
    for index in range(70):
        assert_close(load_gray(out / ("deep/er" if index % 2 else "") / f"{index:02}.png"), expected[index])


def test_a_second_run_does_not_purify_the_first_ones_results(tmp_path, model):
    save_gray(tmp_path / "shoe.png")
    words = (tmp_path, "-o", tmp_path / "clean")
    assert purify(model, *words).exit_code == 0
    assert purify(model, *words, "--force").exit_code == 0
    assert tree(tmp_path / "clean") == ["shoe.png"]


def test_npy_files_keep_shape_and_dtype(tmp_path, model, purifier):
    arrays = {
        "uint8-batch-of-70": GRAY,
        "uint8-batch-of-1": GRAY[:1],
        "uint8-HWC": GRAY[0],
        "uint8-HW": GRAY[0, :, :, 0],
        "float64-NCHW": GRAY[:5].transpose(0, 3, 1, 2).astype(np.float64) / 255,
        "float16-NCHW": (GRAY[:5].transpose(0, 3, 1, 2) / 255).astype(np.float16),
        "big-endian-CHW": (GRAY[2].transpose(2, 0, 1) / 255).astype(">f4"),
        "fortran-order": np.asfortranarray(GRAY[:7]),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    result = purify(model, *(tmp_path / f"{name}.npy" for name in arrays), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for name, array in arrays.items():
        got = np.load(tmp_path / "out" / f"{name}.npy", allow_pickle=False)
        assert_close(got, np.asarray(purifier(np.ascontiguousarray(array))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_array_of_an_npz_is_purified(tmp_path, model, purifier, save):
    arrays = {"many": GRAY[:66], "one": GRAY[0], "file": GRAY[3:5]}
    save(tmp_path / "sets.npz", **{name: array for name, array in arrays.items() if name != "file"})
    with zipfile.ZipFile(tmp_path / "sets.npz", "a") as archive, archive.open("file.npy", "w") as member:
        np.lib.format.write_array(member, arrays["file"])  # a name that numpy.savez itself cannot write
    assert purify(model, tmp_path / "sets.npz", "-o", tmp_path / "out").exit_code == 0
    with np.load(tmp_path / "out" / "sets.npz", allow_pickle=False) as results:
        assert set(results.files) == set(arrays)
        for name, array in arrays.items():
            assert_close(results[name], purifier(array))
    with zipfile.ZipFile(tmp_path / "out" / "sets.npz") as archive:
        kinds = {member.compress_type for member in archive.infolist()}
    assert kinds == {zipfile.ZIP_STORED if save is np.savez else zipfile.ZIP_DEFLATED}


def test_scores_name_every_image_in_order(tmp_path, model, purifier):
    save_gray(tmp_path / "in" / 'a, "b".png', 5)
    np.save(tmp_path / "in" / "frames.npy", GRAY)
    np.savez(tmp_path / "in" / "sets.npz", one=GRAY[1], two=GRAY[2:4])
    table = tmp_path / "scores.csv"
    assert purify(model, tmp_path / "in", "-o", tmp_path / "out", "--scores", table).exit_code == 0
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "score"]
    names = [
        'a, "b".png',
        *(f"frames.npy[{i}]" for i in range(70)),
        "sets.npz:one",
        "sets.npz:two[0]",
        "sets.npz:two[1]",
    ]
    assert [name for name, _ in rows] == names
    _, scores = purifier(GRAY, return_score=True)
    expected = [scores[5], *scores, scores[1], scores[2], scores[3]]
    np.testing.assert_allclose([float(score) for _, score in rows], expected, rtol=0, atol=1e-3)
    assert np.std(expected) > 5e-3  # or the order would not show


# --- purify: what is refused -----------------------------------------------------------------------------------------


def test_results_are_overwritten_by_force_alone_and_checked_before_any_work(tmp_path, model):
    save_gray(tmp_path / "in" / "a.png")
    save_gray(tmp_path / "in" / "b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"precious")
    result = purify(model, tmp_path / "in", "-o", tmp_path / "out")
    assert_one_line_error(result, "b.png exists already", "--force")
    assert tree(tmp_path / "out") == ["b.png"]
    assert (tmp_path / "out" / "b.png").read_bytes() == b"precious"
    assert purify(model, tmp_path / "in", "-o", tmp_path / "out", "--force").exit_code == 0
    assert load_gray(tmp_path / "out" / "b.png").shape == (28, 28, 1)


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["same-folder", "symbolic-link", "hard-link"])
def test_an_input_is_never_overwritten(tmp_path, model, link):
    source = save_gray(tmp_path / "in" / "a.png")
    out = tmp_path / "in"
    if link is not None:
        out = tmp_path / "out"
        out.mkdir()
        link(source, out / "a.png")
    before = source.read_bytes()
    assert_one_line_error(purify(model, source, "-o", out, "--force"), "is one of the inputs")
    assert source.read_bytes() == before


def test_two_inputs_with_one_output_are_an_error_before_work(tmp_path, model):
    first, second = save_gray(tmp_path / "x" / "a.png"), save_gray(tmp_path / "y" / "a.png")
    result = purify(model, first, second, "-o", tmp_path / "out", "--force")
    assert_one_line_error(result, str(first), str(second), "would both be written to")
    assert not (tmp_path / "out").exists()


def test_the_same_input_named_twice_is_purified_once(tmp_path, model):
    source = save_gray(tmp_path / "in" / "a.png")
    result = purify(model, source, tmp_path / "in", source, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "1 image in 1 file" in result.stdout


@pytest.mark.parametrize(
    ("out", "name", "part"),
    [
        ("out", "in/a.png", "is one of the inputs"),
        ("out", "out/a.png", "is also the name of a result"),
        ("out", "link/a.png", "is also the name of a result"),
        ("out", "out/sub", "is also the name of a folder for results"),
        ("out/new", "out/new", "is also the name of a folder for results"),
        ("out/new", "link/new", "is also the name of a folder for results"),
        ("out/new/er", "out/new", "is also the name of a folder for results"),
        ("out", "out", "is a directory"),
        ("out", "old.csv", "exists already; pass --force"),
        ("out", "missing/new.csv", "expected an existing folder"),
    ],
)
def test_scores_go_nowhere_unsafe(tmp_path, model, out, name, part):
    save_gray(tmp_path / "in" / "sub" / "b.png")
    source = save_gray(tmp_path / "in" / "a.png")
    before = source.read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "old.csv").write_text("precious")
    force = () if name == "old.csv" else ("--force",)
    result = purify(model, tmp_path / "in", "-o", tmp_path / out, "--scores", tmp_path / name, *force)
    assert_one_line_error(result, name, part)
    assert source.read_bytes() == before
    assert (tmp_path / "old.csv").read_text() == "precious"
    assert tree(tmp_path / "out") == []


def damage(kind: str, folder: Path) -> tuple[Path, str]:
    """A bad file and a part of what is said about it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bad.png"
    if kind == "text":
        path.write_text("no image")
        return path, "cannot identify image file"
    if kind == "empty":
        path.touch()
        return path, "cannot identify image file"
    if kind == "truncated":
        raw = save_gray(path).read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        return path, "truncated"
    if kind in ("RGB", "RGBA", "P", "1", "I;16"):
        Image.new(kind, (28, 28)).save(path)
        return path, f"expected a 28x28 8-bit gray image, got 28x28 in Pillow mode {kind}"
    if kind == "size":
        Image.new("L", (32, 30)).save(path)
        return path, "expected a 28x28 8-bit gray image, got 32x30"
    if kind == "frames":
        path = folder / "bad.tif"
        Image.new("L", (28, 28)).save(path, save_all=True, append_images=[Image.new("L", (28, 28), 9)])
        return path, "expected one frame"
    if kind == "npy-of-objects":
        path = folder / "bad.npy"
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        return path, "expected plain numbers, got Python objects, which are never unpickled"
    if kind == "npz-of-objects":
        path = folder / "bad.npz"
        np.savez(path, images=GRAY, more=np.array([{}], dtype=object))
        return path, "expected plain numbers, got Python objects, which are never unpickled"
    if kind == "npy-text":
        path = folder / "bad.npy"
        path.write_text("no array")
        return path, "expected a numpy file of plain numbers, got another kind"
    if kind == "npy-cut":
        path = folder / "bad.npy"
        np.save(path, GRAY)
        path.write_bytes(path.read_bytes()[:1000])
        return path, "expected a numpy file of plain numbers, got a damaged one"
    if kind == "npy-header":
        path = folder / "bad.npy"
        np.save(path, np.zeros(1, [(f"{number:0200}", "f4") for number in range(100)]))
        return path, "expected a numpy file of plain numbers, got a damaged one"
    if kind == "npz-deflate":
        path = folder / "bad.npz"
        np.savez_compressed(path, images=GRAY)
        raw = bytearray(path.read_bytes())
        raw[1000:1100] = bytes(100)
        path.write_bytes(bytes(raw))
        return path, "expected a numpy file of plain numbers, got a damaged one"
    if kind == "npz-with-text":
        path = folder / "bad.npz"
        np.savez(path, images=GRAY)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("notes.txt", "no array")
        return path, "expected arrays alone in a .npz file, got another kind of member, 'notes.txt'"
    if kind == "webp-with-colours":
        path = folder / "bad.webp"
        Image.new("RGB", (28, 28), (9, 9, 12)).save(path, lossless=True)
        return path, "expected a 28x28 8-bit gray image, got a WebP with colours"
    if kind == "npy-that-is-npz":
        path = folder / "bad.npy"
        np.savez(folder / "bad", GRAY)
        (folder / "bad.npz").rename(path)
        return path, "the other kind of numpy file"
    if kind == "npy-NaN":
        path = folder / "bad.npy"
        np.save(path, np.full((70, 1, 28, 28), np.nan, np.float32))
        return path, "NaN"
    if kind == "npy-no-images":
        path = folder / "bad.npy"
        np.save(path, GRAY[:0])
        return path, "expected at least one image"
    if kind == "npz-with-labels":
        path = folder / "bad.npz"
        np.savez(path, images=GRAY, labels=np.arange(70))
        return path, "array 'labels'"
    assert kind == "npz-empty"
    path = folder / "bad.npz"
    np.savez(path)
    return path, "expected at least one array"


BAD = [
    "text", "empty", "truncated", "RGB", "RGBA", "P", "1", "I;16", "size", "frames", "webp-with-colours",
    "npy-of-objects", "npz-of-objects", "npy-text", "npy-cut", "npy-header", "npy-that-is-npz", "npy-NaN",
    "npy-no-images", "npz-deflate", "npz-with-labels", "npz-with-text", "npz-empty",
]  # fmt: skip


def test_bad_files_are_reported_and_the_rest_go_on(tmp_path, model):
    photos = tmp_path / "in"
    parts = {}
    for number, kind in enumerate(BAD):
        path, part = damage(kind, photos / f"{number:02}")
        parts[str(path)] = part
    save_gray(photos / "00" / "good.png")
    save_gray(photos / "zz.png")
    result = purify(model, photos, "-o", tmp_path / "out")
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == len(BAD)
    for path, part in parts.items():
        (line,) = [line for line in lines if path in line]
        assert part in line
    assert "allow_pickle" not in result.stderr  # numpy's advice for objects, which would run what code the file holds
    assert tree(tmp_path / "out") == ["00/good.png", "zz.png"]
    assert f"2 images in 2 files purified into {tmp_path / 'out'}; {len(BAD)} inputs failed" in result.stdout


def test_a_missing_input_is_reported_and_the_rest_go_on(tmp_path, model):
    result = purify(model, tmp_path / "none.png", save_gray(tmp_path / "a.png"), "-o", tmp_path / "out")
    assert_one_line_error(result, "none.png: no such file", code=1)
    assert tree(tmp_path / "out") == ["a.png"]


def test_a_result_whose_folder_is_a_file_is_reported_and_the_rest_go_on(tmp_path, model):
    save_gray(tmp_path / "in" / "sub" / "a.png")
    save_gray(tmp_path / "in" / "b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").write_text("a file where a folder is needed")
    result = purify(model, tmp_path / "in", "-o", tmp_path / "out")
    assert_one_line_error(result, "a.png", code=1)
    assert tree(tmp_path / "out") == ["b.png", "sub"]


@pytest.mark.parametrize("kind", ["text", "size", "npy-NaN"])
def test_nothing_but_bad_files_is_exit_code_2(tmp_path, model, kind):
    path, part = damage(kind, tmp_path / "in")
    result = purify(model, path, "-o", tmp_path / "out")
    assert_one_line_error(result, str(path), part)


def test_debug_shows_the_traceback_of_a_bad_file(tmp_path, model):
    path, part = damage("text", tmp_path)
    result = purify(model, path, "-o", tmp_path / "out", "--debug")
    assert "Traceback" in result.stderr
    assert part in result.stderr.splitlines()[-1]


# --- usage and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["purify"], "Missing"),
        (["purify", "x.png"], "'--output' / '-o'"),
        (["purify", "nowhere.png", "-o", "out"], "nowhere.png: no such file"),
        (["purify", "", "-o", "out"], "'IN...': expected a path, got an empty one"),
        (["purify", "a.png", "-o", ""], "'--output' / '-o': expected a path, got an empty one"),
        (["purify", "a.png", "-o", "out", "--scores", ""], "'--scores': expected a path, got an empty one"),
        (["demo", "-o", ""], "'--output' / '-o': expected a path, got an empty one"),
        (["purify", "a.png", "-o", "out", "-c", ""], "checkpoint '': no such file"),
        (["purify", "notes.txt", "-o", "out"], "expected a file of one of the kinds .png"),
        (["purify", "empty", "-o", "out"], "in this folder, found none"),
        (["purify", "a.png", "-o", "notes.txt"], "expected a folder, got a file"),
        (["purify", "a.png", "-o", "out", "-c", "no_such"], "no_such"),
        (["purify", "a.png", "-o", "out", "-c", "notes.txt"], "not a usable Defense-VAE checkpoint"),
        (["purify", "a.png", "-o", "out", "-c", "MODEL", "--engine", "abacus"], "abacus"),
        (["purify", "a.png", "-o", "out", "-c", "MODEL", "--precision", "fp7"], "fp7"),
        (["demo", "--output", "sheet.txt"], "expected a name that ends in one of .png"),
        (["demo", "surplus"], "surplus"),
        (["dance"], "No such command 'dance'"),
        (["--loud"], "--loud"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(tmp_path, monkeypatch, model, words, part):
    monkeypatch.chdir(tmp_path)
    save_gray(Path("a.png"))
    Path("notes.txt").write_text("hello, this is not a checkpoint")
    Path("empty").mkdir()
    assert_one_line_error(run(*(model if word == "MODEL" else word for word in words)), part)
    assert not Path("out").exists()


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback_of_an_error(tmp_path, place):
    words = ["purify", save_gray(tmp_path / "a.png"), "-o", tmp_path / "out", "-c", "no_such"]
    result = run(*(["--debug", *words] if place == "before" else [*words, "--debug"]))
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "FileNotFoundError" in result.stderr


def test_no_command_shows_the_help_and_is_an_error():
    result = run()
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("words", [[], ["demo"], ["purify"], ["info"]], ids=lambda words: "-".join(words) or "group")
def test_help_has_examples(words):
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"defense-vae-fast {' '.join(words)}".rstrip() in result.stdout


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"defense-vae-fast {defense_vae_fast.__version__}\n"


# --- as a process ----------------------------------------------------------------------------------------------------

COMMAND = (sys.executable, "-c", "from defense_vae_fast.cli import main; main()")
BLOCK_TORCH = "import sys; sys.modules['torch'] = None; from defense_vae_fast.cli import main; main()"


def test_help_loads_no_engine_and_no_table_maker():
    program = (
        "import sys; from defense_vae_fast.cli import main\n"
        "try: main(['purify', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('openvino', 'torch', 'onnx', 'rich', 'PIL') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    usage, *_, loaded = output.splitlines()
    assert usage.startswith("Usage:")
    assert loaded == "[]"


def test_ctrl_c_ends_with_130_and_without_traceback_or_halves(tmp_path, model):
    # The picture is written first; the frames take long enough that the signal arrives in their middle.
    np.save(tmp_path / "frames.npy", np.zeros((60_000, 28, 28, 1), np.uint8))
    out = tmp_path / "out"
    words = [*COMMAND, "purify", save_gray(tmp_path / "a.png"), tmp_path / "frames.npy", "-o", out, "-c", model]
    # Tests that run in the background are started with the signal ignored, which the command would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 30
    while not (out / "a.png").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert stderr.split() == ["interrupted"]
    assert tree(out) == ["a.png"]


# --- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch, model) -> Path:
    """A weights folder with a random purifier, random images and a classifier that sees the brightest column."""
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(model, folder / "fashion_mnist.safetensors")
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 10, 80).astype(np.uint8)
    clean = generator.integers(0, 100, (80, 28, 28)).astype(np.uint8)
    clean[np.arange(80), :, labels] = 255
    images = {key: clean if key == "clean" else np.roll(clean, 1, axis=2) for key in demo.TITLES}
    names = np.array([f"class {index}" for index in range(10)])
    np.savez_compressed(folder / "fashion_mnist_demo.npz", labels=labels, class_names=names, **images)
    onnx.save(column_classifier(), folder / "fashion_mnist_classifier.onnx")
    monkeypatch.setattr(checkpoint, "WEIGHTS_FOLDER", folder)
    return folder


def column_classifier() -> onnx.ModelProto:
    """uint8 (N, 28, 28, 1) -> logits: the sums of the first ten columns."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axes"], ["columns"], keepdims=0),
        helper.make_node("Slice", ["columns", "start", "stop", "one"], ["logits"]),
    ]
    constants = {"axes": [1, 3], "start": [0], "stop": [10], "one": [1]}
    graph = helper.make_graph(
        nodes,
        "columns",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 28, 28, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_demo_prints_its_table_and_draws_the_sheet(tmp_path, monkeypatch, stand_in):
    monkeypatch.chdir(tmp_path)
    Path("purified.png").write_text("yesterday's")
    result = run("demo")
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.count("│") > 2}
    assert list(lines) == ["clean", "FGSM 0.3", "RAND-FGSM 0.3", "CW-L2"]
    for title, line in lines.items():
        assert " 80 " in line
        assert ("100.0 %" if title == "clean" else " 0.0 %") in line
    for part in ("batch 1", "batch 64", "oblivious", "no promise", "purified.png", "engine: ", "torch"):
        assert part in result.stdout
    with Image.open("purified.png") as sheet:
        assert sheet.format == "PNG"
        picture = np.asarray(sheet.convert("RGB")).astype(int)
    assert picture.shape[0] > 3 * 112
    assert picture.shape[1] > 12 * 112
    # The first column's original is there, pixel for pixel, framed by how the classifier takes it.
    samples = demo.load_samples("fashion_mnist")
    first = demo.choose_columns(samples.labels, 12)[0]
    tile = samples.images["clean"][first][:, :, 0].repeat(4, 0).repeat(4, 1)
    colored = picture.max(axis=2) - picture.min(axis=2) > 40
    inside = ~colored[1:, 1:] & colored[:-1, 1:] & colored[1:, :-1]  # below and right of a frame
    (top, left) = next(
        (y + 1, x + 1)
        for y, x in np.argwhere(inside)
        if np.array_equal(picture[y + 1 : y + 1 + tile.shape[0], x + 1 : x + 1 + tile.shape[1], 0], tile)
    )
    right, wrong = picture[top - 2, left], picture[top - 2 + 112 + 28 + 13, left]
    assert right[1] > right[0]  # green: the classifier sees the clean image's class
    assert wrong[0] > wrong[1]  # red: the shifted one is taken for its neighbour


def test_demo_columns_go_round_the_classes_without_repeating():
    labels = np.array([2, 2, 0, 1, 0, 2, 1])
    assert demo.choose_columns(labels, 5) == [2, 3, 0, 4, 6]
    assert sorted(demo.choose_columns(labels, 99)) == list(range(7))


def test_demo_says_which_engine_is_missing(tmp_path, stand_in):
    assert_one_line_error(run("demo", "--engine", "abacus", "-o", tmp_path / "x.png"), "abacus")


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        ("_demo.npz", "fashion_mnist_demo.npz, found none"),
        ("_classifier.onnx", "fashion_mnist_classifier.onnx, found none"),
        (".safetensors", "checkpoint 'fashion_mnist': no such file"),
    ],
)
def test_demo_says_which_packaged_file_is_missing(tmp_path, stand_in, suffix, part):
    (stand_in / f"fashion_mnist{suffix}").unlink()
    assert_one_line_error(run("demo", "-o", tmp_path / "x.png"), part)


@pytest.mark.parametrize("dataset", demo.DATASETS)
def test_demo_of_the_installed_package_needs_no_torch_and_ten_seconds(tmp_path, dataset):
    package_folder = str(Path(defense_vae_fast.__file__).parents[1])
    began = os.times()
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH, "demo", dataset], cwd=tmp_path, capture_output=True, encoding="utf-8",
        timeout=60, check=False, env={**os.environ, "PYTHONPATH": package_folder, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended = os.times()
    # Of CPU time, which other programs on the machine do not lengthen; on an idle one the wall time is shorter: with
    # AVX2 alone 7.1 s for 12.3 s on two cores, so that such a CPU is given more of it.
    most = 10 if "avx512f" in Path("/proc/cpuinfo").read_text() else 16
    assert ended.children_user + ended.children_system - began.children_user - began.children_system < most
    assert (tmp_path / "purified.png").is_file()
    samples = demo.load_samples(dataset)
    assert len(samples.labels) >= 500
    accuracies = {
        cells[1].strip(): [float(cell.strip(" %")) for cell in cells[2:5]]
        for cells in (line.split("│") for line in done.stdout.splitlines())
        if len(cells) > 4
    }
    for key, title in demo.TITLES.items():
        number, before, after = accuracies[title]
        assert number >= 500
        assert before > 85 if key == "clean" else before < 35
        assert after > 75


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_tells_engines_purifiers_cache_and_versions(monkeypatch, stand_in, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run("info")
    assert result.exit_code == 0, result.output
    known = checkpoint.load_checkpoint("fashion_mnist")
    lines = result.stdout.splitlines()
    headings = [line.split()[0].strip(",") for line in lines if line[0] != " "]
    assert headings == ["engines", "purifiers", "cache", "versions"]
    assert "  openvino: works here; 'auto' takes it, the first in the order that works" in lines
    assert "  fashion_mnist: random, 28x28 pixels, 1 channel, 3.02 M parameters" in lines
    assert f"    digest {known.digest}" in lines
    assert '    recipe: {"seed": 0}' in lines
    assert "measured" not in result.stdout  # nothing was, and no empty heading says otherwise
    assert f"  {tmp_path / 'cache' / 'defense-vae-fast'}: nothing has been cached" in lines
    versions = {"defense-vae-fast": defense_vae_fast.__version__, "python": platform.python_version()}
    assert lines[-1].startswith("  " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def test_info_tells_accuracies_in_one_line_per_classifier(stand_in):
    accuracies = {
        "test images, attacks away from true labels": {
            "images": 10000,
            "columns": ["bare", "purified"],
            "attacked classifiers": {
                "A": {"clean": [91.0, 90.5], "fgsm": [0.1, 87.0]},
                "B": {"clean": [90.0, 89.123456], "fgsm": [0, 86]},
                "attacked_mean": 86.0,
                "clean_loss": 0.00002,
            },
            "held-out classifier": {"residual": {"clean": [93.0, 90.25]}},
        },
        "validation": {"clean": 90.0, "seeds": [1, 2, 3]},
    }
    measured = replace(random_checkpoint(), accuracies=accuracies)
    checkpoint.save_checkpoint(stand_in / "fashion_mnist.safetensors", measured)
    lines = run("info").stdout.splitlines()
    first = lines.index("    measured")
    assert lines[first + 1 : first + 8] == [
        "      test images, attacks away from true labels: columns bare -> purified, images 10000",
        "        attacked classifiers: attacked_mean 86.0, clean_loss 2e-05",
        "          A: clean 91.0 -> 90.5, fgsm 0.1 -> 87.0",
        "          B: clean 90.0 -> 89.12, fgsm 0 -> 86",
        "        held-out classifier",
        "          residual: clean 93.0 -> 90.25",
        "      validation: clean 90.0, seeds 1, 2, 3",
    ]
    assert lines[first + 8] == "cache"


def test_info_tells_int8_scales_and_what_they_cost(stand_in):
    scales = checkpoint.Quantization({"mu": 2.0, "decoder1": 3.0}, accuracies={"worst": -0.1, "cells": {"A": [90.5]}})
    checkpoint.save_checkpoint(
        stand_in / "fashion_mnist.safetensors", replace(random_checkpoint(), quantization=scales)
    )
    lines = run("info").stdout.splitlines()
    first = lines.index("    int8 scales for 2 layers: worst -0.1")
    assert lines[first + 1] == "      cells: A 90.5"
    assert lines[first + 2] == "cache"


def test_info_says_why_an_engine_does_not_work(tmp_path):
    program = "import sys; sys.modules['torch'] = None; from defense_vae_fast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("torch")]
    assert "[torch]" in line


def test_info_reports_a_damaged_purifier_and_goes_on(stand_in):
    raw = bytearray((stand_in / "fashion_mnist.safetensors").read_bytes())
    raw[-1] ^= 1
    (stand_in / "mine.safetensors").write_bytes(bytes(raw))
    result = run("info")
    assert result.exit_code == 0
    assert "not a usable Defense-VAE checkpoint" in result.stdout


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "a.npz"
    target.write_bytes(b"old")
    arrays = {"images": GRAY, "objects": np.array([{}], dtype=object)}  # the second fails with the first half written
    with pytest.raises(ValueError, match="Object arrays"):
        files.write_arrays(target, arrays, compressed=False)
    assert tree(tmp_path) == ["a.npz"]
    assert target.read_bytes() == b"old"


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to see it upright
    path = save_gray(tmp_path / "a.png", exif=exif)
    image = files.read_image(path, defense_vae_fast.VAEConfig())
    assert np.array_equal(image, np.rot90(GRAY[0], -1))
