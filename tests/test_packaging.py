"""The list of packages in pyproject.toml leaves none out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_and_the_device_code_are_installed():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "defense_vae_fast").rglob("*.py")} | {
        "defense_vae_fast.csrc"
    }
    assert sorted(listed) == sorted(found)
    assert list((ROOT / "csrc").glob("*.cu"))
