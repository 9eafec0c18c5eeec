"""report.html in Chromium: no text of it runs, and its tables, charts and answers do what they say.

`pip install selenium` and Debian's chromium and chromium-driver run these; CI's environment has neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_pictures import NARROW, find_browser, open_browser
from report_runs import ROUNDS, Runs

from fedlora.stages import report

pytestmark = pytest.mark.thorough
SCRIPT = "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A script in an instruction, an answer, a category, a client's name and the reason of an exclusion."""
    pytest.importorskip("selenium", reason="selenium is not installed: see tools/page_pictures.py")
    if find_browser() is None:
        pytest.skip("chromium and chromedriver are not installed: see tools/page_pictures.py")
    root = tmp_path_factory.mktemp("browser")
    runs = Runs(root, (f"one {SCRIPT}", "two", "three"), client_names=(SCRIPT.replace("/", "_"), "b", "c"))
    runs.write_tests([{**row, "instruction": row["instruction"] + SCRIPT} for row in runs.rows()])
    for mode in ("homo", "seq", "none"):
        runs.train(mode, excluded=SCRIPT if mode == "homo" else "", error=0.1 if mode == "homo" else 0.0)
    runs.answer("homo", "base", range(12))
    runs.answer("homo", "global", (1,), row_0=SCRIPT)
    runs.answer("seq", "global", (1,))
    runs.answer("none", "client_0", (1,))
    runs.score(f"homo/{ROUNDS}/base", f"homo/{ROUNDS}/global", f"seq/{ROUNDS}/global", f"none/{ROUNDS}/0")
    return report.run(runs.config("homo", "seq", "none")).page.resolve().as_uri()


@pytest.fixture(scope="module")
def browser(page: str) -> Iterator[Any]:
    opened = open_browser()
    yield opened
    opened.quit()


@pytest.fixture
def shown(browser: Any, page: str) -> Any:
    browser.get(page)
    return browser


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector
    )


def test_nothing_that_was_planted_runs_and_nothing_is_loaded(shown: Any, page: str) -> None:
    assert shown.title.startswith("homo, seq and none on tiny")
    assert len(texts(shown, "article")) == 10
    assert SCRIPT in "".join(texts(shown, "#answers article"))
    assert shown.execute_script("return document.images.length") == 0
    assert [line for line in shown.get_log("browser") if line["level"] == "SEVERE"] == []
    events = [json.loads(line["message"])["message"] for line in shown.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert set(asked) == {page}


def test_a_script_that_were_in_the_page_would_be_stopped_by_its_policy(tmp_path: Path, browser: Any, page: str) -> None:
    html = Path(page.removeprefix("file://")).read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("</h1>", f"</h1>{SCRIPT.removeprefix('</script>')}"), encoding="utf-8")
    browser.get(broken.as_uri())
    assert browser.title.startswith("homo, seq and none on tiny")
    assert any("Content Security Policy" in line["message"] for line in browser.get_log("browser"))


def test_a_click_on_a_head_sorts_by_its_column_and_says_so(shown: Any) -> None:
    heads = shown.find_elements("css selector", "#models thead th")
    place = [head.text for head in heads].index("all")
    button = heads[place].find_element("css selector", "button")
    for order, is_reverse in (("ascending", False), ("descending", True)):
        button.click()
        assert heads[place].get_attribute("aria-sort") == order
        values = shown.execute_script(
            "return [...document.querySelectorAll('#models tbody tr')].map((row) => row.cells[arguments[0]].dataset.v)",
            place,
        )
        known = [float(value) for value in values if value is not None]
        assert known == sorted(known, reverse=is_reverse)
        assert values[: len(known)] == [value for value in values if value is not None], "unmeasured rows stay last"


def test_the_keyboard_shows_the_values_of_a_chart(shown: Any) -> None:
    shown.execute_script("document.querySelector('.plot svg').focus()")
    assert texts(shown, ".tip:not([hidden]) b") == [f"round {ROUNDS}"]
    shown.switch_to.active_element.send_keys("\ue012")
    assert texts(shown, ".tip:not([hidden]) b") == [f"round {ROUNDS - 1}"]
    assert "homo" in texts(shown, ".tip:not([hidden])")[0]


def test_answers_are_searched_filtered_and_walked_by_keys(shown: Any) -> None:
    body = shown.find_element("css selector", "body")
    body.send_keys("/")
    search = shown.switch_to.active_element
    assert search.get_attribute("id") == "texts-search"
    search.send_keys("not right 1")
    assert texts(shown, "article h3") == [
        f"2 · one {SCRIPT}",
        *(f"{n} · {name}" for n, name in ((6, "two"), (10, "three"))),
    ]
    search.clear()
    search.send_keys(" ")
    search.send_keys("\ue003", "\ue00c")
    for box in shown.find_elements("css selector", "#texts-models input"):
        if box.find_element("xpath", "..").text not in ("homo", "seq"):
            # the page scrolls smoothly, and a click of the driver would not wait for it
            shown.execute_script("arguments[0].click()", box)
    body.send_keys("d")
    assert texts(shown, "article h3") == [f"1 · one {SCRIPT}"], "homo and seq differ in one answer"
    body.send_keys("d")
    assert texts(shown, "#texts-count") == ["1 to 10 of 12"]
    body.send_keys("n")
    assert texts(shown, "#texts-count") == ["11 to 12 of 12"]
    body.send_keys("j")
    assert shown.switch_to.active_element.text.startswith("11 · three")


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_360_pixels(page: str, dark: bool) -> None:
    narrow = open_browser(width=NARROW, dark=dark)
    try:
        narrow.get(page)
        assert narrow.execute_script("return document.documentElement.scrollWidth") == NARROW
        background = narrow.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    finally:
        narrow.quit()


def test_tables_and_curves_are_there_without_scripts(page: str) -> None:
    plain = open_browser(script=False)
    try:
        plain.get(page)
        assert plain.find_element("css selector", "#models table").is_displayed()
        assert plain.find_element("css selector", ".plot svg .line path").is_displayed()
        assert "script" in plain.find_element("css selector", "noscript").text
        assert not plain.find_element("css selector", ".chooser").is_displayed()
    finally:
        plain.quit()
