"""Make the `skills` rows that allocation splits: short tasks with one right answer."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.data import SkillsConfig
from fedlora.console import say
from fedlora.data.array_file import array_text, refuse_existing
from fedlora.data.skills import SKILLS, make_skill_rows
from fedlora.files import write_text


def run(config: SkillsConfig) -> Path:
    """Write the `skills` rows; the same seed and count give the same bytes. Raises UsageError."""
    text = array_text(make_skill_rows(config.rows_per_category, seed=config.seed))
    if config.output_file.is_file() and config.output_file.read_bytes() == text.encode():
        say(f"{config.output_file} already holds exactly these rows; nothing written")
        return config.output_file
    refuse_existing(config.output_file, overwrite=config.overwrite)
    write_text(config.output_file, text)
    num_rows = config.rows_per_category * len(SKILLS)
    print(f"{config.output_file}: {num_rows} rows, {config.rows_per_category} of each of {len(SKILLS)} skills")
    return config.output_file
