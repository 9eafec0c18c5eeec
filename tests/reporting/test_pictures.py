"""Every picture, drawn of hostile data and measured: nothing overlaps, nothing is cut, every axis can be read."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedlora.comparing.figures import draw_comparison
from fedlora.methods.table import METHODS
from fedlora.reporting import drawing
from fedlora.reporting.categories_figure import draw_categories
from fedlora.reporting.drawing import clip, house_style
from fedlora.reporting.drift_figure import draw_drift
from fedlora.reporting.findings import Findings
from fedlora.reporting.marks import number_label
from fedlora.reporting.palette import BASE_COLOUR, COLOURS, FAINT, FRAME, INK, colour_of
from fedlora.reporting.rounds_figure import draw_rounds
from fedlora.reporting.summary import ModelRow

LONG = "Municipal Hospital of a very long name, department number "
NAMES = [f"{LONG}7", f"{LONG}8", "北京协和医院心脏内科", "مستشفى القاهرة", "$\\frac{1}{2}$", "b" * 200]
CATEGORIES = ["医疗问答与诊断", "law", "تعليم", "$x$ & y", "sums", ""]


class Drawn:
    """A picture as it was saved: its figure, and the boxes of its texts in pixels."""

    def __init__(self, figure: Figure) -> None:
        figure.canvas.draw()
        self.figure = figure
        self.boxes = {text: _corners(figure, text) for text in _texts(figure)}
        self.points = [_points(figure, line) for axes in figure.axes for line in axes.lines]
        self.words = [text.get_text() for text in self.boxes]


def _texts(figure: Figure) -> Iterator[Text]:
    """Every text that is drawn: labels of ticks outside the limits are not."""
    ticks = [
        (axis, tick) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
    ]
    drawn = {}
    for axis, tick in ticks:
        low, high = sorted(axis.get_view_interval())
        drawn[tick.label1] = low <= tick.get_loc() <= high
        drawn[tick.label2] = False
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and drawn.get(text, True):
            yield text


def _corners(figure: Figure, text: Text) -> np.ndarray:
    """The four corners of a text, which may be slanted."""
    renderer, angle = figure.canvas.get_renderer(), text.get_rotation()  # type: ignore[attr-defined]
    if angle % 90:
        text.set_rotation(0)
        box = text.get_window_extent(renderer)
        text.set_rotation(angle)
    else:
        box, angle = text.get_window_extent(renderer), 0.0
    x0, y0, x1, y1 = box.extents
    corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    centre = text.get_transform().transform(text.get_position())
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return (corners - centre) @ matrix + centre


def _points(figure: Figure, line: Any) -> tuple[Any, np.ndarray]:
    """A line of axes, and how far inside of them its markers are, in pixels: negative is cut."""
    data = np.column_stack(line.get_data(orig=False)).astype(float)
    seen = line.get_transform().transform(data[np.isfinite(data).all(axis=1)])
    radius = line.get_markersize() / 2 * figure.dpi / 72 if line.get_marker() not in ("", "None", "|", None) else 0.0
    box = line.axes.bbox
    room = np.column_stack([seen[:, 0] - box.x0, box.x1 - seen[:, 0], seen[:, 1] - box.y0, box.y1 - seen[:, 1]])
    return line, room.min(axis=1) - radius if len(seen) else np.array([])


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two convex shapes overlap by more than a pixel: no edge of either has them on its two sides."""
    for shape in (one, other):
        for start, end in zip(shape, np.roll(shape, -1, axis=0), strict=True):
            normal = np.array([end[1] - start[1], start[0] - end[0]])
            if not (length := np.linalg.norm(normal)):
                continue
            here, there = one @ normal / length, other @ normal / length
            if here.max() <= there.min() + 1 or there.max() <= here.min() + 1:
                return False
    return True


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """The pictures that were saved; they are measured instead of being written."""
    pictures: list[Drawn] = []
    monkeypatch.setattr(drawing, "_say_missing", lambda: None)

    def measure(figure: Figure, file: Any, **options: Any) -> None:
        pictures.append(Drawn(figure))
        file.write(b"a picture")

    monkeypatch.setattr(Figure, "savefig", measure)
    return pictures


