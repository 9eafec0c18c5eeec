"""TensorBoard: event files in a folder, shown by `tensorboard --logdir`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]
from torch.utils.tensorboard.writer import SummaryWriter

from fedlora.plain_text import Table
from fedlora.tracking.markdown_table import markdown_of
from fedlora.tracking.tracker import Tracked, flat


class TensorBoardTracker:
    """A run is a folder; one that resumes has a further event file in it. There are no artefacts: the report's text and
    pictures are written into the events."""

    def open(self, run: Tracked, known: str) -> str:
        """The folder's name: the run's, with digits added where another run has that name."""
        name = known or (run.name if not (run.folder / run.name).exists() else f"{run.name}-{secrets.token_hex(4)}")
        self._writer = SummaryWriter(str(run.folder / name))
        if not known:
            rows = [[key, str(value)] for key, value in flat(run.configuration).items()]
            self._writer.add_text("configuration", markdown_of(["setting", "value"], rows), 0)
        return name

    def log(self, round_number: int, values: Mapping[str, float]) -> None:
        """Scalars at the step of the round, flushed."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round_number)
        self._writer.flush()

    def finish(self, table: Table, files: Sequence[Path]) -> None:
        """The table and report.md as text, the pictures as images."""
        self._writer.add_text("rounds", markdown_of(table.heads, table.rows))
        for file in files:
            if file.suffix == ".md":
                self._writer.add_text("report", file.read_text(encoding="utf-8"))
            elif file.suffix == ".png":
                image = Summary.Image(encoded_image_string=file.read_bytes())
                value = Summary.Value(tag=f"report/{file.stem}", image=image)
                self._writer._get_file_writer().add_summary(Summary(value=[value]))  # pyright: ignore

    def close(self) -> None:
        """Flush and close the event file."""
        if hasattr(self, "_writer"):
            self._writer.close()
