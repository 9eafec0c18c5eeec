"""The rows that are held out for testing: one file for all, or the clients' own, and how a share of rows is drawn.

A share is drawn by the seed and by prompt, the same for every method. Rows with one prompt stand on one side, as do a
conversation and its beginning, so no held-out prompt is trained on in the same file. The draw depends on seed and
prompt and not on the client, so a prompt that two clients have mostly falls on one side for both.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedlora.data.client_files import find_silos, find_test_files, is_silo_folder
from fedlora.data.client_names import name_of_file
from fedlora.data.records import read_rows
from fedlora.data.row_parts import refuse_folder, sha256_of_rows
from fedlora.errors import DataError, UsageError
from fedlora.files import sha256_of_json
from fedlora.rows import ReadRules, Row
from fedlora.seeds import derive_seed

KEY = 16
"""Bytes of the hash of a prompt."""


@dataclass(frozen=True)
class Share:
    """The share of every client's rows that a run held out, the seed that drew them, and name and SHA-256 of each
    client's file."""

    test_share: float
    seed: int
    files: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class HeldOutRows:
    """Test rows; `clients` names the client of every row where they are the clients' own, and is empty for one file
    for all. `sha256` is of everything that decides them."""

    rows: tuple[Row, ...]
    clients: tuple[str, ...]
    sha256: str

    @property
    def groups(self) -> tuple[str, ...]:
        """What results are grouped by: every row's category, or its client where rows have no category."""
        return tuple(row.category for row in self.rows) if self.grouped_by == "category" else self.clients

    @property
    def grouped_by(self) -> Literal["category", "client"]:
        """What `groups` are."""
        return "client" if self.clients and not all(row.category for row in self.rows) else "category"


def read_test_rows(
    path: Path,
    *,
    rules: ReadRules,
    share: Share | None = None,
    output_key: str | None = None,
    needs_reply: bool = True,
) -> HeldOutRows:
    """The rows of a test file; of a folder of silos those of every client, in client-id order, each once.

    In a folder they are the rows of `<client>.test.<format>`, else the `share` that a run held out of each client's
    file. Without `needs_reply` a file may hold questions alone.
    Raises UsageError where there are none, and what `read_rows` raises.
    """
    reading: dict[str, Any] = {"rules": rules, "output_key": output_key, "needs_reply": needs_reply}
    if not is_silo_folder(path):
        whole = tuple(read_rows(path, **reading))
        return HeldOutRows(whole, (), sha256_of_rows(path))
    files, _ = find_silos(path)
    found: list[tuple[str, Row]] = []
    for name, file in own_test_files(files).items():
        found += [(name, row) for row in read_rows(file, **reading)]
    if not found and share is not None:
        for file in files:
            name = name_of_file(file.name)
            now = sha256_of_rows(file)
            if now != dict(share.files).get(name, now):
                raise DataError(
                    f"{file}: not the file that the run was trained on, so it is unknown which rows were held out",
                    hint="restore the file, or give test rows in a file of their own",
                )
            rows = read_rows(file, may_be_empty=True, **reading)
            found += [(name, row) for row in drawn_test_rows(rows, share)]
    if not found:
        raise no_test_rows(path)
    content = [[name, row.as_dict()] for name, row in found]
    return HeldOutRows(tuple(row for _, row in found), tuple(name for name, _ in found), sha256_of_json(content))


def read_validation_rows(path: str, rules: ReadRules) -> list[Row]:
    """The rows of `val_data_path`, none where it is empty. Raises UsageError for a folder of several files."""
    if not path:
        return []
    refuse_folder(Path(path), "val_data_path")
    return read_rows(Path(path), rules=rules)


def no_test_rows(folder: Path) -> UsageError:
    """What is said of a folder of silos without test rows."""
    return UsageError(
        f"{folder} holds no test rows: no file <client>.test.<format>, and no share that a run held out",
        hint="write such files, train with --test_share 0.2, or give one test file",
    )


def drawn_test_rows(rows: Sequence[Row], share: Share) -> list[Row]:
    """The test rows that a run held out of a client's rows."""
    drawn = draw_test_rows([prompt_key(row) for row in rows], share.test_share, share.seed)
    return [rows[place] for place in sorted(drawn)]


def own_test_files(files: Sequence[Path]) -> dict[str, Path]:
    """Name of a client -> its file of test rows, of the clients' files given."""
    return {name_of_file(files[client].name): file for client, file in find_test_files(files).items()}


def prompt_key(row: Row) -> bytes | None:
    """A hash of KEY bytes of a row's prompt, then one of every earlier exchange's, as `Row.earlier_prompts` has them.

    None where the response is empty, for such a row measures nothing.
    """
    if not row.output.strip():
        return None
    prompts = (row.prompt, *row.earlier_prompts)
    return b"".join(hashlib.sha256(json.dumps(prompt).encode()).digest()[:KEY] for prompt in prompts)


def _join_beginnings(prompts: Sequence[bytes]) -> dict[bytes, bytes]:
    """Hash of a prompt -> the hash that stands for it and for the conversations that it belongs to."""
    stands = {prompt[:KEY]: prompt[:KEY] for prompt in prompts}

    def find(prompt: bytes) -> bytes:
        while stands[prompt] != prompt:
            prompt = stands[prompt]
        return prompt

    for prompt in prompts:
        for start in range(KEY, len(prompt), KEY):
            earlier = prompt[start : start + KEY]
            # an opening that no row is by itself, such as a greeting, joins nothing
            if earlier in stands:
                first, other = sorted((find(prompt[:KEY]), find(earlier)))
                stands[other] = first
    return {prompt: find(prompt) for prompt in stands}


def draw_rows(prompts: Sequence[bytes | None], count: int, seed: int, purpose: str) -> frozenset[int]:
    """The positions of `count` rows, or of a few more where prompts repeat; at least one prompt is never drawn.

    Rows without a prompt are not drawn, and a conversation only together with a row that is its beginning. Fewer come
    back where the rows have too few different prompts.
    """
    stands = _join_beginnings([prompt for prompt in prompts if prompt is not None])
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        if prompt is not None:
            places[stands[prompt[:KEY]]].append(place)
    salt = str(derive_seed(seed, purpose)).encode()
    order = sorted(places, key=lambda prompt: hashlib.sha256(salt + prompt).digest())
    drawn: list[int] = []
    for prompt in order[:-1]:
        if len(drawn) >= count:
            break
        drawn += places[prompt]
    return frozenset(drawn)


def draw_test_rows(prompts: Sequence[bytes | None], share: float, seed: int) -> frozenset[int]:
    """The positions of `share` of a client's rows, at least one where it has two prompts: its test rows."""
    labelled = sum(prompt is not None for prompt in prompts)
    return draw_rows(prompts, max(1, round(share * labelled)), seed, "test_rows") if share and labelled else frozenset()