def check(picture: Drawn) -> None:
    """What holds for every picture."""
    width, height = picture.figure.get_size_inches() * picture.figure.dpi
    for text, box in picture.boxes.items():
        assert "mathdefault" not in text.get_text()
        assert box.min() >= -1, f"cut at the left or below: {text.get_text()!r}"
        assert (box.max(axis=0) <= (width + 1, height + 1)).all(), f"cut at the right or above: {text.get_text()!r}"
    texts, boxes = list(picture.boxes), list(picture.boxes.values())
    low, high = np.array([box.min(axis=0) for box in boxes]), np.array([box.max(axis=0) for box in boxes])
    near = ((low[:, None] < high[None]) & (high[:, None] > low[None])).all(axis=2)
    for one, other in zip(*np.nonzero(np.triu(near, 1)), strict=True):
        words = f"{texts[one].get_text()!r} overlaps {texts[other].get_text()!r}"
        assert not _overlap(boxes[one], boxes[other]), words
    known = {colour.lower() for colour in (*COLOURS, BASE_COLOUR, INK, FAINT)}
    for line, room in picture.points:
        assert to_hex(line.get_color()) in known
        if not str(line.get_label()).startswith("_child") or line.get_marker() != "None":
            assert (room >= -0.5).all(), f"points of {line.get_label()!r} are cut"


def findings_of(
    modes: list[str],
    clients: int,
    rounds: int,
    categories: list[str],
    *,
    names: list[str] | None = None,
    flat: bool = False,
) -> Findings:
    """Runs with random numbers, or with equal ones; some are missing, not numbers or exactly zero."""
    draw = random.Random(1)

    def share() -> float:
        return 1.0 if flat else draw.random()

    def scores() -> dict[str, Any]:
        found = {name: share() for name in categories}
        return {"own": share(), "all": share(), "categories": found}

    rows = [ModelRow("base", modes[0], "base", "base", own=0.0, all=0.0, categories=dict.fromkeys(categories[1:], 0.0))]
    titles, curves, runs, drift = {}, {}, {}, {}
    for place, mode in enumerate(modes):
        method, name = METHODS[mode], mode if modes.count(mode) == 1 else f"{mode}-{place}"
        titles[name], runs[name] = name, {"mode": mode}
        both = method.has_global_model and method.keeps_personal_model
        if method.has_global_model:
            rows.append(ModelRow(f"{name} (global)" if both else name, name, mode, "global", **scores()))
        if method.keeps_personal_model:
            title = f"{name} (personal)" if both else name
            for client in range(clients):
                called = names[client % len(names)] if names else f"client {client}"
                own = categories[client % len(categories)]
                label = f"{title} {called} ({own})"
                rows.append(ModelRow(label, name, mode, "client", client, called, own_categories=(own,), **scores()))
            rows.append(ModelRow(f"{title} mean of {clients} (costs: total)", name, mode, "mean", **scores()))
        losses = [(number, 2.0 if flat else 3 - number * draw.random()) for number in range(rounds + 1)]
        losses[-1] = (rounds, math.nan) if place % 4 == 3 else losses[-1]
        curves[name] = {"training": losses[1:], "held_out": losses}
        if both:
            curves[name]["held_out_personal"] = losses[1:]
        errors = [(number, 0.0 if place % 3 == 0 else 10.0 ** -(place % 17)) for number in range(1, rounds + 1)]
        drift[name] = {"aggregation_error": errors, "drift_cosine_mean": [(n, share()) for n, _ in errors]}
    return Findings(rounds, rows, [], [], [], titles, curves, [], [], [], runs, {}, [], drift)


def result_of(modes: list[str], clients: int, settings: list[str], *, names: list[str] | None = None) -> dict[str, Any]:
    """A comparison of these methods, with three seeds."""
    draw = random.Random(1)

    def metric(*values: float) -> dict[str, Any]:
        return {"mean": sum(values) / len(values), "values": {str(seed): value for seed, value in enumerate(values)}}

    rows, tables, curves = [], [], []
    for setting in settings:
        losses = metric(*(2 + draw.random() for _ in range(3)))
        rows.append({"setting": setting, "mode": "base", "label": "base", "metrics": {"loss_own": losses}})
        methods = {"base": {"gain": {"0": 0.0}}}
        for place, mode in enumerate(modes):
            method = METHODS[mode]
            both = method.has_global_model and method.keeps_personal_model
            sent = 0.0 if method.pools_rows or not method.combines else 5e6 * (1 + place % 3)
            name = mode if modes.count(mode) == 1 else f"{mode}-{place}"
            name = f"{LONG}{place}" if names and place == 0 else name
            for label in (f"{name} (global)", f"{name} (personal)") if both else (name,):
                found = {"loss_own": metric(*(2 + draw.random() for _ in range(3)))}
                found |= {"bytes_up": metric(sent), "bytes_down": metric(sent)}
                if sent:
                    found["aggregation_error"] = metric(
                        *(0.0 if place == 1 else 10.0 ** -(place % 17) for _ in range(3))
                    )
                rows.append({"setting": setting, "mode": mode, "label": label, "metrics": found})
                methods[label] = {"gain": {str(c): draw.gauss(0, 1) for c in range(clients) if c != place}}
        called = {str(client): names[client % len(names)] for client in range(clients)} if names else {}
        shares = {str(client): {CATEGORIES[client % len(CATEGORIES)]: 1.0} for client in range(clients)}
        tables.append({"setting": setting, "same_clients": True, "names": called, "shares": shares, "methods": methods})
        for mode in modes[:2]:
            own = [{str(c): 2 + draw.random() for c in range(clients)} for _ in range(4)]
            hops = [{"steps": 8 * (hop + 1), "own": one} for hop, one in enumerate(own)]
            curves.append({"setting": setting, "method": mode, "names": called, "seeds": {"1": hops}})
    return {"settings": settings, "rows": rows, "clients": tables, "curves": curves}


