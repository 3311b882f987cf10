"""The paper's tables and figures: their cells, their records, and the page made of them, on a tiny MNIST."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from defense_vae_fast.checkpoint import load_checkpoint
from tests.test_data import write_idx
from training.__main__ import cli
from training.attacks import PAPER_TEST_ATTACKS, CarliniWagnerL2, DeepFool
from training.baselines.adversarial_training import AdversarialSettings
from training.baselines.magnet import MagNetSettings
from training.baselines.wgan import GanSettings
from training.black_box import DEFENSE_GAN, SubstituteSettings, train_substitute
from training.experiments.cells import FROM_SCRATCH, TABLES, Cell, cells, select, write_record
from training.experiments.figures import read_curve
from training.experiments.lab import training_attacks
from training.experiments.measure import paper_cell
from training.experiments.once import train_once
from training.experiments.processes import STOPPED, Group, run_groups, share_out
from training.experiments.results import write_results
from training.experiments.scale import SCALES
from training.finetune import FinetuneSettings
from training.fit import CHECKPOINT_FILE, STATE_FILE
from training.paper import paper_rows, paper_value
from training.retrain import RetrainSettings
from training.stopping import stop_signal

TINY = replace(
    SCALES["quick"], name="quick", test_images=40, search_images=5, classifier_epochs=1,
    purifier=replace(SCALES["quick"].purifier, images=8, cw_images=4, epochs=1, attacked=16),
    rec=RetrainSettings(steps=2), e2e=FinetuneSettings(steps=2), gan=GanSettings(steps=1, batch_size=4),
    search=(2, 2), magnet=MagNetSettings(epochs=1), adversarial=AdversarialSettings(epochs=1),
    substitute=replace(DEFENSE_GAN, images=20, rounds=2, epochs=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def world(demo_images: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny data set that goes by the name of MNIST."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "mnist").mkdir()
    images, labels = (tensor.numpy().squeeze() for tensor in demo_images)
    for part, a, b in (("train", 0, 300), ("t10k", 300, 500)):
        write_idx(folder / "mnist" / f"{part}-images-idx3-ubyte", images[a:b], compress=False)
        write_idx(folder / "mnist" / f"{part}-labels-idx1-ubyte", labels[a:b], compress=False)
    return folder


@pytest.fixture(autouse=True)
def tiny_scale(monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    monkeypatch.setitem(SCALES, "quick", TINY)
    monkeypatch.setenv("DEFENSE_VAE_DATA", str(world))
    monkeypatch.chdir(world)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, [*arguments, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


# The cells


def test_cells_are_those_of_the_paper() -> None:
    """Every number that the paper gives for a defence has its cell, and the cell finds it."""
    columns = {"1": 6, "3": 6, "7": 6, "8": 4}
    for table in TABLES:
        have = {(cell.dataset, cell.row, cell.column): paper_cell(cell) for cell in cells(table)}
        assert len(have) == len(cells(table))
        found = [value for value in have.values() if value is not None]
        expected = sum(
            sum(isinstance(value, float) for key, value in row.items() if key not in ("L", "R"))
            for row in paper_rows(table)
        )
        assert len(found) == expected, table
        assert columns.get(table, 1) <= len({cell.column for cell in cells(table)})


@pytest.mark.parametrize(
    ("cell", "paper"),
    [
        (Cell("1", "fashion_mnist", "defense_vae_rec", "cw", "D"), 86.21),
        (Cell("1", "fashion_mnist", "defense_vae_rec", "clean", "D"), None),
        (Cell("2", "fashion_mnist", "plus_deepfool", "cw", "B"), 71.64),
        (Cell("3", "mnist", "magnet", "fgsm", "C", "E"), 67.60),
        (Cell("4", "fashion_mnist", "defense_gan", search="400x20"), 1720.13),
        (Cell("4", "fashion_mnist", "defense_vae"), 9.03),
        (Cell("7", "cifar10_jpeg", "no_attack", "rand_fgsm", "D"), 61.76),
        (Cell("8", "cifar10_jpeg", "defense_vae_e2e", "fgsm", "C", "E"), 45.72),
    ],
    ids=lambda value: value.table if isinstance(value, Cell) else str(value),
)
def test_the_papers_numbers(cell: Cell, paper: float | None) -> None:
    assert cell in cells(cell.table)
    assert paper_cell(cell) == paper


def test_what_is_run_only_on_request() -> None:
    every = cells("1")
    assert not [cell for cell in select(every, dataset="mnist") if cell.column == FROM_SCRATCH]
    assert select(every, [FROM_SCRATCH], dataset="mnist", attack="fgsm", classifier="A")
    with pytest.raises(ValueError, match="got none for dataset mnist, classifier E"):
        select(every, dataset="mnist", classifier="E", search=None)


def test_attacks_of_table_2() -> None:
    assert len(training_attacks("three")) == 12
    without = training_attacks("without_cw")
    assert len(without) == 8
    assert not any(isinstance(attack, CarliniWagnerL2) for attack in without)
    plus = training_attacks("without_cw_plus_deepfool")
    assert plus[:8] == without
    assert all(isinstance(attack, DeepFool) for attack in plus[8:])


# The runs


def test_a_table_is_run_once_and_every_cell_is_measured_again_by_its_own_command(world: Path) -> None:
    chosen = ["--dataset", "mnist", "--classifier", "D"]
    run("table", "1", *chosen)
    records = sorted((world / "docs/results/tables/quick/table1").glob("*.json"))
    # Four attacks (clean among them) for seven defences, three for the two columns without any.
    assert len(records) == 4 * 7 + 3 * 2
    by_name = {path.stem: json.loads(path.read_text()) for path in records}
    record = by_name["mnist-fgsm-D-defense_vae_rec-seed0"]
    assert record["images"] == 40
    assert record["paper"] == paper_value("1", "defense_vae_rec", dataset="mnist", attack="fgsm", classifier="D")
    assert record["training_seconds"] > by_name["mnist-fgsm-D-defense_vae-seed0"]["training_seconds"] > 0
    assert {"seed", "scale", "wall_seconds", "device", "machine", "digests", "settings", "command"} <= set(record)
    assert record["machine"]["versions"]["torch"]
    assert by_name["mnist-fgsm-D-defense_gan-seed0"]["images"] == 5
    assert by_name["mnist-fgsm-D-magnet-seed0"]["right_or_rejected"] >= by_name["mnist-fgsm-D-magnet-seed0"]["value"]

    written = {path: path.stat().st_mtime_ns for path in records}
    run("table", "1", *chosen)
    assert {path: path.stat().st_mtime_ns for path in records} == written
    for name in ("mnist-rand_fgsm-D-defense_vae_e2e-seed0", "mnist-cw-D-adv_training-seed0"):
        path = world / "docs/results/tables/quick/table1" / f"{name}.json"
        before = json.loads(path.read_text())
        command = shlex.split(before["command"])
        assert command[:3] == ["python", "-m", "training"]
        path.unlink()
        run(*command[3:])
        after = json.loads(path.read_text())
        for key in ("value", "digests", "settings", "training_seconds"):
            assert after[key] == before[key], key

    page = (world / "docs/RESULTS.md").read_text()
    ours = record["value"]
    assert f"**{ours:.2f}** ({record['paper']:.2f}, {ours - record['paper']:+.2f})" in page
    assert "| fgsm | A | not run (99.15)" in page
    leaking = [line for line in page.splitlines() if line.startswith("| fgsm, away from the prediction | D |")]
    assert len(leaking) == 1
    assert f"**{record['away_from_prediction']:.2f}**" in leaking[0]
    assert {name for name, one in by_name.items() if "away_from_prediction" in one} == {
        f"mnist-fgsm-D-{column}-seed0"
        for column in ("defense_vae", "defense_vae_rec", "defense_vae_e2e", "adv_training", "pooled")
    }
    assert "CelebA" in page


def test_cells_are_shared_out_by_what_they_need() -> None:
    every = [cell for table in TABLES for cell in select(cells(table))]
    groups = {group.name: group for group in share_out(every)}
    assert sorted(map(repr, every)) == sorted(repr(cell) for group in groups.values() for cell in group.cells)
    place = {name: number for number, name in enumerate(groups)}
    for group in groups.values():
        assert all(place[name] < place[group.name] for name in group.after)
    three = groups["fashion_mnist-A-three"]
    assert {(cell.table, cell.column) for cell in three.cells} == {
        *(
            (table, column)
            for table in "13"
            for column in ("defense_vae", "defense_vae_rec", "defense_vae_e2e", "pooled")
        ),
        ("2", "trained_on_three"),
    }
    assert three.after == {"fashion_mnist-A-bare"}
    # What the columns share is made once, before any of them: classifiers, attacks, substitutes.
    bare = groups["cifar10_jpeg-C-bare"]
    assert {(cell.attack, cell.substitute) for cell in bare.prepared} == {
        *((attack, "") for attack in ("clean", *PAPER_TEST_ATTACKS)), ("fgsm", "E"),
    }  # fmt: skip
    assert groups["mnist-defense_gan"].after == {f"mnist-{name}-bare" for name in "ABCD"}
    assert groups["fashion_mnist-B-without_cw_plus_deepfool"].cells == (
        Cell("2", "fashion_mnist", "plus_deepfool", "cw", "B"),
    )
    # Time is measured when nothing else runs.
    assert groups["fashion_mnist-times"].after == set(groups) - {"fashion_mnist-times"}
    alone = share_out(select(cells("1"), ["magnet"], dataset="mnist", classifier="D", attack="cw"))
    assert [(group.name, len(group.cells), len(group.prepared)) for group in alone] == [
        ("mnist-D-bare", 0, 1), ("mnist-magnet", 1, 0),
    ]  # fmt: skip


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread here and in each of three processes: sums over other numbers of threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_processes_find_what_one_finds(world: Path, tmp_path: Path) -> None:
    chosen = ["--dataset", "mnist", "--classifier", "D", "--attack", "fgsm", "--column", "no_defense"]
    chosen += ["--column", "defense_vae", "--column", "magnet", "--column", "adv_training"]

    def values(name: str, *extra: str) -> dict[str, tuple[float, dict[str, str]]]:
        folder = tmp_path / name
        options = ["--records", str(folder / "records"), "--page", str(folder / "page.md"), "--runs", str(folder)]
        result = run("table", "1", "3", *chosen, *extra, *options)
        assert "not run: " not in result.output
        records = [json.loads(path.read_text()) for path in (folder / "records").rglob("*.json")]
        assert (folder / "page.md").exists()
        return {
            f"{one['table']} {one['column']} {one['substitute']}": (one["value"], one["digests"]) for one in records
        }

    shared, alone = values("shared", "--jobs", "3"), values("alone")
    assert len(alone) == 4 * (1 + 2)
    assert shared == alone
    assert sorted(path.stem for path in (tmp_path / "shared/logs").iterdir()) == [
        "mnist-D-adv_training", "mnist-D-bare", "mnist-D-three", "mnist-magnet",
    ]  # fmt: skip


def test_a_process_that_fails_is_said_and_the_others_go_on(world: Path, tmp_path: Path) -> None:
    """The purifier's folder is a file here."""
    folder = tmp_path / "quick/seed0/mnist/D-three"
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    options = ["--records", str(tmp_path / "records"), "--page", str(tmp_path / "page.md"), "--runs", str(tmp_path)]
    chosen = ["--dataset", "mnist", "--classifier", "D", "--attack", "fgsm", "--jobs", "2", "--device", "cpu"]
    columns = ["--column", "defense_vae", "--column", "no_defense"]
    result = CliRunner().invoke(cli, ["table", "1", *chosen, *columns, *options])
    assert result.exit_code == 1
    assert f"mnist-D-three: failed, {tmp_path / 'logs/mnist-D-three.log'}" in result.output
    assert "not run: 1 cells" in result.output
    assert "NotADirectoryError" in (tmp_path / "logs/mnist-D-three.log").read_text()
    assert [path.name for path in (tmp_path / "records").rglob("*.json")] == ["mnist-fgsm-D-no_defense-seed0.json"]


