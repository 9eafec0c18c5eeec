"""What a person reads is written in the field's words: pages, help texts, messages and docstrings.

Each phrase below was once in use here and made readers stop. A phrase that is code (in backticks, in a block, or a
constant without a space) is not prose and is not looked at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md", "SECURITY.md")),
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


def prose_of_page(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page without code; of a configuration file, its comments."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if path.suffix != ".md":
            yield number, line.partition("#")[2]
            continue
        fenced = fenced != line.startswith("```")
        if not fenced and not line.startswith(("    ", "```")):
            yield number, re.sub(r"`[^`]*`", "", line)


def prose_of_source(path: Path) -> Iterator[tuple[int, str]]:
    """String constants with a space, docstrings and the parts of f-strings included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(re.sub(r"`[^`]*`", "", node.value).splitlines()):
                yield node.lineno + offset, line


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
    assert list(find_phrases(iter([(1, re.sub(r"`[^`]*`", "", "the flag `modes`"))]), ROOT / "README.md")) == []


def test_a_page_that_says_that_rows_stay_links_to_what_adapters_leak():
    says = re.compile(r"\b(rows|data)\b[^.|]{0,50}\bstays?\b", re.IGNORECASE)
    pages = [page for page in PAGES if page.suffix == ".md" and page.name != "CHANGELOG.md"]
    claims = [page for page in pages if says.search(page.read_text(encoding="utf-8"))]
    assert len(claims) > 3
    for page in claims:
        assert page.name == "leakage.md" or "leakage.md" in page.read_text(encoding="utf-8"), page
