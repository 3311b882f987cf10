"""The benchmarks' arithmetic and text: percentiles, the fit, ratios, the table, the JSON, the plot, the idle check."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import inputs, load, machine, plot, regions, report, soak
from bench.rows import Results, Row, fit
from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.stream import Result

STAT = Path("/proc/stat")
STEPS, RESTARTS = (25, 50, 100, 200), (1, 5, 10)


def search_row(steps: int, restarts: int, images: int = 4, seconds: float | None = None) -> Row:
    """A search that takes 10 ms plus 1 ms for each step of each start, an image."""
    spent = 0.01 + 0.001 * steps * restarts if seconds is None else seconds
    name = f"Defense-GAN cpu, L={steps} R={restarts}"
    return Row("search", name, images, (spent * images,), {"steps": steps, "restarts": restarts, "device": "cpu"})


@pytest.fixture
def results() -> Results:
    """A session with round numbers: 1 ms at batch 1, 0.25 ms at batch 64, a search that takes 2.01 s."""
    engine = {"precision": "bf16", "device": "cpu", "flop_per_image": 140_000_000}
    released = {"precision": "fp32", "device": "cpu"}
    return Results(
        [
            Row("startup", "import defense_vae_fast", 1, (0.02, 0.01, 0.03)),
            Row("matmul", "matrix product", 1, (0.02,), {"precision": "bf16", "device": "cpu", "flop": 16e9}),
            Row("engine", "fast cpu bf16, uint8", 1, (0.001,) * 100, engine),
            Row("engine", "slow cpu bf16, uint8", 1, (0.002,) * 3, engine),
            Row("engine", "fast cpu bf16, uint8", 64, (0.016,) * 3, engine),
            Row("released", "released warm", 1, (0.004,), {**released, "warm_allocator": True}),
            Row("released", "released cold", 1, (0.008,), {**released, "warm_allocator": False}),
            *(search_row(steps, restarts) for restarts in RESTARTS for steps in STEPS),
        ]
    )


def described(idle: bool | None = True) -> dict[str, Any]:
    others = None if idle is None else 0.01 if idle else 1.5
    load = {"others_cores_before": others, "others_cores_during": others, "load_average_before": 0.5, "idle": idle}
    return {**machine.describe(), "checkpoint": "test", "quick": False, "load": load}


def test_percentiles_are_per_image() -> None:
    seconds = tuple(float(value) for value in range(1, 201))
    row = Row("engine", "x", 10, seconds)
    assert row.p50 == pytest.approx(10.05)
    assert row.p99 == pytest.approx(19.8)  # nearest rank: the 198th of 200


def test_p99_needs_a_hundred_calls() -> None:
    assert Row("engine", "x", 1, (1.0,) * 99).p99 is None
    assert Row("engine", "x", 1, (1.0,) * 100).p99 == 1.0


@pytest.mark.parametrize(
    ("batch", "seconds"),
    [(0, (1.0,)), (1, ()), (1, (0.0,)), (1, (-1.0,)), (1, (math.nan,)), (1, (math.inf,))],
    ids=["batch", "none", "zero", "negative", "nan", "infinite"],
)
def test_row_refuses(batch: int, seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Row("engine", "x", batch, seconds)


def test_fit_of_an_exact_line() -> None:
    line = fit([1, 10, 100, 1000], [0.5 + 0.002 * work for work in (1, 10, 100, 1000)])
    assert line.intercept == pytest.approx(0.5)
    assert line.slope == pytest.approx(0.002)
    assert line.r_squared == pytest.approx(1.0)


def test_fit_of_noise_and_of_other_laws() -> None:
    rng = np.random.default_rng(0)
    work = np.array([25, 50, 100, 200, 500, 1000, 2000], float)
    noisy = 0.001 * work * rng.uniform(0.5, 1.5, 7)
    line = fit(list(work), list(noisy))
    slope, intercept = np.polyfit(work, noisy, 1)
    assert line.slope == pytest.approx(slope)
    assert line.intercept == pytest.approx(intercept)
    assert line.r_squared == pytest.approx(np.corrcoef(work, noisy)[0, 1] ** 2)
    assert line.r_squared < 1
    assert fit(list(work), list(1e-6 * work**2)).exponent == pytest.approx(2.0)


@pytest.mark.parametrize("work", [[1, 2], [3, 3, 3], []], ids=["two", "one-value", "none"])
def test_fit_refuses(work: list[float]) -> None:
    with pytest.raises(ValueError, match="expected three or more points"):
        fit(work, [1.0] * len(work))


def test_ratios(results: Results) -> None:
    fast, slow, batch64 = results.of("engine")
    assert results.ratios(fast) == {
        "to_defense_gan": pytest.approx(2010),
        "to_released_warm": pytest.approx(4.0),
        "to_released_cold": pytest.approx(8.0),
        "share_of_matmul_rate": pytest.approx(0.14e12 / 0.8e12),
    }
    assert results.ratios(slow)["to_released_warm"] == pytest.approx(2.0)
    assert results.ratios(batch64)["to_defense_gan"] == pytest.approx(8040)
    assert results.ratios(batch64)["to_released_warm"] is None  # the released module was not timed at 64
    assert results.fastest() == [fast, batch64]


def test_ratios_stay_on_one_device(results: Results) -> None:
    gpu = Row(
        "engine", "fast cuda fp16, uint8", 1, (1e-5,), {"precision": "fp16", "device": "cuda", "flop_per_image": 1}
    )
    results.add(gpu)
    assert set(results.ratios(gpu).values()) == {None}
    assert [row.details["device"] for row in results.fastest()] == ["cpu", "cpu", "cuda"]


def test_search_fit(results: Results) -> None:
    line = results.search_fit()
    assert line is not None
    assert line.slope == pytest.approx(0.001)
    assert line.intercept == pytest.approx(0.01)
    assert Results([search_row(25, 1), search_row(50, 1)]).search_fit() is None


def test_lines_say_it_all(results: Results) -> None:
    text = "\n".join(report.lines(results, described()))
    for expected in (
        "the machine was idle",
        "import defense_vae_fast: 20.0 ms (median of 3)",
        "R^2 = 1.0000",
        "800 GFLOP/s",
        "batch 1: 1.00 ms an image (fast cpu bf16, uint8), 4.00 x the released module, 18% of",
        "batch 64: 250 us an image (fast cpu bf16, uint8), - x the released module",
        "2,010 x Defense-GAN",
        "random weights",
        "Defense-GAN cpu, L=200 R=10",
    ):
        assert expected in text
    row = next(line for line in text.splitlines() if line.startswith("fast cpu bf16, uint8 "))
    assert " ".join(row.split()) == "fast cpu bf16, uint8 1 1.00 ms 1.00 ms 1,000 2,010 4.00 8.00 18%"


def test_the_papers_table_of_times(results: Results) -> None:
    lines = [" ".join(line.split()) for line in report.lines(results, described())]
    start = next(place for place, line in enumerate(lines) if line.startswith("the paper's Table 4"))
    assert lines[start + 2 : start + 5] == [
        "Defense-GAN cpu, L=200 R=10 2,010 442",
        "released warm, batch 1 4.00 9.03",
        "fast cpu bf16, uint8, batch 64 0.250 -",
    ]
    assert all("Table 4" not in line for line in report.lines(Results([search_row(25, 1)]), described()))


@pytest.mark.parametrize(
    ("idle", "expected"),
    [(False, "THE MACHINE WAS NOT IDLE"), (None, "whether the machine was idle was not measured")],
    ids=["busy", "unknown"],
)
def test_lines_warn(results: Results, idle: bool | None, expected: str) -> None:
    text = "\n".join(report.lines(results, described(idle)))
    assert expected in text
    assert "the machine was idle:" not in text


@pytest.mark.parametrize("group", ["engine", "released", "search", "matmul", "startup"])
def test_lines_of_a_part(results: Results, group: str) -> None:
    """A session that ran one file only still ends with a report."""
    part = Results(row for row in results.rows if row.group == group)
    assert part.rows
    text = "\n".join(report.lines(part, described()))
    assert part.rows[0].name in text
    assert ("not measured at enough points" in text) is (group != "search")


def test_json_round_trip(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "latest.json"
    report.write_json(path, {"old": True})
    record = results.record(described())
    report.write_json(path, record)
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(record))
    assert [file.name for file in path.parent.iterdir()] == ["latest.json"]
    assert read["fits"]["cpu"]["slope"] == pytest.approx(0.001)
    assert len(read["rows"]) == len(results.rows)
    engine = read["rows"][2]
    assert engine["seconds"] == [0.001] * 100
    assert engine["ratios"]["to_released_warm"] == pytest.approx(4.0)
    assert {"cpu", "cores", "python", "versions", "commit", "date", "load", "gpus"} <= set(read["machine"])


def test_plot(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "latest.png"
    assert plot.draw(path, results)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not plot.draw(tmp_path / "none.png", Results([search_row(25, 1)]))
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, "-"), (2.66, "2.66 s"), (0.0123456, "12.3 ms"), (0.00035, "350 us"), (9.996e-3, "10.0 ms"),
        (0.99999, "1.00 s"), (1e-3, "1.00 ms"), (4.2e-8, "42.0 ns"), (1234.5, "1,234 s"),
    ],
)  # fmt: skip
def test_duration(seconds: float | None, expected: str) -> None:
    assert report.duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (0.0, "0"), (0.04567, "0.0457"), (3.999, "4.00"), (999.9, "1,000"), (8040.2, "8,040")],
)
def test_number(value: float | None, expected: str) -> None:
    assert report.number(value) == expected


def test_columns_align() -> None:
    head, rule, *body = report.columns([["name", "n"], ["a", "1,000"], ["long name", "2"]])
    assert (head, rule) == ("name           n", "-" * 16)
    assert body == ["a          1,000", "long name      2"]


def test_inputs_are_one_set_in_two_kinds() -> None:
    whole, scaled = inputs.batches(3, (1, 28, 28)), inputs.batches(3, (1, 28, 28), "float32")
    assert len(whole) == len(scaled) == inputs.ROTATION
    assert whole[0].shape == (3, 28, 28, 1)
    assert scaled[0].shape == (3, 1, 28, 28)
    assert scaled[0].dtype == np.float32
    assert scaled[0].flags.c_contiguous
    for integers, floats in zip(whole, scaled, strict=True):
        np.testing.assert_array_equal(np.rint(floats[:, 0] * 255), integers[..., 0])
    assert not np.array_equal(whole[0], whole[1])


def test_busy_seconds(tmp_path: Path) -> None:
    """user, nice, system, irq, softirq and steal count; idle and iowait do not; guest time is part of user's."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9999 8888 4 5 6 70 80\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    assert machine.busy_seconds(stat) == pytest.approx(165 / os.sysconf("SC_CLK_TCK"))
    assert machine.busy_seconds(tmp_path / "missing") is None


