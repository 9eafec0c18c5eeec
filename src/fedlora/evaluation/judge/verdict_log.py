"""The log of verdicts: one line each, on disk before the next is asked, so that nothing is paid for twice.

A verdict is found by the hash of everything it depends on, so several comparisons share one file and
a changed answer is asked again. A kill may leave a torn last line, which is dropped; a line
that is broken anywhere else was edited, and is an error.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlora.errors import DataError, StorageError
from fedlora.evaluation.judge.protocol import Order, Verdict
from fedlora.files import append_line, json_lines, write_text


class StoredVerdict(BaseModel):
    """One line: what the judge said on one sample in one order, and who said it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    key: str
    row: int
    order: Order
    score_a: int = Field(ge=1, le=100)
    score_b: int = Field(ge=1, le=100)
    verdict: Verdict
    model: str
    fingerprint: str
    dropped: list[str]
    request: str
    reason: str = ""
    repeat: int = Field(default=1, ge=1)


def read_verdicts(path: Path) -> dict[str, StoredVerdict]:
    """Key -> verdict of the whole lines at `path`, which a judge may be writing at this moment; nothing is mended."""
    return {verdict.key: verdict for line in _read(path).split(b"\n") if (verdict := _parse(line)) is not None}


class VerdictLog:
    """The verdicts at `path`; opening it reads them and mends a torn end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verdicts: dict[str, StoredVerdict] = {}
        self._forgot = False
        content = _read(path)
        *lines, end = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            verdict = _parse(line)
            if verdict is None:
                what = f"{path}:{number}: not a verdict"
                raise DataError(what, hint="delete that line; its verdict is then asked again")
            self._verdicts[verdict.key] = verdict
        if end:
            # the next line would otherwise be appended to this one
            if (verdict := _parse(end)) is not None:
                self._verdicts[verdict.key] = verdict
            self._rewrite()

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def __getitem__(self, key: str) -> StoredVerdict:
        return self._verdicts[key]

    def append(self, verdict: StoredVerdict) -> None:
        """Add one verdict; it is on disk when this returns."""
        self._verdicts[verdict.key] = verdict
        if self._forgot:
            self._rewrite()
            self._forgot = False
        else:
            append_line(self.path, _line(verdict))

    def forget(self, keys: Collection[str]) -> None:
        """Remove the verdicts under `keys`; on disk only with the next verdict: a wrong key destroys nothing."""
        kept = {key: verdict for key, verdict in self._verdicts.items() if key not in keys}
        self._forgot = self._forgot or len(kept) < len(self._verdicts)
        self._verdicts = kept

    def keep_forgotten(self) -> None:
        """Remove what was forgotten on disk too: where the next verdict comes in another process."""
        if self._forgot:
            self._rewrite()
            self._forgot = False

    def _rewrite(self) -> None:
        write_text(self.path, json_lines(_line(verdict) for verdict in self._verdicts.values()))


def _line(verdict: StoredVerdict) -> dict[str, Any]:
    # without reasons and repeats a line is what it was before there were any
    return dict(sorted(verdict.model_dump(exclude_defaults=True).items()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="fix permissions, then run again") from error


def _parse(line: bytes) -> StoredVerdict | None:
    try:
        return StoredVerdict.model_validate_json(line)
    except ValidationError:
        return None
