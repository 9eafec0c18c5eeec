"""Small models of every architecture: their answers, losses and gradients are transformers', or they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import every_base
import pytest
import transformers
from architectures import ARCHITECTURES

STALE = "run `python tools/every_base.py`, then `make docs`"


@pytest.fixture(scope="module")
def kept():
    return json.loads(every_base.RESULTS.read_text(encoding="utf-8"))


def test_every_architecture_has_a_result(kept):
    assert list(kept["results"]) == sorted(ARCHITECTURES), STALE
    assert len(ARCHITECTURES) >= 45
    assert kept["transformers"].split(".")[0] == transformers.__version__.split(".")[0]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_architecture_gives_its_own_results_or_is_refused(name, kept, tiny_model: Path, tmp_path):
    found = every_base.try_base(name, tiny_model, tmp_path / "base")
    if kept["transformers"] == transformers.__version__:
        assert found == kept["results"][name], STALE
