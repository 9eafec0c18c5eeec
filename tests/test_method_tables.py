"""The tables of docs/strategies.md against the code that they describe."""

from __future__ import annotations

from method_tables import COMBINED, PAGE, is_taken, make_combinations

from fedlora.config.train import METHODS


def test_the_page_says_what_can_be_combined():
    page = PAGE.read_text(encoding="utf-8")
    assert make_combinations() == page.split(COMBINED[0])[1].split(COMBINED[1])[0]


def test_what_is_asked_is_what_the_code_refuses():
    assert is_taken("homo", {"dp_noise_multiplier": 1.0, "dp_clip": 1.0})
    assert not is_taken("krum", {"dp_noise_multiplier": 1.0, "dp_clip": 1.0})
    assert not is_taken("homo", {"client_ranks": "8,4x7"})


def test_every_mode_has_a_row_with_its_source():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert all(any(row.startswith(f"| `{mode}` |") for row in rows) for mode in METHODS)
