"""The `plan` stage: what a run will take and what is wrong with its data, before anything is trained.

Nothing is written but `plan_file`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.plan import PlanConfig
from fedlora.console import say
from fedlora.errors import UsageError
from fedlora.files import write_json
from fedlora.planning.plan_text import plan_parts
from fedlora.planning.run_plan import Planning
from fedlora.results import Result


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """Everything that a plan says, as `plan_file` holds it."""

    record: Mapping[str, Any]

    @property
    def next_with_same_flags(self) -> str:
        return "train"

    def parts(self) -> Sequence[str]:
        """The clients, the run, what it takes, and the warnings."""
        return plan_parts(self.record)

    def terminal_text(self) -> str:
        return "\n".join(plan_parts(self.record, coloured=True))

    def as_dict(self) -> dict[str, Any]:
        """The same as `plan_file`."""
        return dict(self.record)


def run(config: PlanConfig) -> Plan:
    """Make the plan, and write `plan_file` if it is named.

    Raises what `train` would raise before its first round.
    """
    _check_plan_file(config)
    record = Planning(config).make_record()
    if config.plan_file is not None:
        write_json(config.plan_file, record)
        say(f"the plan is in {config.plan_file}")
    return Plan(record)


def _check_plan_file(config: PlanConfig) -> None:
    """UsageError when the plan would take the place of another file, or lie where only runs write."""
    file = config.plan_file
    if file is None:
        return
    if file.exists():
        raise UsageError(f"plan_file={file}: a file of this name exists", hint="choose another name, or remove it")
    if file.resolve().is_relative_to(config.model_dir.resolve()):
        raise UsageError(f"plan_file={file}: lies under model_dir={config.model_dir}", hint="choose another folder")
