"""Weights & Biases: to the server that its own variables name, or into an offline folder that `wandb sync` sends."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import wandb  # pyright: ignore[reportMissingImports]

from fedlora.files import make_folder
from fedlora.plain_text import Table
from fedlora.tracking.tracker import Tracked, flat


class WandbTracker:
    """Neither console output, nor code, nor facts of the machine are recorded: only what is sent here."""

    def open(self, run: Tracked, known: str) -> str:
        """Offline unless there is a key or WANDB_MODE says otherwise; so nothing ever asks for a login."""
        make_folder(run.folder)
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=30,
        )
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=known or secrets.token_hex(8),
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            dir=str(run.folder),
            config=flat(run.configuration),
            settings=settings,
        )
        self._run.define_metric("number")
        self._run.define_metric("*", step_metric="number")
        return self._run.id

    def log(self, round_number: int, values: Mapping[str, float]) -> None:
        """A row of the history, whose x axis is the number of the round."""
        self._run.log({"number": round_number, **values})

    def finish(self, table: Table, files: Sequence[Path]) -> None:
        """A table, and the report as an artefact of the type report."""
        self._run.log({"rounds": wandb.Table(columns=list(table.heads), data=[list(row) for row in table.rows])})
        if files:
            artefact = wandb.Artifact(f"{self._run.id}-report", type="report")
            for file in files:
                artefact.add_file(str(file), name=file.name, policy="mutable")
            self._run.log_artifact(artefact)
        # files of the report lie in a folder that is removed
        self.close()

    def close(self) -> None:
        """Wait until everything is sent or written."""
        if hasattr(self, "_run"):
            self._run.finish()
            del self._run


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
