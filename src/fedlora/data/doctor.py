"""Find faults in the rows of a federation before anything is trained on them.

Nothing here changes a row or refuses one: a finding names what was seen, where, and what to do about it. Places are
a file and the row's number in it, from 1 (in a JSON array many rows may stand on one line).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.data.duplicates import NEAR, Repeat, find_repeats
from fedlora.plain_text import counted
from fedlora.rows import Row
from fedlora.types import ClientId

PLACES = 3
"""How many places a finding names."""

TINY_ROWS = 10
TINY_SHARE = 0.1
"""A client is tiny with less than this share of the median client's labelled rows, or with fewer than TINY_ROWS that
are less than half of the median's."""

HIGH_SKEW = 0.5
"""Mean distance of the clients' category shares from the pool's from which on the split counts as skewed."""


@dataclass(frozen=True)
class Silo:
    """The rows of one file; `client` is None for test rows, `called` what messages call it."""

    client: ClientId | None
    file: Path
    rows: Sequence[Row]
    called: str = ""

    @property
    def name(self) -> str:
        return self.called or ("the test file" if self.client is None else f"client {self.client}")

    @property
    def labelled(self) -> int:
        return sum(bool(row.output.strip()) for row in self.rows)

    def place(self, row: int) -> str:
        """The place of a row, `row` counted from 0."""
        return f"{self.file}: row {row + 1}"


