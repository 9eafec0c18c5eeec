"""The base models of a comparison's records: runs are found again wherever their base lies now.

A run's name holds a hash over its configuration, in which its base is a name. A base that was measured under another
name, by identity, keeps that name there; another base under a name that is taken is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.errors import UsageError
from fedlora.files import read_json
from fedlora.llm.base_identity import BaseIdentity, find_identity
from fedlora.paths import ComparisonPaths


class KnownBases:
    """Names of bases in a comparison, and what its records say of their identities."""

    def __init__(self, paths: ComparisonPaths) -> None:
        self._paths = paths
        self._recorded: dict[str, BaseIdentity] = {}
        for file in sorted(paths.scores_folder.glob("*.json")):
            told = read_json(file).get("base_model")
            if told and (identity := BaseIdentity.from_record(told["identity"])):
                self._recorded.setdefault(told["name"], identity)
        self._names: dict[str, str] = {}

    def name_of(self, base_model: str) -> str:
        """The name by which records know a base; UsageError for another base than the one of this name."""
        if base_model not in self._names:
            self._names[base_model] = self._find_name(base_model)
        return self._names[base_model]

    def describe(self, base_model: str, identity: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a record says of its base."""
        return {"name": self.name_of(base_model), "identity": identity}

    def _find_name(self, base_model: str) -> str:
        found = find_identity(base_model)
        if found is None:
            return base_model
        alike = [name for name, identity in self._recorded.items() if not identity.differences(found)]
        if base_model in alike or (not alike and base_model not in self._recorded):
            return base_model
        if alike:
            return alike[0]
        known = self._recorded[base_model]
        raise UsageError(
            f"{self._paths.root}: base_model={base_model!r} is not the base that was measured under this name: its "
            f"identity is {found}, not {known} (different: {', '.join(known.differences(found))})",
            hint="restore that base, or give the comparison another --name",
        )