EVERY_METHOD = pytest.param(list(METHODS), 30, 5, None, False, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    ("modes", "clients", "rounds", "names", "flat"),
    [
        (["homo"], 1, 1, None, False),
        (["none", "homo", "homo", "ditto", "flora"], 6, 3, NAMES, False),
        pytest.param(["none", "homo", "seq"], 3, 2, None, True, marks=pytest.mark.thorough),
        EVERY_METHOD,
    ],
)
def test_nothing_overlaps_and_nothing_is_cut_in_the_pictures_of_a_report(
    drawn: list[Drawn], modes: list[str], clients: int, rounds: int, names: list[str] | None, flat: bool
) -> None:
    findings = findings_of(modes, clients, rounds, CATEGORIES, names=names, flat=flat)
    for draw in (draw_rounds, draw_categories, draw_drift):
        draw(findings)
        check(drawn[-1])
    rounds_picture, matrix, drift = drawn
    for axes in (*rounds_picture.figure.axes[:2], *drift.figure.axes):
        assert axes.get_xlabel() == "round"
        assert axes.get_ylabel()
    assert [axes.get_ylabel() for axes in rounds_picture.figure.axes[:2]] == ["nats per token"] * 2
    shown = [row.label.removesuffix(" (costs: total)") for row in findings.rows]
    labels = [label.get_text() for label in matrix.figure.axes[0].get_yticklabels()]
    assert labels == [clip(name, 48) for name in shown]
    has_frames = any(row.own_categories for row in findings.rows)
    assert ("framed: what that client was trained on" in matrix.words) == has_frames
    if has_frames:
        assert {to_hex(patch.get_edgecolor()) for patch in matrix.figure.axes[0].patches} == {FRAME.lower()}


@pytest.mark.parametrize(
    ("modes", "clients", "settings", "names"),
    [
        (["homo", "seq", "seq", "ditto", "none", "pooled"], 6, ["epochs 1, 数据划分", "epochs 4, iid"], NAMES),
        (["homo", "none"], 2, [""], None),
        pytest.param(
            list(METHODS), 30, [f"epochs {n}, partition x" for n in range(2)], None, marks=pytest.mark.thorough
        ),
    ],
)
def test_nothing_overlaps_and_nothing_is_cut_in_the_pictures_of_a_comparison(
    drawn: list[Drawn], modes: list[str], clients: int, settings: list[str], names: list[str] | None
) -> None:
    result = result_of(modes, clients, settings, names=names)
    pictures = dict(zip(draw_comparison(result), drawn, strict=True))
    for picture in drawn:
        check(picture)
    assert {name.partition("-")[0].partition(".")[0] for name in pictures} == {
        *("losses", "errors", "bytes", "clients", "forgetting")
    }
    labels = [label.get_text() for label in pictures["losses.png"].figure.axes[0].get_yticklabels()]
    assert labels == [clip(row["label"]) for row in result["rows"] if row["setting"] == settings[0]]
    assert all(axes.get_xlabel() for picture in drawn for axes in picture.figure.axes if axes.lines)
    assert "held-out loss, own\n(nats per token)" in pictures["bytes.png"].words