@pytest.mark.skipif(not STAT.exists(), reason="needs /proc/stat")
def test_watch_sees_others_and_not_itself() -> None:
    """A child that has not been waited for is another process; our own work is not."""
    spin = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    watch = machine.OthersWatch(0.01)
    with subprocess.Popen([sys.executable, "-c", spin]):
        time.sleep(1.0)
        during = watch.during()
        report_ = watch.report()
    assert during is not None
    assert during > machine.IDLE_CORES
    assert report_["idle"] is False
    quiet, everyone, wall = machine.OthersWatch(0), machine.busy_seconds(STAT), time.monotonic()
    own = time.process_time()
    while time.process_time() - own < 0.5:
        pass
    others, now = quiet.during(), machine.busy_seconds(STAT)
    assert others is not None
    assert everyone is not None
    assert now is not None
    rest = (now - everyone - 0.5) / (time.monotonic() - wall)
    assert others == pytest.approx(max(0.0, rest), abs=0.1)


def test_describe_knows_this_machine() -> None:
    told = machine.describe()
    assert told["cpu"]
    assert told["cores"] >= 1
    assert told["versions"]["numpy"] == np.__version__
    assert json.loads(json.dumps(told)) == told


# Live streams


@pytest.mark.parametrize("sources", [1, 7])
@pytest.mark.parametrize("kind", ["camera", "poisson"])
def test_arrivals(kind: load.Arrivals, sources: int) -> None:
    schedule = load.arrivals(kind, sources, rate=700.0, seconds=20.0, seed=3)
    assert schedule == sorted(schedule) == load.arrivals(kind, sources, 700.0, 20.0, seed=3)
    assert {arrival.source for arrival in schedule} == set(range(sources))
    assert 0 <= schedule[0].at <= schedule[-1].at < 20
    assert len(schedule) == pytest.approx(14_000, rel=0.03)
    gaps = np.diff([arrival.at for arrival in schedule if arrival.source == 0])
    spread = gaps.std() / gaps.mean()
    assert spread == pytest.approx(0 if kind == "camera" else 1, abs=0.1)


