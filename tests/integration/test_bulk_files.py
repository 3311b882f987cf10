"""What bulk reads and writes, without Ray."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from defense_vae_fast import VAEConfig
from defense_vae_fast.integrations import bulk_input, bulk_output
from defense_vae_fast.integrations.bulk_input import InputError, Item, Shard, plan, read

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

CONFIG = VAEConfig()
PIXELS = np.random.default_rng(3).integers(0, 256, (12, 28, 28, 1), dtype=np.uint8)
Array = np.ndarray[Any, Any]


def png(pixels: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0]).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_files(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index:03d}.png").write_bytes(png(PIXELS[first + index]))


def everything(source: Path, out: Path, **options: Any) -> list[Item]:
    return [item for shard in plan(source, skip=out, **options) for item in read(shard, CONFIG)]


def test_a_folder_with_all_kinds(tmp_path: Path) -> None:
    write_files(tmp_path / "in" / "photos", 5)
    write_files(tmp_path / "in" / ".hidden", 2)
    write_files(tmp_path / "in" / "out", 2)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    write_tar(tmp_path / "in" / "a.tar", {"x/0.png": png(PIXELS[5]), "x/0.json": b"{}", "x/1.PNG": png(PIXELS[6])})
    write_tar(tmp_path / "in" / "b.tgz", {"2.png": png(PIXELS[7])}, "w:gz")
    table = pa.table({"image": [png(PIXELS[8]), png(PIXELS[9])], "id": ["p", "q"]})
    pq.write_table(table, tmp_path / "in" / "c.parquet")
    items = everything(tmp_path / "in", tmp_path / "in" / "out", key_column="id", shard_images=2)
    assert [(item.source, item.key) for item in items] == [
        *((f"photos/{index:03d}.png",) * 2 for index in range(5)),
        ("c.parquet", "p"), ("c.parquet", "q"), ("a.tar", "x/0"), ("a.tar", "x/1"), ("b.tgz", "2"),
    ]  # fmt: skip
    for item, index in zip(items, [0, 1, 2, 3, 4, 8, 9, 5, 6, 7], strict=True):
        assert item.error is None
        np.testing.assert_array_equal(item.pixels, PIXELS[index])


def test_a_single_file_is_an_input(tmp_path: Path) -> None:
    write_files(tmp_path, 1)
    [item] = everything(tmp_path / "000.png", tmp_path / "out")
    assert (item.source, item.key) == ("000.png", "000.png")
    [item] = everything(write_tar(tmp_path / "a.tar", {"0.png": png(PIXELS[0])}), tmp_path / "out")
    assert (item.source, item.key) == ("a.tar", "0")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("binary", pa.array([png(one) for one in PIXELS[:3]] + [None])),
        (
            "hugging face",
            pa.array([{"bytes": png(one), "path": "x"} for one in PIXELS[:3]] + [{"bytes": None, "path": "y"}]),
        ),
        ("pixels", pa.array([one.ravel().tolist() for one in PIXELS[:3]] + [None], pa.list_(pa.uint8()))),
    ],
    ids=["binary", "struct", "list"],
)
def test_columns_of_parquet(tmp_path: Path, kind: str, values: pa.Array) -> None:
    pq.write_table(pa.table({"picture": values}), tmp_path / "a.parquet", row_group_size=2)
    items = everything(tmp_path, tmp_path / "out", column="picture", shard_images=1)
    assert [item.key for item in items] == ["0", "1", "2", "3"]
    for item, pixels in zip(items, PIXELS[:3], strict=False):
        np.testing.assert_array_equal(item.pixels, pixels)
    assert items[3].error == "expected an image, got null"


def test_pixels_in_lists_of_one_length(tmp_path: Path) -> None:
    values = pa.FixedSizeListArray.from_arrays(pa.array(PIXELS[:3].ravel()), 784)
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
    items = everything(tmp_path, tmp_path / "out")
    np.testing.assert_array_equal([item.pixels for item in items], PIXELS[:3])


def test_row_groups_are_gathered_to_shards(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(one) for one in PIXELS]}), tmp_path / "a.parquet", row_group_size=2)
    shards = plan(tmp_path, skip=tmp_path / "out", shard_images=3)
    assert [(shard.groups, shard.images) for shard in shards] == [((0, 2), 4), ((2, 4), 4), ((4, 6), 4)]
    assert [item.key for item in read(shards[1], CONFIG)] == ["4", "5", "6", "7"]
    assert Shard.from_json(shards[1].to_json()) == shards[1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "expected an image file"),
        (b"garbage", "expected an image file"),
        (png(PIXELS[0])[:100], "truncated|Truncated|broken"),
        (png(np.zeros((32, 32, 1), np.uint8)), "expected a 28x28 8-bit gray image, got 32x32"),
    ],
    ids=["empty", "garbage", "cut", "size"],
)
def test_a_bad_image_says_why_and_is_not_the_end(tmp_path: Path, data: bytes, reason: str) -> None:
    good = png(PIXELS[0])
    write_tar(tmp_path / "a.tar", {"0.png": good, "1.png": data, "2.png": good})
    write_files(tmp_path / "f", 2)
    (tmp_path / "f" / "000.png").write_bytes(data)
    pq.write_table(pa.table({"image": [good, data]}), tmp_path / "a.parquet")
    items = everything(tmp_path, tmp_path / "out")
    bad = [(item.source, item.key) for item in items if item.pixels is None]
    assert bad == [("f/000.png", "f/000.png"), ("a.parquet", "1"), ("a.tar", "1")]
    assert len(items) == 7
    assert all(re.search(reason, item.error or "") for item in items if item.pixels is None)


def test_pixels_of_another_size(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([[1, 2]], pa.list_(pa.uint8()))}), tmp_path / "a.parquet")
    [item] = everything(tmp_path, tmp_path / "out")
    assert item.error == "expected 28 x 28 x 1 uint8 pixels, got 2 of uint8"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_no_cut_of_a_tar_goes_unnoticed(tmp_path: Path, mode: str) -> None:
    """Whatever is missing at its end, a member or only the end mark; tarfile itself takes most cuts for the end."""
    path = tmp_path / "a.tar"
    whole = write_tar(path, {f"{index}.png": png(PIXELS[index]) for index in range(3)}, mode).read_bytes()
    shards = plan(tmp_path, skip=tmp_path / "out")
    assert len(list(read(shards[0], CONFIG))) == 3
    end = len(whole.rstrip(b"\0")) if mode == "w" else len(whole) - 9
    for length in range(0, end, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.tar: expected a tar, got a damaged one"):
            everything(tmp_path, tmp_path / "out")


def test_damaged_inputs_are_named(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", {"0.png": png(PIXELS[0])}).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + one)
    with pytest.raises(InputError, match="it goes on after its end mark"):
        everything(tmp_path, tmp_path / "out")
    (tmp_path / "a.tar").write_bytes(b"garbage" * 1000)
    with pytest.raises(InputError, match=r"a\.tar: expected a tar, got a damaged one"):
        everything(tmp_path, tmp_path / "out")
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.parquet").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"b\.parquet: expected a Parquet file, got an unreadable one"):
        plan(tmp_path, skip=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "table", "message"),
    [
        ({}, {"picture": [b""]}, "expected a column 'image', got picture"),
        ({"key_column": "id"}, {"image": [b""]}, "expected a column 'id', got image"),
        ({}, {"image": ["text"]}, "expected binary, struct<bytes, path> or list<uint8>, got string"),
    ],
    ids=["column", "key", "type"],
)
def test_a_wrong_column_is_named(tmp_path: Path, options: dict[str, str], table: Any, message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        plan(tmp_path, skip=tmp_path / "out", **options)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        plan(tmp_path / "none", skip=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected files of the kinds \.png, "):
        plan(tmp_path, skip=tmp_path / "out")


def test_a_changed_file_is_another_shard_and_is_noticed_while_reading(tmp_path: Path) -> None:
    write_files(tmp_path / "in", 4)
    before = plan(tmp_path / "in", skip=tmp_path, shard_images=2)
    assert before == plan(tmp_path / "in", skip=tmp_path, shard_images=2)
    os.utime(tmp_path / "in" / "003.png", ns=(0, 0))
    after = plan(tmp_path / "in", skip=tmp_path, shard_images=2)
    assert before[0] == after[0]
    assert before[1].identity != after[1].identity
    with pytest.raises(InputError, match="got changed ones; run again"):
        list(read(before[1], CONFIG))


# What is written


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    items = [Item("a.tar", "0", PIXELS[0], None), Item("a.tar", "1", None, "why"), Item("b", "\udcff", PIXELS[1], None)]
    scores = np.array([0.25, 0.5], np.float32)
    with pytest.raises(ValueError, match="zip"), bulk_output.writing(tmp_path, "k", "png", {}) as writer:
        writer.write(items, PIXELS[:2], scores[:1])
    assert not list(tmp_path.iterdir())
    with bulk_output.writing(tmp_path, "k", "png", {"engine": "openvino"}) as writer:
        writer.write(items, PIXELS[:2], scores)
        writer.write(items[:1], PIXELS[2:3], scores[:1])
    path = bulk_output.part_path(tmp_path, "k")
    assert bulk_output.read_part(path) == bulk_output.Part("k", images=4, failed=1)
    rows = pq.read_table(path).to_pylist()
    assert [(row["source"], row["key"], row["score"], row["error"]) for row in rows] == [
        ("a.tar", "0", 0.25, None), ("a.tar", "1", None, "why"), ("b", "\\xff", 0.5, None), ("a.tar", "0", 0.25, None),
    ]  # fmt: skip
    for row, pixels in zip([rows[0], rows[2], rows[3]], PIXELS, strict=False):
        with Image.open(io.BytesIO(row["image"])) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels[:, :, 0])


def test_what_does_not_belong_into_the_output(tmp_path: Path) -> None:
    assert bulk_output.finished(tmp_path / "none", ["k"], force=False) == {}
    with bulk_output.writing(tmp_path, "k", "raw", {}):
        pass
    (tmp_path / "readme.txt").write_text("mine")
    assert list(bulk_output.finished(tmp_path, ["k", "l"], force=False)) == ["k"]
    with pytest.raises(bulk_output.OutputError, match="1 of its files are of another input"):
        bulk_output.finished(tmp_path, ["l"], force=False)
    assert bulk_output.finished(tmp_path, ["l"], force=True) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["readme.txt"]
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(bulk_output.OutputError, match=r"other\.parquet: expected what an earlier run wrote"):
        bulk_output.finished(tmp_path, ["l"], force=True)
    with pytest.raises(bulk_output.OutputError, match="expected a folder, got a file"):
        bulk_output.finished(tmp_path / "readme.txt", [], force=True)


def test_the_key_is_the_work(tmp_path: Path) -> None:
    write_files(tmp_path / "in", 1)
    [shard] = bulk_input.plan(tmp_path / "in", skip=tmp_path)
    keys = {
        bulk_output.part_key(shard, digest, {"engine": engine}) for digest in ("a", "b") for engine in ("auto", "torch")
    }
    assert len(keys) == 4
    assert bulk_output.part_key(shard, "a", {"engine": "auto"}) in keys
