"""The known name that a mistyped or abbreviated one most likely means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest of the known names, empty when none is near.

    Initials count first (`lr` is learning_rate), then a whole part of a name (`epochs` is local_num_epochs), then
    spelling.
    """
    names = sorted(known, key=lambda name: (len(name), name))
    parts = {name: name.strip("-").split("_") for name in names}
    wanted = word.strip("-")
    for name in names:
        # a part of one letter says nothing: lora_r is no `lr`
        if len(wanted) > 1 and wanted == "".join(part[:1] for part in parts[name] if len(part) > 1):
            return name
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    if close:
        return close[0]
    for name in names:
        if len(wanted) > 2 and (wanted in parts[name] or set(wanted.split("_")) <= set(parts[name])):
            return name
    return next(iter(difflib.get_close_matches(word, names, n=1)), "")


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?` when a known name is near `word`, else nothing."""
    close = nearest(word, known)
    return f"did you mean {close}?" if close else ""