def stream_row(name: str, share: float, p99: float, change: float = 0.02) -> Row:
    told = {
        "test": "load", "contestant": name, "arrivals": "camera", "sources": 16, "load": share,
        "offered_per_second": 100.0, "out_per_second": 90.0, "frames": 1000, "dropped": 100,
        "p99": p99, "p999": 2 * p99, "bound": 0.05, "full_batch_change": change,
    }  # fmt: skip
    return Row("stream", f"{name} {share}", 1, (p99 / 2,) * 3, told)


def test_stream_lines_and_plot(results: Results, tmp_path: Path) -> None:
    assert report.lines(results, described())[-1] == "live streams: not measured"
    assert not plot.draw_stream(tmp_path / "none.png", results)
    engine = {"engine": "openvino", "precision": "int8"}
    results.add(Row("stream", "lone, streamed", 1, (0.001,), {"test": "lone", "extra_seconds": 4.2e-05, **engine}))
    results.add(Row("stream", "full, streamed", 64, (0.016,), {"test": "throughput", "share_of_calls": 0.91}))
    told = {
        "test": "eighty percent", "shares_of_bound": [0.5, 2.0, 0.75], "bounds": [0.08] * 3, "frames": [100] * 3,
        "dropped": [0, 30, 0], "full_batch_changes": [0.0] * 3,
    }  # fmt: skip
    results.add(Row("stream", "80 % of capacity, camera, 16 sources", 1, (0.04, 0.16, 0.06), told))
    for share in (0.5, 2.0):
        results.add(stream_row("stream", share, 0.01 * share))
        results.add(stream_row("one call a frame", share, 0.1 * share))
    results.add(stream_row("unsteady", 0.8, 0.01, change=0.25))
    text = "\n".join(report.lines(results, described()))
    assert text.count("the machine -20%") == 1
    assert "live streams, openvino engine in int8:" in text
    assert "lone, streamed: 1.00 ms a frame (median of 1), +42 us" in text
    assert (
        "80 % of capacity, camera, 16 sources: p99 0.75 of its bound, the median of 3 runs "
        "(0.50 to 2.00; 40.0 ms to 160 ms), 10% dropped"
    ) in text
    assert "full, streamed: 250 us a frame (median of 1), 91% of the throughput of calls" in text
    [slow, fast] = [line for share in ("one call", "stream ") for line in text.splitlines() if line.startswith(share)][
        1:3
    ]
    assert "missed" in slow
    assert "missed" not in fast
    assert fast.split()[:6] == ["stream", "camera", "16", "50%", "100", "90.0"]
    assert plot.draw_stream(tmp_path / "load.png", results)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(results.record(described()), allow_nan=False)


