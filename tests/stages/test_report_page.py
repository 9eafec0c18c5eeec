"""report.html: what it says, that it needs nothing, and that no text from data or models becomes markup."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import ROUNDS, Runs

from fedlora.evaluation.judge.protocol import ORDERS, Sample, make_question
from fedlora.files import json_lines
from fedlora.reporting.page.colours import contrast
from fedlora.reporting.page.render import script_json
from fedlora.stages import report

VOID = {"meta", "br", "input", "img", "path", "circle"}
SCRIPT = "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"


class Reader(HTMLParser):
    """The elements of a page as (name, attributes), the text of each kind of element, and what is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def page_of(runs: Runs, *names: str) -> str:
    return report.run(runs.config(*names)).page.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PNG have tests of their own, and drawing takes most of the time."""
    for name in ("draw_rounds", "draw_categories", "draw_drift"):
        monkeypatch.setattr(f"fedlora.stages.report.{name}", lambda findings: b"png")


def make_runs(root: Path, **fields: Any) -> Runs:
    """homo, seq and none on three clients, answered and scored."""
    runs = Runs(root, **fields)
    runs.write_tests()
    for mode in ("homo", "seq", "none"):
        runs.train(mode, error=0.2 if mode == "homo" else 0.0)
    runs.answer("homo", "base", range(12))
    runs.answer("homo", "global", (0, 5))
    runs.answer("seq", "global", range(6))
    for client in range(3):
        runs.answer("none", f"client_{client}", [row for row in range(12) if row // 4 != client])
    subjects = [f"none/{ROUNDS}/{client}" for client in range(3)]
    runs.score(f"homo/{ROUNDS}/base", f"homo/{ROUNDS}/global", f"seq/{ROUNDS}/global", *subjects)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def html(runs: Runs) -> str:
    return report.run(runs.config("homo", "seq", "none")).page.read_text(encoding="utf-8")


def answers_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="texts">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_answer_names_the_winner_its_lead_and_whether_joining_pays(html: str) -> None:
    first, second = re.findall(r'<p class="answer">(.*?)</p>', html)
    assert first.startswith("Of 2 federated methods homo wins: exact match 0.833 (95 % interval")
    assert "+0.333 against seq (95 % interval +" in first
    assert second.startswith("Joining pays over all categories (0.833; a client alone 0.333 on average) and costs on")


def test_a_lead_whose_interval_includes_0_is_no_win(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    runs.answer("seq", "global", (0, 6, 7))
    runs.score(f"seq/{ROUNDS}/global")
    page = page_of(runs, "homo", "seq")
    assert "homo is ahead: exact match 0.833" in page
    assert "the interval includes 0, so these rows do not tell them apart" in page
    assert "Whether joining pays is open" in page


def test_the_page_has_the_numbers_of_report_md(runs: Runs, html: str) -> None:
    findings = report.run(runs.config("homo", "seq", "none")).findings
    texts = Reader(html).texts
    cells = [*texts["td"], *texts["span"]]
    for row in findings.rows:
        assert f"{row.all:.3f}" in cells
        assert f"{row.held_out_loss:.3f}" in cells
    assert {f"{share:.2f}" for row in findings.rows for share in row.categories.values()} <= {
        cell.split(" (")[0] for cell in cells
    }
    drawn = json.loads(Reader(html).all("div")[[*map(has_chart, Reader(html).all("div"))].index(True)]["data-chart"])
    homo = next(line for line in drawn["lines"] if line["label"] == "homo")
    assert homo["text"] == [f"{loss:.3f}" for _, loss in findings.curves["homo"]["held_out"]]


def has_chart(attributes: dict[str, str]) -> bool:
    return "data-chart" in attributes


def test_every_client_s_gain_has_its_interval_and_counts_in_the_answer(tmp_path: Path) -> None:
    runs = Runs(tmp_path, rows_each=12)
    runs.write_tests()
    for mode in ("homo", "none"):
        runs.train(mode)
    runs.answer("homo", "global", range(12))
    for client in range(3):
        runs.answer("none", f"client_{client}", [row for row in range(36) if client == 1 and row // 12 == 1])
    runs.score(f"homo/{ROUNDS}/global", *(f"none/{ROUNDS}/{client}" for client in range(3)))
    runs.mark_clients("homo/global", *(f"none/client_{client}" for client in range(3)))
    reader = Reader(page_of(runs, "homo", "none"))
    said = next(text for text in reader.texts["p"] if text.startswith("Joining"))
    assert said.startswith("Joining under homo pays for 1 of 3 clients and costs 1, on each client's own test rows")
    assert said.endswith("by exact match, and for 1 the interval includes 0.")
    assert "1 of 3" in reader.texts["dd"]
    intervals = [one["title"] for one in reader.all("td") if "title" in one]
    assert any(title.startswith("95 % interval -1.000 to -") for title in intervals)
    assert {"-1.000", "+1.000"} <= set(reader.texts["span"])
    assert "client 1" in reader.texts["th"]


def test_sections_without_data_are_left_out_or_name_their_command(html: str) -> None:
    ids = [attributes["id"] for attributes in Reader(html).all("section")]
    assert ids == [
        "models",
        "rounds",
        "matrix",
        "gains",
        "drift",
        "forgetting",
        "data",
        "answers",
        "provenance",
        "columns",
    ]
    commands = Reader(html).texts["code"]
    assert any(text.startswith("fedlora compare") and "--methods seq" in text for text in commands)
    assert any(text.startswith("fedlora plan") for text in commands)
    assert any("fedlora train --name none --method none" in text for text in commands)


def test_the_page_loads_nothing_and_runs_only_what_its_policy_names(html: str) -> None:
    reader = Reader(html)
    assert reader.open == []
    policy = next(one["content"] for one in reader.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for name, kind in (("script", "script-src"), ("style", "style-src")):
        texts = reader.texts[name]
        if name == "script":
            data, texts = texts[0], texts[1:]
            assert json.loads(data)["rows"]
            assert [one.get("type") for one in reader.all("script")] == ["application/json", None]
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        allowed = next(part for part in policy.split("; ") if part.startswith(kind))
        assert allowed == " ".join([kind, *(f"'sha256-{one}'" for one in hashes)])
    assert not {"src", "style", "srcset"} & {name for _, attributes in reader.elements for name in attributes}
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert {one["href"][0] for one in reader.all("a")} == {"#"}
    assert not re.search(r"url\(|@import|https?:", html)


def test_text_from_data_and_models_never_becomes_markup(tmp_path: Path) -> None:
    hostile = f"a{SCRIPT}\u2028<b>"
    categories = (f"one{SCRIPT}", "two {{ 7 * 7 }}", "<!--")
    runs = Runs(tmp_path, categories, client_names=(f"a{SCRIPT}".replace("/", "_"), "b&amp;\"'", "c"))
    rows = [{**row, "instruction": row["instruction"] + SCRIPT} for row in runs.rows()]
    runs.write_tests(rows)
    runs.train("homo", excluded=f"reason {SCRIPT}")
    runs.train("none")
    runs.answer("homo", "global", row_0=hostile, row_1="<!--<script>")
    runs.answer("none", "client_0", row_0=f"]]>{SCRIPT}")
    runs.score(f"homo/{ROUNDS}/global", f"none/{ROUNDS}/0")
    page = page_of(runs, "homo", "none")
    reader = Reader(page)
    assert reader.open == []
    assert {name for name, _ in reader.elements}.isdisjoint({"b", "img"})
    assert len(reader.all("script")) == 2
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert "two {{ 7 * 7 }}" in page
    assert "49" not in re.findall(r"two (\d+)", page)
    found = answers_of(page)
    assert found["rows"][0]["answers"][1] == hostile
    assert SCRIPT in found["rows"][0]["asked"]
    assert [one["label"] for one in found["models"]] == [f"none a{SCRIPT}".replace("/", "_"), "homo"]


def test_answers_stand_side_by_side_with_reference_and_what_is_exact(html: str) -> None:
    found = answers_of(html)
    assert [model["label"] for model in found["models"]] == [
        *("base", "none client 0", "none client 1", "none client 2", "seq", "homo")
    ]
    row = found["rows"][5]
    assert (row["number"], row["group"], row["asked"], row["reference"]) == (6, "dates", "dates: question 1", "right 1")
    assert row["answers"] == ["not right 1", "not right 1", "right 1", "not right 1", "not right 1", "not right 1"]
    assert row["exact"] == [False, False, True, False, False, False]
    assert [model["label"] for model in found["models"] if not model["shown"]] == []


def test_answers_to_other_rows_and_lost_test_rows_are_named(tmp_path: Path) -> None:
    runs = make_runs(tmp_path)
    other = Runs(tmp_path / "other", ("x", "y", "z"))
    other.write_tests()
    other.answer("seq", "global")
    moved = other.root / "prediction_dir/seq/3/global_output.jsonl"
    (tmp_path / "prediction_dir/seq/3/global_output.jsonl").write_text(moved.read_text(), encoding="utf-8")
    (tmp_path / "prediction_dir/none/3/client_1_output.jsonl").write_text("{}\n", encoding="utf-8")
    runs.test_file.unlink()
    page = page_of(runs, "homo", "seq", "none")
    assert "seq answered other rows and is left out." in page
    assert "none client 1 is left out: its predictions cannot be read." in page
    assert "answers are shown without references" in page
    assert {row["reference"] for row in answers_of(page)["rows"]} == {None}


@pytest.mark.parametrize(("judges", "repeats"), [(["judge-1"], 1), (["judge-1", "judge-2"], 2)])
def test_a_judge_s_verdicts_stand_beside_the_answers(
    runs: Runs, tmp_path: Path, judges: list[str], repeats: int
) -> None:
    sample = Sample(1, "capitals: question 0", "", "capitals", "not right 0", "not right 0", "right 0")
    verdicts = [
        {"key": make_question(sample, order, judge=judge, host="local", repeat=repeat).key, "row": 1, "order": order,
         "score_a": 20, "score_b": 80, "verdict": verdict, "model": "m", "fingerprint": "", "dropped": [],
         "request": "r", "reason": "<b>because</b>" if repeat == 1 else ""}
        for judge in judges
        for repeat in range(1, repeats + 1)
        for order, verdict in zip(ORDERS, ("B", "A"), strict=True)
    ]  # fmt: skip
    folder = tmp_path / "homo/3"
    folder.mkdir(parents=True)
    (folder / "base_verdicts.jsonl").write_text(json_lines(verdicts) + '{"torn', encoding="utf-8")
    predictions = runs.root / "prediction_dir/homo/3"
    files = {side: {"path": str(predictions / f"{name}_output.jsonl")} for side, name in
             (("baseline", "base"), ("proposed", "global"))}  # fmt: skip
    each = [{"model_asked": judge, "host": "local", "models_returned": ["m"]} for judge in judges]
    result = {"num_samples": 12, "eval_failures": 0, "win": 1, "tie": 11, "loss": 0, "position_flip_rate": 0.0,
              "overall_pred_avg": 20.0, "overall_prop_avg": 80.0, "overall_ratio": 4.0, "judge": each[0],
              "votes_per_sample": len(verdicts), "files": {**files, "target": {"path": "test.jsonl"}},
              **({"judges": each} if len(each) > 1 else {})}  # fmt: skip
    (folder / "base_results.json").write_text(json.dumps(result), encoding="utf-8")
    config = runs.config("homo", "seq", llm_dir=tmp_path, report_dir=tmp_path / "reports")
    page = report.run(config).page.read_text(encoding="utf-8")
    assert "Judge" in Reader(page).texts["h2"]
    said = [row["verdicts"] for row in answers_of(page)["rows"]]
    text = "homo is better than base (50 against 50 of 100). “<b>because</b>” “<b>because</b>”"
    assert said[0] == [f"{judge}: {text}" for judge in judges]
    assert not any(said[1:])
    assert (folder / "base_verdicts.jsonl").read_text(encoding="utf-8").endswith('{"torn'), "a report mends no log"


def test_many_long_answers_are_cut_and_the_page_says_how_many_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.reporting.page.texts.MOST_BYTES", 60_000)
    monkeypatch.setattr("fedlora.reporting.page.texts.MOST_LETTERS", 2_000)
    runs = Runs(tmp_path, rows_each=20, letters=3_000)
    runs.write_tests()
    runs.train("homo")
    for output in ("base", "global"):
        runs.answer("homo", output)
    page = page_of(runs, "homo")
    found = answers_of(page)
    assert len(page) < 150_000
    assert 9 <= len(found["rows"]) < 20
    counts = [sum(row["group"] == category for row in found["rows"]) for category in runs.categories]
    assert max(counts) - min(counts) <= 1
    assert f"{len(found['rows'])} of 60 test rows are here" in page
    assert "(and 1,000 more characters)" in found["rows"][0]["answers"][0]


def test_eight_clients_and_200_rows_stay_under_3_mb(tmp_path: Path) -> None:
    runs = Runs(tmp_path, [f"category {number}" for number in range(8)], rows_each=25, letters=1_200)
    runs.write_tests()
    for mode in ("homo", "seq", "none", "pooled"):
        runs.train(mode)
    runs.answer("homo", "base")
    for mode in ("homo", "seq", "pooled"):
        runs.answer(mode, "global")
    for client in range(8):
        runs.answer("none", f"client_{client}")
    written = report.run(runs.config("homo", "seq", "none", "pooled"))
    assert written.page.stat().st_size < 3_000_000
    assert 100 < len(answers_of(written.page.read_text(encoding="utf-8"))["rows"]) < 200


def test_the_same_runs_give_the_same_bytes(runs: Runs, html: str) -> None:
    assert page_of(runs, "homo", "seq", "none") == html


def test_a_report_without_scores_or_answers_is_a_page_too(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.train("homo")
    page = page_of(runs, "homo")
    assert "homo has the lowest held-out loss" in page
    ids = [attributes["id"] for attributes in Reader(page).all("section")]
    assert "answers" not in ids
    assert "matrix" not in ids
    assert "fedlora generate homo" in page


def test_privacy_and_excluded_clients_have_sections(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.train("homo", epsilon=2.0, excluded="non-finite tensor q_proj")
    page = page_of(runs, "homo")
    assert "3.464" in Reader(page).texts["td"]
    assert "excluded: homo, round 2, client 1: non-finite tensor q_proj" in page


def test_headings_tables_and_controls_have_names_in_order(html: str) -> None:
    reader = Reader(html)
    levels = [int(name[1]) for name, _ in reader.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert levels.count(1) == 1
    assert len(reader.all("caption")) == len(reader.all("table"))
    assert {one.get("scope") for one in reader.all("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes["aria-labelledby"] for _, attributes in reader.elements if "aria-labelledby" in attributes]
    assert set(named) <= set(ids)
    assert reader.all("html")[0]["lang"] == "en"
    assert {one.get("role") for one in reader.all("svg")} <= {"img", None}
    assert all(one.get("role") or one.get("aria-hidden") for one in reader.all("svg"))


def rules_of(css: str) -> dict[str, dict[str, str]]:
    """light, dark -> name of a colour -> its value."""
    light, dark, printed = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    read = [dict(re.findall(r"--([\w-]+): (#\w{6})", one)) for one in (light, dark, printed)]
    return dict(zip(("light", "dark", "print"), read, strict=True))


def test_text_has_a_contrast_of_4_5_in_light_dark_and_print(html: str) -> None:
    css, computed = Reader(html).texts["style"]
    for colours in rules_of(css).values():
        for ink in ("ink", "soft", "accent", "good", "bad"):
            assert contrast(colours[ink], colours["page"]) >= 4.5
            assert ink in ("good", "bad") or contrast(colours[ink], colours["wash"]) >= 4.5
        assert contrast(colours["warn-ink"], colours["warn-wash"]) >= 4.5
    shades = re.findall(r"\.([qd]-?\d+)\{background:(#\w{6});color:(#\w{6})\}", computed)
    assert len({name for name, *_ in shades}) == 22
    assert min(contrast(background, ink) for _, background, ink in shades) >= 4.5
    dark = rules_of(css)["dark"]["page"]
    for colour in re.findall(r"\.s\d+\{--s:(#\w{6})", computed):
        assert min(contrast(colour, page) for page in ("#ffffff", dark)) >= 3


def test_json_in_a_script_element_reads_back_and_ends_nothing() -> None:
    value = {"a": "</script><!--&\u2028\u2029\ud800"}
    text = script_json(value)
    assert not set("<>&\u2028\u2029\ud800") & set(text)
    assert json.loads(text) == value


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_models_with_equal_scores_are_level_and_a_share_has_no_place_below_0():
    from dataclasses import replace
    from types import SimpleNamespace

    from fedlora.reporting.page.answer_text import _who_wins
    from fedlora.reporting.page.charts import _ticks
    from fedlora.reporting.standing import Standing

    row: Any = SimpleNamespace(all=0.25, all_interval=None, subject="global", label="homo", experiment="homo")
    other: Any = SimpleNamespace(**{**vars(row), "label": "seq", "experiment": "seq"})
    equal = Standing(row, other, 2, True)
    assert "is level with seq" in _who_wins(equal)
    other.all = 0.2
    assert "is ahead" in _who_wins(replace(equal))
    assert _ticks(0.0, 0.0, 4)[0] == 0.0
    assert _ticks(-0.5, -0.5, 4)[0] < -0.5