@dataclass(frozen=True)
class Finding:
    """`count` rows (or other things) of one kind; `client` is None where it concerns the test file or everybody."""

    kind: str
    client: ClientId | None
    count: int
    what: str
    places: tuple[str, ...]
    advice: str

    def record(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return {**asdict(self), "places": list(self.places)}


def examine_rows(silos: Sequence[Silo], marks: Sequence[str]) -> list[Finding]:
    """All findings about the rows; `marks` are the texts that a tokenizer or a template gives a meaning.

    Clients come in id order, files of test rows, if any, last.
    """
    return [
        *_sizes([silo for silo in silos if silo.client is not None]),
        *(finding for silo in silos if (finding := _unlabelled(silo)) is not None),
        *_repeats(silos),
        *(finding for silo in silos if (finding := _marked(silo, marks)) is not None),
    ]


def examine_shortened(silo: Silo, count: int, rows: Iterable[int], cutoff: int) -> Finding:
    """`count` rows of a client are longer than the cutoff; the first of them (from 0) come from `rows`."""
    return Finding(
        "shortened",
        silo.client,
        count,
        f"{silo.name}: {count} of {counted(len(silo.rows), 'row')} shortened to cutoff_len={cutoff}",
        _first(silo.place(row) for row in rows),
        "raise --cutoff_len, or split long inputs; old turns and the input are cut first, the response last",
    )


def examine_skew(skew: float) -> Finding | None:
    """The split as a whole; `skew` is federated.partition's label_skew."""
    if skew < HIGH_SKEW:
        return None
    return Finding(
        "label_skew",
        None,
        1,
        f"the clients' categories differ much: skew {skew:.2f}, where 0 is the same mix everywhere",
        (),
        "if that is not what you study, deal the rows out with --partition iid; else compare with none and pooled, "
        "and mind each client's own score",
    )


def _sizes(clients: Sequence[Silo]) -> Iterator[Finding]:
    counts = {silo.client: silo.labelled for silo in clients}
    usual = statistics.median([count for count in counts.values() if count] or [0])
    for silo in clients:
        count, place = counts[silo.client], (str(silo.file),)
        if not count:
            what = f"{silo.name} has no row to train on ({counted(len(silo.rows), 'row')}, none with a response)"
            yield Finding(
                "empty_client", silo.client, len(silo.rows), what, place, "give it rows, or leave its file out"
            )
        elif count < TINY_SHARE * usual or (count < TINY_ROWS and count < usual / 2):
            what = f"{silo.name} is tiny: {counted(count, 'row')} to train on, the median client has {usual:g}"
            advice = "join it with another client, or give it more rows: its steps are noisy and its weight is small"
            yield Finding("tiny_client", silo.client, count, what, place, advice)


def _unlabelled(silo: Silo) -> Finding | None:
    rows = [number for number, row in enumerate(silo.rows) if not row.output.strip()]
    if not rows:
        return None
    what = f"{silo.name}: {len(rows)} of {counted(len(silo.rows), 'row')} without a response"
    advice = "fill the responses in, or delete the rows; training leaves them out"
    if silo.client is None:
        advice = "fill the responses in, or delete the rows: no score can be right on them"
    return Finding("unlabelled", silo.client, len(rows), what, _first(map(silo.place, rows)), advice)


_KINDS: Mapping[str, str] = {
    "row": "are equal to",
    "prompt": "have the prompt, with another response, of",
    "turn": "are the beginning or the continuation of",
    "near": f"share at least {NEAR:.0%} of their word triples with",
}


def _repeats(silos: Sequence[Silo]) -> Iterator[Finding]:
    groups: defaultdict[tuple[int, str, str], list[Repeat]] = defaultdict(list)
    for repeat in find_repeats([silo.rows for silo in silos]):
        # two clients may have one row in their tests: nobody trains on it
        if repeat.scope == "inside" or silos[repeat.first_source].client is not None:
            groups[repeat.source, repeat.scope, repeat.kind].append(repeat)
    for (source, scope, kind), repeats in sorted(groups.items()):
        silo = silos[source]
        earlier, advice = _verdict(scope, is_test=silo.client is None)
        where = "leak" if scope == "across" and silo.client is None else f"repeat_{scope}"
        yield Finding(
            f"{where}_{kind}",
            silo.client,
            len(repeats),
            f"{silo.name}: {len(repeats)} of {counted(len(silo.rows), 'row')} {_KINDS[kind]} {earlier}",
            _first(f"{silo.place(one.row)}, as {_origin(one, silos)}" for one in repeats),
            advice,
        )


def _origin(repeat: Repeat, silos: Sequence[Silo]) -> str:
    """The earlier row, its file named only where it is another."""
    if repeat.scope == "inside":
        return f"row {repeat.first_row + 1}"
    return silos[repeat.first_source].place(repeat.first_row)


def _verdict(scope: str, *, is_test: bool) -> tuple[str, str]:
    """What the earlier rows are, and what to do."""
    if scope == "inside":
        weighs = "counts twice in every score" if is_test else "is trained on twice in every epoch"
        return "an earlier row of the same file", f"keep one of each: a repeated row {weighs}"
    if is_test:
        return (
            "a row that is trained on",
            "take them out of the clients' files or of the test file: scores on them measure memory; allocation "
            "de-duplicates prompts before it splits",
        )
    return (
        "a row of an earlier client",
        "keep one of each, unless these clients share such rows in reality: the split is less private and less "
        "different than it looks",
    )


def _marked(silo: Silo, marks: Sequence[str]) -> Finding | None:
    seen: set[str] = set()
    rows = []
    for number, row in enumerate(silo.rows):
        text = "\n".join(row.texts)
        found = {mark for mark in marks if mark in text}
        if found:
            rows.append(number)
            seen |= found
    if not rows:
        return None
    names = ", ".join(repr(mark) for mark in sorted(seen)[:PLACES]) + (", ..." if len(seen) > PLACES else "")
    return Finding(
        "control_text",
        silo.client,
        len(rows),
        f"{silo.name}: {len(rows)} of {counted(len(silo.rows), 'row')} with text that looks like a control token "
        f"or a part of the prompt: {names}",
        _first(map(silo.place, rows)),
        "remove what another format left in the text; it is read as plain text and controls nothing, but it is learnt",
    )


def _first(places: Iterable[str]) -> tuple[str, ...]:
    return tuple(place for _, place in zip(range(PLACES), places, strict=False))
