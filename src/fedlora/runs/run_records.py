"""run.json and the manifest of a round, as typed records.

Files are vouched for by hashes over their records, so a record that is read and written again has the same bytes: what
another release has put there stays (`typed_json`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.data.client_facts import ClientFacts
from fedlora.files import json_text
from fedlora.typed_json import to_json
from fedlora.types import ClientId


@dataclass(frozen=True)
class RunRecord:
    """run.json: what a run was started with and on, and where it is; `more` is what only people read."""

    exp_name: str
    mode: str
    state: str
    base_model: str
    base_dtype: str
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    environment: Mapping[str, Any]
    layout: Mapping[str, Any]
    clients: tuple[ClientFacts, ...]
    has_global_model: bool | None = None
    privacy: Mapping[str, Any] | None = None
    reaggregated_from: Mapping[str, Any] | None = None
    """Of a what-if: the run it was made from, and how."""
    imported_from: Mapping[str, Any] | None = None
    """Of adapters that `fedlora import` took over: the folder, its layout, the hashes of the files."""
    method: Mapping[str, Any] | None = None
    """Of a method from outside: its origin, the hashes of its source, its facts (`methods/outside.py`)."""
    base_identity: Mapping[str, Any] | None = None
    """Hashes of the base model (`llm/base_identity.py`); runs older than the field have none."""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def secret_id(self) -> str:
        """Of a private run."""
        return str((self.privacy or {}).get("secret_id", ""))

    @property
    def header(self) -> dict[str, Any]:
        """What every manifest of the run begins with."""
        names = ("exp_name", "mode", "base_model", "base_dtype", "versions")
        return {name: getattr(self, name) for name in names}

    @property
    def num_rounds(self) -> int:
        return self.config["num_communication_rounds"]

    @property
    def training_clients(self) -> dict[ClientId, int]:
        """Client -> its examples, of the clients that have some."""
        return {facts.client_id: facts.num_examples for facts in self.clients if facts.num_examples}

    def finish(
        self, clients: Sequence[ClientFacts], layout: Mapping[str, Any], best_round: Mapping[str, Any] | None
    ) -> RunRecord:
        """The record of a run whose rounds are done."""
        more = {**self.more, "best_round": best_round}
        return replace(self, state="finished", clients=tuple(clients), layout=layout, more=more)


@dataclass(frozen=True)
class Manifest:
    """The manifest of a committed round: who took part, what became of them, and the hash of every file."""

    round: int
    parent_sha256: str | None
    cohort: Sequence[ClientId]
    limited: Sequence[Mapping[str, Any]]
    quarantined: Sequence[Mapping[str, Any]]
    files: Mapping[str, Any]
    config_sha256: str = ""
    notes: Mapping[str, float] = field(default_factory=dict)
    base_delta: Mapping[str, Any] | None = None
    """The chain of additions to the base, before and after the round."""
    export: Mapping[str, Any] | None = None
    privacy: Mapping[str, Any] | None = None
    """What a private run has spent."""
    shapes: Mapping[str, Any] | None = None
    """Of the adapters of a run across machines, whose rounds may hold no whole one."""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the file: what the next round's manifest holds as `parent_sha256`."""
        return hashlib.sha256(json_text(to_json(self)).encode()).hexdigest()