def test_unsteady_machine() -> None:
    steady = [1e-4, 1.05e-4] * 50
    assert load.unsteady(steady) == 0
    assert load.unsteady([*steady, 9e-4, *steady]) == 0  # an interrupt is no change of speed
    slow_for_a_fifth = [1e-4] * 80 + [1.4e-4] * 20
    assert load.unsteady(slow_for_a_fifth) == pytest.approx(0.2, abs=0.05)
    assert load.unsteady([1.4e-4] * 100) == 0
    assert load.unsteady([]) == 0
    assert 0 < load.pulse() < 0.01


@pytest.mark.parametrize("contestant", load.CONTESTANTS, ids=[each.name for each in load.CONTESTANTS])
def test_every_contestant_does_all_frames(checkpoint: Checkpoint, contestant: type[load.Contestant]) -> None:
    frames = inputs.batches(8, (1, 28, 28), count=1)[0]
    schedule = load.arrivals("poisson", 3, 400.0, 0.5)
    with Purifier(checkpoint, engine="openvino") as purifier:
        outcome = load.run(contestant(purifier, len(schedule)), schedule, frames)
    assert outcome.frames == len(schedule)
    assert len(outcome.pulses) >= 10
    assert outcome.dropped == 0
    assert (outcome.latencies > 0).all()
    kept = outcome.kept()
    assert kept[-1] == outcome.percentile(100) == outcome.latencies.max()
    assert len(kept) == len(schedule)


