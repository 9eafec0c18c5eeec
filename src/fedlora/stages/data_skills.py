"""Make the `skills` rows that allocation splits: short tasks with one right answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.data import AllocateConfig, SkillsConfig
from fedlora.console import say
from fedlora.data.array_file import array_text, refuse_existing
from fedlora.data.skills import SKILLS, make_skill_rows
from fedlora.files import write_text
from fedlora.plain_text import counted
from fedlora.results import Result


@dataclass(frozen=True, repr=False)
class SkillRows(Result):
    """The file of the skills rows, how many of each skill it holds, and whether this call wrote it."""

    file: Path
    rows_per_category: int
    written: bool

    @property
    def next_command(self) -> str:
        """How to split the rows."""
        asked = {"input_file": self.file, "test_share": 0.2}
        return command_line("allocate", AllocateConfig, asked)

    @property
    def num_rows(self) -> int:
        """Rows of all skills."""
        return self.rows_per_category * len(SKILLS)

    def text(self) -> str:
        """One line; empty when the file was there."""
        if not self.written:
            return ""
        return f"{self.file}: {counted(self.num_rows, 'row')}, {self.rows_per_category} of each of {len(SKILLS)} skills"

    def as_dict(self) -> dict[str, Any]:
        return {"file": str(self.file), "num_rows": self.num_rows, "written": self.written}


def run(config: SkillsConfig) -> SkillRows:
    """Write the `skills` rows; the same seed and count give the same bytes. Raises UsageError."""
    text = array_text(make_skill_rows(config.rows_per_category, seed=config.seed))
    if config.output_file.is_file() and config.output_file.read_bytes() == text.encode():
        say(f"{config.output_file} already holds exactly these rows; nothing written")
        return SkillRows(config.output_file, config.rows_per_category, written=False)
    refuse_existing(config.output_file, overwrite=config.overwrite)
    write_text(config.output_file, text)
    return SkillRows(config.output_file, config.rows_per_category, written=True)
