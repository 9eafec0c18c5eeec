"""Fixtures for the whole suite: a two-layer Llama and a small tokenizer, built once and loaded once.

Nothing here waits: one thread computes (two on a model of width 32 only wait for each other), nothing is flushed to the
disk (no test cuts the power), and a run that several tests look at is trained once (`finished`).
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from tiny_run import WORDS, make_client_files, make_tiny_model

from fedlora.openmp import SPIN_COUNT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# read by OpenMP when torch is first imported, so before any test imports it; processes that tests start inherit them
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# the same examples every time, and nothing kept between runs
settings.register_profile("fedlora", derandomize=True, deadline=None, database=None)
settings.load_profile("fedlora")
# its tables of characters too: set here, because test modules make strategies while they are imported
HYPOTHESIS_HOME = tempfile.mkdtemp(prefix="fedlora-hypothesis-")
atexit.register(shutil.rmtree, HYPOTHESIS_HOME, ignore_errors=True)
set_hypothesis_home_dir(HYPOTHESIS_HOME)

# a shell that starts the tests in the background makes them deaf to interrupts, and all that they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that would leave this machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test connects to {address[0]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def _no_flush() -> Iterator[None]:
    """os.fsync only looks at its descriptor: a third of a tiny run would be waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or fills the user's cache, except the slow ones, which need the converted model in it."""
    if request.config.option.markexpr != "slow":
        os.environ["FEDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def handlers() -> Iterator[None]:
    """What this process does on signals, kept from a command that ends by one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a two-layer Llama (grouped queries, tied embeddings, float32) with a byte-level tokenizer."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny_model"))
    with pytest.MonkeyPatch.context() as patch:
        _keep_loaded(folder, patch)
        yield folder


def _keep_loaded(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """From the second time on, who loads this folder in this process gets a copy of what transformers loaded."""
    from fedlora.llm import base_model

    load, kept = base_model._load, {}

    def load_once(name: str, *how: Any) -> Any:
        if name != str(folder):
            return load(name, *how)
        key = repr(how)
        if key not in kept:
            kept[key] = load(name, *how)
        return copy.deepcopy(kept[key])

    patch.setattr(base_model, "_load", load_once)


@pytest.fixture
def make_clients(tmp_path: Path) -> Callable[..., Path]:
    """Write the contract's tree: `sizes` rows per client, one category each; returns the data folder."""

    def make(sizes: list[int], folder: str = "data") -> Path:
        return make_client_files(tmp_path / folder, sizes)

    return make


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    """Six rows in two categories, with different prompt lengths."""
    rows = [
        {"instruction": "say " + "x" * (3 * row), "input": "", "output": WORDS[row], "category": f"c{row % 2}"}
        for row in range(6)
    ]
    path = tmp_path / "dolly_test_3.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