def wait_for_a_stop(group: Group) -> int:
    with stop_signal() as stopping:
        print("ready", flush=True)
        return STOPPED if stopping.wait(60) else 0


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_stop_is_handed_on_and_nothing_more_begins(tmp_path: Path) -> None:
    groups = [Group(name, ()) for name in "abc"]

    def stop() -> None:
        logs = [tmp_path / f"{name}.log" for name in "ab"]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(log.exists() and "ready" in log.read_text() for log in logs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run_groups(groups, 2, wait_for_a_stop, tmp_path) == STOPPED
    thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "b.log"]


@pytest.mark.usefixtures("world")
def test_a_purifier_that_does_not_come_with_the_library_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.experiments.lab.list_pretrained", lambda: ("fashion_mnist",))
    chosen = ["--dataset", "mnist", "--classifier", "D", "--column", "pooled", "--attack", "clean"]
    result = run("table", "1", *chosen, "--records", str(tmp_path / "records"), "--page", str(tmp_path / "page.md"))
    assert "no pooled purifier of mnist comes with the library" in result.output
    assert not (tmp_path / "records").exists()


def test_a_second_seed_gives_a_spread(world: Path) -> None:
    chosen = ["--dataset", "mnist", "--classifier", "D", "--column", "defense_vae", "--attack", "fgsm"]
    for seed in ("0", "1"):
        run("table", "1", *chosen, "--seed", seed)
    lines = (world / "docs/RESULTS.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| fgsm | D |"))
    assert " ± " in row


