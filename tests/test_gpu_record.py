"""The whole record's command, dry, and its steps with commands made for it; the endurance run on the CPU."""

from __future__ import annotations

import json
import signal
import sys
import time

import numpy as np
import pytest

from bench import endurance, gpu_record, rtx_trial
from bench.gpu_record import Step
from defense_vae_fast import cuda
from training.experiments.cells import TABLES

STEPS = ("acceptance", "rtx", "memcheck", "racecheck", "endurance", "accuracy", "checkpoint", "tables")


def test_without_a_gpu_it_says_what_would_run(tmp_path, capsys):
    if cuda.has_device():
        pytest.skip("there is a GPU here")
    assert gpu_record.main(["--out", str(tmp_path)]) == gpu_record.NOTHING
    shown = capsys.readouterr().out
    assert "there is no GPU here" in shown
    assert all(f"  {name}: " in shown for name in STEPS)
    assert not list(tmp_path.iterdir())


def python(name, code, seconds=20.0, **options):
    return Step(name, (sys.executable, "-c", code), seconds, **options)


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        (python("good", "print('fine')"), "passed"),
        (python("bad", "raise SystemExit(3)"), "failed"),
        (python("idle", "raise SystemExit(5)"), "skipped"),
        (python("absent", "print()", needs="no-such-program"), "skipped"),
        (python("slow", "import time; time.sleep(60)", 0.5), "stopped after 0 s"),
        (python("long", "import time; time.sleep(60)", 0.5, resumes=True), "to be continued"),
    ],
    ids=lambda value: value.name if isinstance(value, Step) else "",
)
def test_outcomes(step, outcome):
    assert gpu_record.run(step)["outcome"] == outcome


def test_one_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(gpu_record, "GRACE_SECONDS", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    found = gpu_record.run(python("stubborn", code, 2.0))
    assert found["exit_code"] == -signal.SIGKILL
    assert found["output"] == "on\n"


def test_every_step_is_in_the_record_and_one_failure_is_the_verdict(tmp_path, monkeypatch):
    made = [python("good", "print('fine')"), python("bad", "raise SystemExit('broken')"), python("last", "")]
    monkeypatch.setattr(gpu_record, "steps", lambda out, scale="paper": made)
    monkeypatch.setattr(cuda, "has_device", lambda: True)
    assert gpu_record.main(["--out", str(tmp_path)]) == gpu_record.FAILED
    record = json.loads((tmp_path / "record.json").read_text())["steps"].values()
    assert [(one["step"], one["outcome"]) for one in record] == [
        ("good", "passed"), ("bad", "failed"), ("last", "passed"),
    ]  # fmt: skip
    assert "broken" in [*record][1]["output"]
    assert gpu_record.main(["--out", str(tmp_path), "--only", "last"]) == gpu_record.OK
    assert len(json.loads((tmp_path / "record.json").read_text())["steps"]) == 3


def test_all_ends_within_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_record, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu_record, "SHORTEST", 1.0)
    made = [
        python("quick", "print('fine')"), python("long", "import time; time.sleep(60)", 60.0, resumes=True),
        python("late", "print('late')"),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_record, "steps", lambda out, scale="paper": made)
    monkeypatch.setattr(cuda, "has_device", lambda: True)
    start = time.monotonic()
    assert gpu_record.main(["--out", str(tmp_path), "--within", "8"]) == gpu_record.OK
    assert time.monotonic() - start < 30
    record = json.loads((tmp_path / "record.json").read_text())["steps"].values()
    assert [one["outcome"] for one in record] == ["passed", "to be continued", "not begun"]


def test_the_tables_are_of_the_scale_that_is_asked_for(tmp_path):
    for scale in ("paper", "cpu"):
        (tables,) = (step.command for step in gpu_record.steps(tmp_path, scale) if step.name == "tables")
        assert tables[tables.index("--scale") + 1] == scale
        assert set(TABLES) < set(tables)


def test_endurance(tmp_path):
    out = tmp_path / "endurance.json"
    assert endurance.main(["--images", "700", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["images"] >= 700
    assert record["calls_with_other_bytes"] == 0
    assert record["growth"]["host"] is not None
    if not cuda.has_device():
        assert endurance.main(["--engine", "tensorrt", "--out", str(out)]) == endurance.UNAVAILABLE


def test_the_trial_of_rtx_says_why_it_is_not_tried(capsys):
    if cuda.has_device():
        pytest.skip("there is a GPU here")
    assert rtx_trial.main([]) == rtx_trial.NOT_TRIED
    assert "not tried: " in capsys.readouterr().out


def test_endurance_sees_other_bytes_and_growth(monkeypatch):
    kept = []

    class Leaky:
        class config:
            image_shape = (1, 28, 28)

        def __call__(self, images, return_score):
            kept.append(np.ones(3 << 20, np.uint8))
            return np.full_like(images, len(kept) > 60), np.zeros(len(images), np.float32)

    found = endurance.endure(Leaky(), 7000)
    assert found["calls_with_other_bytes"] > 0
    assert found["grew"]