def test_a_short_soak(
    checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "DISTINCT", 20)
    monkeypatch.setattr(soak, "POLICIES", ("block", "latest"))
    sizes = ["--frames", "300", "--life", "150"]
    options = [*sizes, "--checkpoint", str(checkpoint_path), "--out", str(tmp_path / "s.json")]
    assert soak.main(options) == 0
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["wrong"] == []
    assert record["frames_in"] == 300 + record["dropped"]["invalid"]
    assert [each["when_full"] for each in record["lives"]] == ["block", "latest"]
    assert record["grew"] is None
    assert "too short to say" in capsys.readouterr().out


def test_growth_is_counted_after_the_first_minute() -> None:
    def sample(seconds: float, in_use: int, threads: int = 5, resident: int = 5000) -> dict[str, Any]:
        return {"seconds": seconds, "in_use": in_use, "resident": resident, "threads": threads, "handles": 9}

    start = [sample(0, 100), sample(30, 900), sample(61, 1000), sample(80, 1000), sample(90, 1000)]
    assert soak.judge(start)["grew"] is None
    assert soak.judge([*start, sample(200, 1020)])["grew"] is False
    assert soak.judge([*start, sample(200, 1021)])["grew"] is True
    assert soak.judge([*start, sample(200, 1000, threads=6)])["growth"]["threads"] == 1
    end = [sample(120 + index, 1000, resident=resident) for index, resident in enumerate((5100, 9000, 5100))]
    assert soak.judge([*start, *start[2:], *start[2:], *end])["grew"] is False
    end[-1]["resident"] = 5101
    assert soak.judge([*start, *start[2:], *start[2:], *end])["grew"] is True


def test_what_is_in_use_is_seen() -> None:
    before = soak.usage()["in_use"]
    held = np.ones(10_000_000, np.uint8)
    assert soak.usage()["in_use"] - before == pytest.approx(held.nbytes, rel=0.05)


def test_the_soak_notices_a_wrong_image_and_a_wrong_order() -> None:
    right, wrong = np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)
    checker = soak.Checker([right.tobytes()])
    checker(Result(right, 0.0, "a", (0, 0, False), 0.0))
    assert (checker.wrong, checker.digest) == ([], checker.expected)
    checker(Result(wrong, 0.0, "a", (1, 0, False), 0.0))
    assert checker.digest != checker.expected
    checker(Result(right, 0.0, "a", (3, 0, False), 0.0))
    assert [line.split(": ")[1][:7] for line in checker.wrong] == ["frame 1", "frame 3"]


@pytest.mark.parametrize("side", [28, 41])
def test_a_mosaic_is_cut_up_again(side: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, side, side, 1), dtype=np.uint8)
    frame = regions.mosaic(images)
    assert frame.shape == (2 * side, 25 * side, 1)
    np.testing.assert_array_equal(regions.cut(frame, 50, side), images)


def test_the_servers_table() -> None:
    told = {"clients": 8, "requests_per_second": 1500.0, "gain": 1.25, "images_per_batch": 5.5, "p99": 0.009}
    shown = report.serving_lines(Results([Row("serving", "Triton, 8 clients, batched", 1, (0.005,) * 3, told)]))
    assert shown[-2].split() == [
        "Triton,",
        "8",
        "clients,",
        "batched",
        "8",
        "1,500",
        "1.25",
        "5.50",
        "5.00",
        "ms",
        "9.00",
        "ms",
    ]
    assert report.serving_lines(Results()) == []