@pytest.mark.parametrize(
    ("table", "extra"),
    [("3", ["--column", "no_defense", "--column", "defense_vae"]), ("4", ["--search", "200x10"])],
    ids=["black-box", "speed"],
)
def test_other_tables(table: str, extra: list[str], world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["--dataset", "mnist", "--classifier", "D"] if table == "3" else []
    if table == "4":  # Fashion-MNIST is wherever it is; its place is taken here
        (world / "fashion_mnist").exists() or (world / "fashion_mnist").symlink_to(world / "mnist")
        monkeypatch.setattr("training.data._check_fashion_mnist", lambda folder: None)
    trained: list[tuple[str, SubstituteSettings]] = []

    def note(name: str, *rest: Any, **options: Any) -> nn.Module:
        trained.append((name, rest[-1]))
        return train_substitute(name, *rest, **options)

    monkeypatch.setattr("training.experiments.lab.train_substitute", note)
    result = run("table", table, *chosen, *extra)
    records = [json.loads(path.read_text()) for path in (world / f"docs/results/tables/quick/table{table}").glob("*")]
    assert records
    assert all(record["value"] > 0 for record in records), result.output
    if table == "3":
        assert {(record["column"], record["substitute"]) for record in records} == {
            (column, name) for column in ("no_defense", "defense_vae") for name in ("B", "E")
        }
        page = (world / "docs/RESULTS.md").read_text()
        for record in (one for one in records if one["column"] == "no_defense"):
            value = record["substitute_as_printed"]
            assert f"| fgsm, substitute as printed | D/{record['substitute']} |  | **{value:.2f}**" in page
        usual = TINY.substitute  # each trained once for both columns
        assert trained == [
            (name, replace(usual, period=period, kept=kept))
            for name in ("B", "E") for period, kept in ((usual.period, usual.kept), (3, False))
        ]  # fmt: skip
        run("table", table, *chosen, "--column", "no_defense", "--again")  # with the kept substitutes
        assert len(trained) == 4
        for record in (one for one in records if one["column"] == "no_defense"):
            path = world / f"docs/results/tables/quick/table3/mnist-fgsm-D-{record['substitute']}-no_defense-seed0.json"
            again = json.loads(path.read_text())
            assert all(again[key] == record[key] for key in ("value", "substitute_as_printed"))
    else:
        assert records[0]["unit"] == "seconds for 1,000 images"
        assert "(441.81)" in (world / "docs/RESULTS.md").read_text()


def test_times_are_compared_with_the_papers(tmp_path: Path) -> None:
    seconds = {"defense_vae": 2.0, "purifier": 1.25, "defense_gan": 1984.4}
    for cell in cells("4"):
        if cell.search in ("", "200x10"):
            record = {"value": seconds[cell.column], "images": 4, "seed": 0, "device": "cpu", "digests": {}}
            write_record(
                cell.path(tmp_path, "quick", 0), cell, {**record, "wall_seconds": 1.0, "training_seconds": 0.0}
            )
    write_results(tmp_path / "page.md", tmp_path)
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| Defense-VAE | **2** (9.03) | **1** (1) |" in lines
    assert "| the library's Purifier | **1.25** (–) | **0.625** (–) |" in lines
    assert "| Defense-GAN, L=200 R=10 | **1,984** (441.81) | **992** (48.9) |" in lines
    assert "| Defense-GAN, L=400 R=20 | not run (1720.13) | not run (190) |" in lines


def test_what_detectors_turn_away_is_said(tmp_path: Path) -> None:
    """Of attacked images alone, and of defences that have detectors."""
    common = {"images": 10, "device": "cpu", "seed": 0, "digests": {}, "training_seconds": 1.0, "wall_seconds": 1.0}
    handled = {("magnet", "fgsm"): (97.0, 98.5), ("magnet", "cw"): (45.0, 51.0), ("magnet", "clean"): (0.5, 99.0),
               ("defense_vae", "fgsm"): (0.0, 90.0)}  # fmt: skip
    for cell in cells("1"):
        if cell.dataset == "mnist" and cell.classifier == "A" and (cell.column, cell.attack) in handled:
            rejected, right = handled[cell.column, cell.attack]
            record = {**common, "value": 9.0, "rejected": rejected, "right_or_rejected": right}
            write_record(cell.path(tmp_path, "cpu", 0), cell, record)
    write_results(tmp_path / "RESULTS.md", tmp_path)
    sentences = (tmp_path / "RESULTS.md").read_text().split("Under attack ")[1:]
    assert sentences[0].startswith("74.75 % are right or turned away by the detectors of MagNet (mean of 2 cells).")
    assert len(sentences) == 1


def test_data_that_are_not_here_are_said(world: Path) -> None:
    result = run("table", "7", "--dataset", "celeba", "--classifier", "A", "--attack", "fgsm")
    assert "celeba: expected img_align_celeba" in result.output
    assert "CelebA: not run" in (world / "docs/RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("column", "other", "differing"),
    [
        ("magnet", {"magnet": MagNetSettings(epochs=2)}, "epochs"),
        ("defense_vae", {"purifier": replace(TINY.purifier, attacked=TINY.purifier.attacked // 2)}, "attacked"),
    ],
    ids=["magnet", "purifier"],
)
def test_runs_made_with_other_settings_are_not_taken(
    column: str, other: dict[str, Any], differing: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["--dataset", "mnist", "--classifier", "D", "--column", column, "--attack", "fgsm"]
    run("table", "1", *chosen)
    monkeypatch.setitem(SCALES, "quick", replace(TINY, **other))
    with pytest.raises(ValueError, match=rf"made with another {differing}; remove the folder"):
        run("table", "1", *chosen, "--again")


def test_a_scale_with_mirror_images_and_muon(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TINY.purifier, mirrored=True, optimizer="muon")
    monkeypatch.setitem(SCALES, "short", replace(TINY, name="short", purifier=recipe))
    chosen = ["--dataset", "mnist", "--classifier", "D", "--attack", "fgsm", "--runs", str(tmp_path)]
    run("table", "1", "--scale", "short", *chosen, "--column", "defense_vae", "--column", "defense_vae_rec")
    made = load_checkpoint(tmp_path / "short/seed0/mnist/D-three/defense_vae" / CHECKPOINT_FILE)
    records = world / "docs/results/tables/short/table1"
    record, rec = (
        json.loads((records / f"mnist-fgsm-D-{column}-seed0.json").read_text())
        for column in ("defense_vae", "defense_vae_rec")
    )
    assert (record["settings"]["mirrored"], record["settings"]["optimizer"]) == (True, "muon")
    assert record["digests"]["checkpoint"] == rec["digests"]["checkpoint"] == made.digest
    # What it was made from has changed, so what was made from it is not taken.
    monkeypatch.setitem(SCALES, "short", replace(TINY, name="short", purifier=replace(recipe, optimizer="adam")))
    with pytest.raises(ValueError, match=r"made with another optimizer; remove the folder"):
        run("table", "1", "--scale", "short", *chosen, "--column", "defense_vae", "--again")


def test_the_time_of_a_training_that_was_cut_off_counts_up_to_its_last_state(tmp_path: Path) -> None:
    state = tmp_path / "run" / STATE_FILE

    def cut_off(resume: bool) -> bool:
        assert resume == state.exists()
        state.touch()
        later = state.stat().st_mtime + 1000
        os.utime(state, (later, later))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_once(state.parent, {"steps": 3}, cut_off)
    seconds = train_once(state.parent, {"steps": 3}, lambda resume: resume)
    assert 1000 <= seconds < 1060
    assert train_once(state.parent, {"steps": 3}, cut_off) == seconds, "it was done"


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    path = cells("1")[0].path(tmp_path, "quick", 0)
    path.parent.mkdir(parents=True)
    path.write_text('{"value": 3}')
    with pytest.raises(ValueError, match="expected the record of a table's cell"):
        write_results(tmp_path / "RESULTS.md", tmp_path)


@pytest.mark.parametrize("number", ["1", "4", "5"])
def test_figures(number: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (world / "fashion_mnist").exists():
        (world / "fashion_mnist").symlink_to(world / "mnist")
    monkeypatch.setattr("training.data._check_fashion_mnist", lambda folder: None)
    run("figure", number)
    pixels = np.asarray(Image.open(world / "docs/results" / f"figure{number}.png").convert("RGB"))
    assert pixels.std() > 10
    if number == "5":
        assert pixels.shape[:2] == (4 * (56 + 2), 8 * 56)


def test_the_curve_keeps_the_later_of_two_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"step": 0, "clean": 1}\n{"step": 8, "clean": 2}\n{"step": 4, "clean": 3}\n'
                                  '{"step": 8, "clean": 4}\n')  # fmt: skip
    assert [(line["step"], line["clean"]) for line in read_curve(tmp_path / "log")] == [(0, 1), (4, 3), (8, 4)]


def test_recipes_of_a_scale() -> None:
    scale = SCALES["cpu"]
    usual, own = scale.recipe("fashion_mnist", "A", 3), scale.recipe("fashion_mnist", "C", 3)
    assert (usual.classifiers, usual.seed, usual.images, usual.epochs) == (("A",), 3, 20_000, 2)
    assert (own.classifiers, own.seed, own.images, own.steps) == (("C",), 3, 40_000, 30_000)
    assert scale.recipe("mnist", "C", 0).images == usual.images
    assert SCALES["paper"].recipe("celeba", "A", 0).images == 20_000
    assert SCALES["paper"].recipe("cifar10_jpeg", "A", 0).images == 0


def test_finetuning_weighs_the_classifier_by_data_set() -> None:
    """Lambda is MNIST's own there, everything else the scale's."""
    scale = SCALES["cpu"]
    usual, own = scale.finetuning("fashion_mnist", 3), scale.finetuning("mnist", 3)
    assert (usual.classifier_weight, own.classifier_weight, own.seed) == (5.0, 40.0, 3)
    assert own == replace(usual, classifier_weight=40.0)
    assert usual == replace(scale.e2e, seed=3)
