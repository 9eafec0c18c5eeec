"""The wheel holds every file of the package, and works where the source is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_PYTHON = {
    "py.typed",
    "flower/bundle/pyproject.toml",
    "reporting/page/templates/page.html.jinja",
    "reporting/page/templates/page.css",
    "reporting/page/templates/page.js",
}
"""Some of what a wheel leaves out unless it is asked for: the types' mark, the Flower bundle, the parts of the page."""

pytestmark = pytest.mark.thorough


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_an_installed_wheel_has_every_file_of_the_package_and_runs(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source))
    run(*pip, *build, folder=tmp_path)
    (wheel,) = tmp_path.glob("fedlora-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), folder=tmp_path)
    shutil.rmtree(source)
    there = files_below(target / "fedlora")
    assert there >= NOT_PYTHON
    assert files_below(ROOT / "src" / "fedlora") - there == set()
    empty = tmp_path / "empty"
    empty.mkdir()
    options = {"folder": empty, "PYTHONPATH": str(target)}
    assert run(sys.executable, "-c", "import fedlora; print(fedlora.__file__)", **options).startswith(str(target))
    for command in ("export", "import", "report", "flower local"):
        assert "usage" in run(sys.executable, "-m", "fedlora", *command.split(), "--help", **options).lower()
