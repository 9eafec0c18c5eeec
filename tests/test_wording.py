"""What a person reads is written in the field's words: pages, help texts, messages and docstrings.

Each phrase below was once in use here and made readers stop. A phrase that is code (in backticks, in a block, or a
constant without a space) is not prose and is not looked at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md", "SECURITY.md")),
    *(path for path in sorted(ROOT.glob("docs/**/*.md")) if path.name != "comparison.md"),
    *(path for path in sorted(ROOT.glob("deploy/*")) if path.is_file()),
]
"""Results of studies (comparison.md) are as they were printed at the commit that they name."""
SOURCES = [path for path in sorted((ROOT / "src" / "fedlora").glob("**/*.py")) if path.name != "vocabulary.py"]
"""The words of the skills data are data."""

INSTEAD = {
    r"\bdoors?\b": "entry point",
    r"\bhouse\b": "codebase",
    r"\bfloors?\b": "layer",
    r"\b(told|tells)\b": "reported, reports, says",
    r"\bquarantined\b": "excluded",
    r"\bbegun with\b": "started with",
    r"\bgo(es|ing)? on\b": "resumes, continues",
    r"\bbehind\b(?! (a|the) (Unix socket|proxy))": "after, beside",
    r"\bheld against\b": "compared with",
    r"\bcomes? to have\b": "have, get",
    r"\bhears? of\b": "sees, is called with",
    r"\b(federat\w+|the|this|each|every|any|a|by|of|which|what|unknown|other) modes?\b(?! of a file)": "method",
    r"(?<!your )\bown (models?|rows)\b": "personal model, local rows",
    r"\bremember(s|ed)?\b": "the method's state",
    r"\brows (of|per|in) (one|an?|each|the) (optimizer )?step\b": "examples",
    r"\bmade global\b": "the global adapter",
    r"\bthe contract\b": "the reference project's flags and files",
    r"\bnobody\b": "an empty cohort; no one",
    r"\bholds? down\b": "penalty",
    r"\bmay be told\b": "would allow revealing",
    r"\bcannot be: ": "is not supported with",
    r"\bas (it|they) (lies?|was written|had been written|were written|stands?)\b": "say what differs",
    r"\bwhat (was|had been|is) (written|allowed)\b": "name the thing",
    r"\bwhoever\b(?! it claims)": "name who",
    r"\bthose that are there( already)?\b": "the existing ones",
    r"\banew\b": "again",
    r"\bnone of this run's\b": "not from this run",
    r"\bby the letter\b": "exactly",
    r"\bgone that\b": "say what changed",
}


def paragraphs(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Lines that follow one another as one text, with the number of the first."""
    start, words = 0, []
    for number, line in [*lines, (0, "")]:
        if line.strip():
            start = start if words else number
            words.append(line.strip())
        elif words:
            yield start, re.sub(r"`[^`]*`", "", " ".join(words))
            words = []


def prose_of_page(path: Path) -> Iterator[tuple[int, str]]:
    """The paragraphs of a page without code; of a configuration file, its comments."""
    lines, fenced = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced = fenced != line.startswith("```")
        is_code = fenced or line.startswith(("    ", "```"))
        lines.append((number, line.partition("#")[2] if path.suffix != ".md" else "" if is_code else line))
    return paragraphs(lines)


def prose_of_source(path: Path) -> Iterator[tuple[int, str]]:
    """The paragraphs of string constants with a space, docstrings and the parts of f-strings included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from paragraphs(enumerate(node.value.splitlines(), node.lineno))


def find_phrases(prose: Iterator[tuple[int, str]], place: Path) -> list[str]:
    return [
        f"{place.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead}"
        for number, line in prose
        for pattern, instead in INSTEAD.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]


def test_pages_use_the_words_of_the_field():
    found = [line for page in PAGES for line in find_phrases(prose_of_page(page), page)]
    assert not found, "\n" + "\n".join(found)


def test_help_texts_messages_and_docstrings_use_the_words_of_the_field():
    found = [line for source in SOURCES for line in find_phrases(prose_of_source(source), source)]
    assert not found, "\n" + "\n".join(found)


def test_a_phrase_is_found_in_prose_and_not_in_code():
    page = [(1, "The run goes on."), (2, "nothing")]
    assert find_phrases(iter(page), ROOT / "README.md") == ["README.md:1: 'goes on': write resumes, continues"]
    assert list(paragraphs([(1, "the flag"), (2, "`every mode`"), (3, ""), (4, "goes")])) == [
        (1, "the flag "),
        (4, "goes"),
    ]


def test_a_page_that_says_that_rows_stay_links_to_what_adapters_leak():
    says = re.compile(r"\b(rows|data)\b[^.|]{0,50}\bstays?\b", re.IGNORECASE)
    pages = [page for page in PAGES if page.suffix == ".md" and page.name != "CHANGELOG.md"]
    claims = [page for page in pages if says.search(page.read_text(encoding="utf-8"))]
    assert len(claims) > 3
    for page in claims:
        assert page.name == "leakage.md" or "leakage.md" in page.read_text(encoding="utf-8"), page
