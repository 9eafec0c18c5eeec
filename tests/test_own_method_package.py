"""The example package, installed as its author and its users would: by pip, in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "examples" / "own_method"
SOURCE = Path(__file__).parents[1] / "src"
PROGRAM = """
import json, sys
import pytest
from fedlora.cli import main

folder, flags = sys.argv[1], json.loads(sys.argv[2])
assert pytest.main(["-q", "-p", "no:cacheprovider", folder]) == 0
assert main(["methods", "check", "clipped"]) == 0
assert main(["train", "--method", "clipped", "--set", "longest=0.5", *flags]) == 0
assert main(["verify", "run", "--model_dir", flags[1]]) == 0
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment that sees the packages of this one, with the example installed."""
    venv.EnvBuilder(system_site_packages=True).create(tmp_path / "venv")
    made = tmp_path / "venv" / "bin" / "python"
    # the packages of the environment that runs the tests, fedlora among them
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    here = sysconfig.get_path("purelib")
    (site / "tests.pth").write_text(f"import site; site.addsitedir({here!r})\n{SOURCE}\n")
    # pip builds in the folder that it is given
    copy = shutil.copytree(PACKAGE, tmp_path / "own_method", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    command = [sys.executable, "-m", "pip", "--python", str(made), "install", *offline, str(copy)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return made


def test_the_example_keeps_its_own_tests(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE)
    monkeypatch.delitem(sys.modules, "own_method", raising=False)
    import test_own_method  # pyright: ignore[reportMissingImports]

    test_own_method.test_it_keeps_the_laws_of_federated_methods()
    test_own_method.test_a_change_is_cut_to_its_length_and_keeps_its_direction()


@pytest.mark.thorough
def test_an_installed_method_is_checked_trained_and_verified_by_its_name(python, tiny_model, make_clients, tmp_path):
    given = {
        "model_dir": tmp_path / "models",
        "exp_name": "run",
        "base_model": tiny_model,
        "data_path": make_clients([2, 2]),
        "num_clients": 2,
        "client_selection_frac": 1,
        "num_communication_rounds": 1,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "prompt_template": "chat",
        "device": "cpu",
    }
    flags = json.dumps([word for name, value in given.items() for word in (f"--{name}", str(value))])
    tests = shutil.copytree(PACKAGE, tmp_path / "tests", ignore=shutil.ignore_patterns("own_method.py", "__pycache__"))
    done = subprocess.run(
        [python, "-c", PROGRAM, str(tests), flags], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recomputed to the same bytes" in done.stdout
    told = json.loads((tmp_path / "models" / "run" / "run.json").read_text())["method"]
    assert (told["name"], told["from"], told["distribution"], told["version"]) == (
        *("clipped", "entry point", "own-method", "0.1.0"),
    )
    assert list(told["files"]) == ["own_method"]
