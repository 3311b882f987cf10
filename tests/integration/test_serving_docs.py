"""The examples of docs/serving.md, with the server that its commands start."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton_server import free_ports, wait_until_ready

from bench.cluster import ENVIRONMENT, command_of, descendants

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
CHECKS = """
from defense_vae_fast import Purifier

with Purifier.from_pretrained("fashion_mnist") as purifier:
    expected, scores = purifier(frames, return_score=True)
assert (clean == expected).all() and (score[:, 0] == scores).all()
assert (image == expected[0]).all() and np.float32(its_score) == scores[0]
assert (report.images, report.failed) == (64, 0)
assert sorted(row["key"] for row in rows) == sorted(f"{number}.png" for number in range(64))
"""


def blocks(kind: str) -> list[str]:
    text = (ROOT / "docs" / "serving.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    write, launch = (shlex.split(block) for block in blocks("sh")[:2])
    assert write[0] == "defense-vae-fast"
    assert launch[0] == "python"
    cli = [sys.executable, "-c", "from defense_vae_fast.cli import main; main()"]
    subprocess.run([*cli, *write[1:]], cwd=tmp_path, check=True, timeout=120)
    http, grpc, metrics, serve = free_ports(4)
    options = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--exit-timeout-secs=5"]
    code = "\n\n".join(blocks("python")).replace("127.0.0.1:8000", f"127.0.0.1:{http}")
    code = code.replace("handle = serve", f'serve.start(http_options={{"port": {serve}}})\nhandle = serve')
    (tmp_path / "examples.py").write_text(code + CHECKS)
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": "local"}
    log = tmp_path / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen([sys.executable, *launch[1:], *options], cwd=tmp_path, stdout=file, stderr=file)
        try:
            wait_until_ready(f"127.0.0.1:{http}", server, log)
            done = subprocess.run(
                [sys.executable, "examples.py"], capture_output=True, text=True, cwd=tmp_path, timeout=200,
                env=environment, check=False,
            )  # fmt: skip
        finally:
            server.terminate()
            server.wait(60)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "64 images 0 of them unusable" in done.stdout
    assert not [command_of(pid) for pid in descendants(os.getpid()) if "triton" in command_of(pid)]
