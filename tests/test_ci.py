"""The script for continuous integration takes its test command from the README."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def print_command(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", root / ".ci" / "run", "--print-command"], capture_output=True, text=True, check=False
    )


def test_the_command_is_the_readmes():
    done = print_command(ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/pytest\n"
    assert done.stdout in (ROOT / "README.md").read_text()


def test_the_command_follows_the_readme(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    text = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(text.replace(".venv/bin/pytest\n", ".venv/bin/pytest -x\n"))
    assert print_command(tmp_path).stdout.endswith(".venv/bin/pytest -x\n")
    (tmp_path / "README.md").write_text(text.replace("<!-- test command -->", ""))
    done = print_command(tmp_path)
    assert done.returncode == 1
    assert "no code block" in done.stderr
