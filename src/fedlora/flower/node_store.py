"""A client's store on its own machine: every update of a run as one file, with its memory inside.

One file is one commit: an update never exists without the memory that belongs to it. Each task names the round that the
server accepted last, and the client starts from the memory of that round. So an update that was lost or refused never
counts.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.engines.messages import pack, pack_outcome, unpack, unpack_outcome
from fedlora.errors import DataError
from fedlora.files import read_json, write_bytes, write_json
from fedlora.flower.folders import NodePaths, node_salt_file
from fedlora.flower.frames import FrameError, frame, unframe
from fedlora.types import BaseDelta, BaseLink, ClientId, ClientMemory, ClientUpdate

OWNER_ONLY = 0o600


class NodeStore:
    """One run's updates on this node, the newest rounds of them."""

    def __init__(self, paths: NodePaths, keep_rounds: int) -> None:
        self.paths = paths
        self.keep_rounds = keep_rounds
        self._base: BaseDelta | None = None

    def find(self, round_number: int, task_id: str) -> ClientUpdate | None:
        """The update that answers this very task, if it was made before; a damaged file is as good as none."""
        update = self.read_update(round_number)
        return update if update is not None and update.task_id == task_id else None

    def keep(self, update: ClientUpdate) -> None:
        """Commit an update with its memory."""
        content = frame(pack_outcome(update, {}))
        write_bytes(self.paths.update_file(update.round), content, mode=OWNER_ONLY)

    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory:
        """The client's memory with the update of round `accepted`; DataError when it is missing."""
        if accepted is None:
            return ClientMemory()
        update = self.read_update(accepted)
        if update is None or update.client_id != client_id:
            raise DataError(
                f"{self.paths.update_file(accepted)}: this client's memory of round {accepted} is missing or damaged",
                hint="restore the file, or start the run again with --overwrite",
            )
        return update.memory

    def forget_before(self, needed: int) -> None:
        """Remove what no resumption can need any more: the rounds long before the last accepted one, or before the one
        that is asked for where none was."""
        for number in self.paths.kept_rounds():
            if number < needed - self.keep_rounds:
                self.paths.update_file(number).unlink(missing_ok=True)

    def read_base(self) -> BaseDelta | None:
        """What this run had added to its base when a task last came; None without, or when its file is damaged."""
        if self._base is None and self.paths.base_file.is_file():
            try:
                header, groups = unpack(unframe(self.paths.base_file.read_bytes()))
            except FrameError:
                return None
            self._base = BaseDelta(tuple(BaseLink(**link) for link in header["links"]), groups["base"] or {})
        return self._base

    def keep_base(self, base: BaseDelta | None) -> None:
        """Commit the additions that a task needs, so that the next one need not send them again."""
        if base is None or not base.links or (self._base is not None and self._base.sha256 == base.sha256):
            return
        content = frame(pack({"links": [asdict(link) for link in base.links]}, {"base": base.background}))
        write_bytes(self.paths.base_file, content, mode=OWNER_ONLY)
        self._base = base

    def read_layout(self) -> Mapping[str, Any] | None:
        """The layout in which this run's first training was laid out here."""
        file = self.paths.layout_file
        return read_json(file) if file.is_file() else None

    def write_layout(self, record: Mapping[str, Any]) -> None:
        """Replace the layout."""
        write_json(self.paths.layout_file, dict(record))

    def read_update(self, round_number: int) -> ClientUpdate | None:
        """The update of a round; None without, or when its file is damaged."""
        file = self.paths.update_file(round_number)
        if not file.is_file():
            return None
        try:
            outcome, _ = unpack_outcome(unframe(file.read_bytes()))
        except FrameError:
            return None
        return outcome if isinstance(outcome, ClientUpdate) else None


def folder_bytes(folder: Path) -> int:
    """How much the files below a folder hold."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def read_salt(state_dir: Path) -> bytes:
    """This node's secret, drawn once."""
    file = node_salt_file(state_dir)
    if not file.is_file():
        write_bytes(file, secrets.token_bytes(32), mode=OWNER_ONLY)
    return file.read_bytes()
