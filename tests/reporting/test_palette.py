"""The palette: contrast, colour-blind readers, and that a style belongs to a method alone."""

from __future__ import annotations

import colorsys
import itertools

import numpy as np
import pytest

from fedlora.methods.table import METHODS
from fedlora.reporting.palette import BASE_COLOUR, COLOURS, client_style, colour_of, style_of

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SIGHTS = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    shares = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, page: str) -> float:
    lights = sorted(float(linear(one) @ TO_XYZ[1]) + 0.05 for one in (colour, page))
    return lights[1] / lights[0]


def lab(rgb: np.ndarray) -> np.ndarray:
    shares = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(shares > 0.008856, np.cbrt(shares), 7.787 * shares + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", ["#ffffff", "#15171c"])
@pytest.mark.parametrize("colour", [*COLOURS, BASE_COLOUR])
def test_every_colour_is_readable_on_white_and_on_dark_pages(colour: str, page: str) -> None:
    assert contrast(colour, page) >= 3.0


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_differ_for_readers_with_every_sight(sight: str) -> None:
    seen = [lab(np.asarray(SIGHTS[sight]) @ linear(colour)) for colour in COLOURS]
    # about 2 is the least difference that anyone sees; Okabe's and Ito's own four have 17
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 16


def test_no_colour_is_yellow_or_black() -> None:
    for colour in COLOURS:
        hue, lightness, _ = colorsys.rgb_to_hls(*(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)))
        assert not 45 <= hue * 360 <= 75
        assert lightness > 0.25


def test_every_method_has_a_look_of_its_own() -> None:
    looks = {(style.colour, style.marker) for style in map(style_of, METHODS)}
    assert len(looks) == len(METHODS)
    assert len({style_of(name).dash for name in METHODS if colour_of(name) == colour_of("homo")}) > 3


def test_runs_of_one_method_share_its_colour_and_marker_and_differ_in_dash() -> None:
    first, second = style_of("homo"), style_of("homo", variant=1)
    assert (first.colour, first.marker) == (second.colour, second.marker)
    assert first.dash != second.dash


def test_a_method_from_outside_looks_the_same_from_every_folder_and_like_no_method_of_the_table() -> None:
    style = style_of("mine.py:best")
    assert style == style_of("/home/someone/mine.py:best")
    assert style.marker not in {style_of(name).marker for name in METHODS}
    assert style.colour in COLOURS


def test_thirty_clients_have_thirty_looks_and_none_is_the_base_model() -> None:
    looks = {client_style(index) for index in range(30)}
    assert len(looks) == 30
    assert BASE_COLOUR not in {style.colour for style in looks}
    assert colour_of("base") == BASE_COLOUR