def test_what_sends_no_adapters_does_not_stand_at_zero_megabytes(drawn: list[Drawn]) -> None:
    draw_comparison(result_of(["homo", "none", "pooled"], 2, [""]))
    picture = next(one for one in drawn if "pooled: rows travel, no adapters" in one.words)
    assert "none: sends nothing" in picture.words
    marked = [line for line in picture.figure.axes[0].lines if line.get_marker() != "None"]
    assert [line.get_label() for line in marked] == ["homo"]
    assert marked[0].get_xdata()[0] == 10.0


def test_a_point_that_lies_under_another_is_larger_than_it(drawn: list[Drawn]) -> None:
    result = result_of(["homo", "fedprox"], 2, [""])
    for row in result["rows"][1:]:
        row["metrics"] |= {name: {"mean": 2.5, "values": {"0": 2.5}} for name in ("loss_own", "bytes_up", "bytes_down")}
    draw_comparison(result)
    picture = next(one for one in drawn if "adapters sent, down and up (MB)" in one.words)
    sizes = {line.get_label(): line.get_markersize() for line in picture.figure.axes[0].lines}
    assert sizes["homo"] > sizes["fedprox"]


def test_every_line_of_a_method_has_its_colour_and_runs_of_one_method_differ_otherwise(drawn: list[Drawn]) -> None:
    draw_rounds(findings_of(["homo", "homo", "ditto"], 2, 3, CATEGORIES))
    lines = {line.get_label(): line for line in drawn[0].figure.axes[0].lines}
    colours = {name: line.get_color() for name, line in lines.items()}
    homo, ditto = colour_of("homo"), colour_of("ditto")
    assert colours == {"homo-0": homo, "homo-1": homo, "ditto (global)": ditto, "ditto (personal)": ditto}
    assert lines["homo-0"].get_linestyle() != lines["homo-1"].get_linestyle()
    assert lines["ditto (personal)"].get_markerfacecolor() == "white"


def test_black_is_the_mean_over_clients_and_many_clients_are_all_drawn(drawn: list[Drawn]) -> None:
    draw_comparison(result_of(["homo", "none"], 14, [""]))
    lines = drawn[-1].figure.axes[0].lines
    assert [line.get_label() for line in lines if line.get_color() == INK] == ["mean over clients"]
    assert sum(line.get_label() == "each of 14 clients" for line in lines) == 14


def test_an_error_of_zero_is_marked_0_below_the_decades_of_the_others(drawn: list[Drawn]) -> None:
    findings = findings_of(["homo", "seq", "fedex"], 2, 2, CATEGORIES)
    findings.drift["homo"]["aggregation_error"][:] = [(1, 0.0), (2, 0.0)]  # type: ignore[index]
    findings.drift["seq"]["aggregation_error"][:] = [(1, 3e-8), (2, 4e-8)]  # type: ignore[index]
    draw_drift(findings)
    axes = drawn[0].figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "0"
    assert "10⁻⁸" in labels
    assert axes.lines[0].get_ydata()[0] == axes.get_yticks()[0]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (1000.0, "1000"), (1e-7, "10⁻⁷"), (2.5e-8, "2.5·10⁻⁸"), (-1e-4, "-1·10⁻⁴")],
)
def test_numbers_of_axes_are_plain_characters(value: float, text: str) -> None:
    assert number_label(value) == text


def test_a_long_name_keeps_both_ends_and_wide_characters_count_twice() -> None:
    assert clip(f"{LONG}7") != clip(f"{LONG}8")
    assert len(clip("x" * 100)) == 30
    assert clip("医" * 15) == "医" * 15
    assert clip("医" * 40) == "医" * 7 + "…" + "医" * 7


def test_characters_that_no_font_has_are_reported_once(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(drawing, "_MORE_FONTS", ())
    drawing._say_missing.cache_clear()
    for _ in range(2):
        with house_style():
            figure = drawing.new_figure(1, 1)
            figure.text(0, 0, "新闻")
            drawing.png_bytes(figure)
    assert capsys.readouterr().err.count("show boxes") == 1


def test_a_font_of_the_system_that_has_chinese_is_used(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "news"])
    builder.setupCharacterMap({ord("新"): "news"})
    glyph = TTGlyphPen(None).glyph()
    builder.setupGlyf({".notdef": glyph, "news": glyph})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "news"), (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Noto Sans CJK SC", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cjk.ttf")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    manager.addfont(tmp_path / "cjk.ttf")
    drawing._say_missing.cache_clear()
    with house_style():
        figure = drawing.new_figure(1, 1)
        figure.text(0, 0, "a新")
        drawing.png_bytes(figure)
    assert capsys.readouterr().err == ""
