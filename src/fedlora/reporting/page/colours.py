"""The computed part of a page's style: classes of series, and of cells shaded by a share or a difference.

Text on a shade has a contrast of at least 4.5:1 (WCAG 2.2, 1.4.3), in a light page and in a dark one.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedlora.reporting.palette import Style

LIGHT, DARK = "#ffffff", "#14171b"
"""Backgrounds; page.css has the same."""
_INK = {LIGHT: "#1b1f24", DARK: "#ffffff"}
_NONE, _ALL = {LIGHT: "#f3f7fb", DARK: "#1b2733"}, {LIGHT: "#62a8e0", DARK: "#27689f"}
_LOSS, _GAIN = {LIGHT: "#ee9f78", DARK: "#96481f"}, {LIGHT: "#62a8e0", DARK: "#27689f"}
SHADES, SIDES = 10, 5
"""Classes `q0` to `q10` from none to all, and `d-5` to `d5` from loss to gain."""


def shade_of(share: float) -> str:
    """The class of a share in 0..1."""
    return f"q{round(min(max(share, 0.0), 1.0) * SHADES)}"


def side_of(value: float, most: float) -> str:
    """The class of a difference, where the largest is `most`; above 0 is a gain."""
    return f"d{round(min(max(value / most, -1.0), 1.0) * SIDES) if most else 0}"


def colour_rules(styles: Iterable[Style]) -> str:
    """The style sheet of the classes of series, `s0`, `s1` and so on, and of shades."""
    series = "".join(
        f".s{place}{{--s:{style.colour};--d:{' '.join(f'{2 * part:g}' for part in style.dash) or '0'}}}"
        for place, style in enumerate(styles)
    )
    light, dark = _shades(LIGHT), _shades(DARK)
    return f"{series}{light}@media(prefers-color-scheme:dark){{{dark}}}@media print{{{light}}}"


def _shades(page: str) -> str:
    shades = [(f"q{step}", mix(_NONE[page], _ALL[page], step / SHADES)) for step in range(SHADES + 1)]
    for step in range(-SIDES, SIDES + 1):
        end = _LOSS if step < 0 else _GAIN
        shades.append((f"d{step}", mix(page, end[page], abs(step) / SIDES)))
    return "".join(f".{name}{{background:{colour};color:{_INK[page]}}}" for name, colour in shades)


def mix(one: str, other: str, share: float) -> str:
    """`one` with `share` of `other`, mixed in sRGB."""
    pairs = zip(_channels(one), _channels(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2, from 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _channels(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def _luminance(colour: str) -> float:
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
