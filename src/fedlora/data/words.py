"""The words of a text in any script.

A word is a run of letters, digits and underscores, with the marks that belong to them: Python's \\w leaves out the
vowel signs of Hindi and the diacritics of Arabic, and would cut words there. In scripts that set no spaces between
words every character counts as one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

# Thai and Lao, Myanmar, Khmer, Kana, Han with its extensions
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"


def split_words(text: str) -> list[str]:
    """The words of a text without case, punctuation and differences of Unicode notation (NFKC)."""
    return _pattern().findall(fold(text))


def fold(text: str) -> str:
    """`text` without case and differences of Unicode notation."""
    return unicodedata.normalize("NFKC", text).casefold()


@cache
def _pattern() -> re.Pattern[str]:
    unspaced = re.compile(f"[{_UNSPACED}]")
    marks = [sign for sign in map(chr, range(0x300, 0xFE30)) if unicodedata.category(sign) in ("Mn", "Mc")]
    letters, signs = f"[^\\W{_UNSPACED}]", "".join(sign for sign in marks if not unspaced.match(sign))
    character = f"(?=[\\w{''.join(marks)}])[{_UNSPACED}]"
    return re.compile(f"{letters}+(?:[{signs}]+{letters}*)*|{character}")
