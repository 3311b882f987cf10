"""The acceptance script for GPUs, dry: it must tell that there is none, and reckon rightly."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench import gpu_acceptance
from defense_vae_fast import cuda


def test_without_a_gpu_it_lists_what_would_run_and_says_so(tmp_path):
    if cuda.has_device():
        pytest.skip("there is a GPU here")
    out = tmp_path / "new" / "report.json"
    done = subprocess.run(
        [sys.executable, gpu_acceptance.__file__, "--out", str(out), "--seconds", "200"],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == gpu_acceptance.NOTHING, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert "there is no GPU here" in report["gpu"]
    assert report["gpus"] == report["parts"] == report["rows"] == []
    assert set(gpu_acceptance.FIRST) <= set(report["collected"])
    assert "judged" not in report


def test_a_part_that_skips_a_part_that_fails_and_one_that_hangs(tmp_path, monkeypatch):
    """Real pytest runs, of files made for it."""
    head = "import pytest, time\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    (tmp_path / "good.py").write_text(f"{head}def test_a(): pass\ndef test_b(): pytest.skip('no package x')")
    (tmp_path / "skips.py").write_text(f"{head}def test_a(): pytest.skip('no package x')")
    (tmp_path / "bad.py").write_text(f"{head}def test_a(): pass\ndef test_b(): assert 1 == 2, 'sums'")
    (tmp_path / "hangs.py").write_text(f"{head}def test_a(): time.sleep(60)")
    (tmp_path / "broken.py").write_text("import no_such_package")
    (tmp_path / "none.py").write_text("def test_a(): pass")
    monkeypatch.setattr(gpu_acceptance, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load
    parts = {name: gpu_acceptance._run(f"{name}.py", 30, False) for name in ("good", "skips", "bad", "broken", "none")}
    parts["hangs"] = gpu_acceptance._run("hangs.py", 4, False)
    assert {name: part["outcome"] for name, part in parts.items()} == {
        "good": "passed",
        "skips": "skipped",
        "bad": "failed",
        "broken": "failed",
        "none": "skipped",
        "hangs": "stopped after 4 s",
    }
    assert parts["good"]["counts"] == {"passed": 1, "skipped": 1, "failed": 0}
    assert any("no package x" in reason for reason in parts["good"]["skipped"])
    assert "sums" in parts["bad"]["failed"][0]
    assert "no_such_package" in parts["broken"]["output"]


def row(group, name, batch, seconds_per_image, **details):
    return {"group": group, "name": name, "batch": batch, "p50_per_image": seconds_per_image, "details": details}


def test_the_judgement_is_reckoned_from_the_rows():
    work = {"flop_per_image": 100, "bytes_per_image": 10}
    rows = [
        row("device", "torch, device memory", 1, 50e-6, **work),
        row("device", "torch, device memory", 4096, 1e-6, **work),
        row("device", "tensorrt, device memory", 1, 40e-6, **work),
        row("device", "eager fp32, device memory", 1, 800e-6),
        row("device", "eager fp32, device memory", 4096, 12e-6),
        row("device", "Defense-GAN L=200 R=10, 1 at a time", 1, 0.5),
        row("device", "Defense-GAN L=200 R=10, 64 at a time", 64, 0.02),
        row("engine", "torch, engine alone", 1, 90e-6, device="cuda"),
        row("engine", "torch, 1 streams of 256", 4096, 4e-6, device="cuda", streams=1),
        row("engine", "torch, 2 streams of 256", 4096, 2e-6, device="cuda", streams=2),
        row("forms", "torch, plain forms", 256, 3e-6),
        row("forms", "torch, chosen forms", 256, 2e-6),
        row("forms", "torch, chosen forms", 64, 2e-6),
        row("timeline", "torch, 1 streams of 256", 4096, 1e-6, engine="torch", streams=1, overlap={"share": 0.0}),
        row("timeline", "torch, 3 streams of 256", 4096, 1e-6, engine="torch", streams=3, overlap={"share": 0.75}),
        row("engine", "openvino", 1, 1e-9, device="cpu"),
        row("matmul", "matrix product", 1, 1e-3, device="cuda", precision="fp16", flop=1e12),
        row("copy", "copy within the GPU", 1, 1e-3, device="cuda", bytes=1e9),
    ]
    judged = gpu_acceptance.judge(rows)
    assert judged["engine at batch 1"] == "tensorrt, device memory"
    assert judged["batch 1 on the device, p50 in us"] == pytest.approx(40)
    assert judged["batch 1 host to host, engine alone, p50 in us"] == pytest.approx(90)
    assert judged["images/s from device memory"] == pytest.approx(1e6)
    assert judged["x eager fp32 at batch 1"] == pytest.approx(20)
    assert judged["x eager fp32 at its best batch"] == pytest.approx(12)
    assert judged["x torch.compile max-autotune at batch 1"] is None
    assert judged["x Defense-GAN one image at a time"] == pytest.approx(500_000)
    assert judged["x Defense-GAN at its best batch"] == pytest.approx(20_000)
    assert judged["x one stream, host to host, by streams"] == {"torch": {"2": pytest.approx(2.0), "4": None}}
    assert judged["share of copies or computing that hides behind the other, by streams"] == {
        "torch": {"1": 0.0, "3": 0.75}
    }
    assert judged["torch, x layers in plain form, by batch"] == {"256": pytest.approx(1.5)}
    # 1e15 FLOP/s and 1e12 bytes/s allow 1e-13 and 1e-11 seconds; memory is the roof.
    assert judged["roofline"]["share reached"] == pytest.approx(1e-11 / 1e-6)


def test_nothing_measured_is_none_and_no_error():
    judged = gpu_acceptance.judge([])
    for name in (
        "x one stream, host to host, by streams",
        "share of copies or computing that hides behind the other, by streams",
        "torch, x layers in plain form, by batch",
    ):
        assert judged.pop(name) == {}
    assert set(judged.values()) == {None}
