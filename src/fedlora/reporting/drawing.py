"""What the pictures of a report share: their look, and how they become bytes.

Drawn without pyplot and from matplotlib's own defaults, so that neither a user's style file nor other plots of the
process change them; equal findings give equal bytes. Colours are those of Okabe and Ito, which colour-blind
readers can tell apart.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedlora.methods.table import find_recorded
from fedlora.plain_text import one_line
from fedlora.reporting.findings import Findings
from fedlora.reporting.summary import ModelRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#333333"
FAINT = "#888888"
BASE_COLOUR = "#999999"
_COLOURS = {0: "#009E73", 1: "#D55E00", 2: "#0072B2", 4: "#CC79A7"}
"""By the place of a method in reports."""
_MORE_COLOURS = ("#56B4E9", "#E69F00", "#000000", "#F0E442")
_MAX_LABEL = 28

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    # a dollar sign in a name is a dollar sign
    "text.parse_math": False,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Everything drawn and saved inside looks alike, whatever the user's own style is."""
    matplotlib = _import_matplotlib()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # the bundled font lacks some scripts: such a name is drawn as boxes, and stands in full in the tables
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _import_matplotlib() -> Any:
    """matplotlib, also where the environment names a backend that is not installed, as that of a notebook may be for a
    command started there: nothing here needs a backend."""
    if (loaded := sys.modules.get("matplotlib")) is not None:
        return loaded
    named = os.environ.pop("MPLBACKEND", "")
    try:
        import matplotlib
    finally:
        if named:
            os.environ["MPLBACKEND"] = named
    with contextlib.suppress(ValueError):
        if named:
            matplotlib.rcParams["backend"] = named
    return matplotlib


def png_bytes(figure: Figure) -> bytes:
    """`figure` as PNG; no version number in it, so that equal pictures are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def experiment_colours(findings: Findings) -> dict[str, str]:
    """Experiment -> colour: that of its method, or a spare one when that is taken."""
    spare = list(_MORE_COLOURS)
    chosen: dict[str, str] = {}
    for name in findings.curves:
        colour = _COLOURS.get(find_recorded(findings.runs[name]["mode"], findings.runs[name].get("method")).place)
        if colour is None or colour in chosen.values():
            colour = spare.pop(0) if spare else INK
        chosen[name] = colour
    return chosen


def clip(text: str) -> str:
    """A name from data or users as a label: one line, not too long."""
    line = one_line(text)
    return line if len(line) <= _MAX_LABEL else line[: _MAX_LABEL - 1] + "\u2026"


def scored_rows(findings: Findings) -> list[ModelRow]:
    """The rows whose exact match is known."""
    return [row for row in findings.rows if row.categories]
