"""A run at one moment: its state, rounds, losses, who is at work, how fast, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.console import duration
from fedlora.data.client_names import shown_client
from fedlora.plain_text import NOTHING, Table, counted, number_text, one_line, size_text, table_text
from fedlora.results import LiveResult
from fedlora.training.round_text import describe_round
from fedlora.watching.drawing import draw

EVERY_SECONDS = 10.0
"""How often the progress is a line where there is no terminal."""
ROUNDS_SHOWN = 10
LOSSES_TOLD = 20
COLUMNS = ("round", "training loss", "held-out loss", "clients", "tokens", "time", "excluded")


@dataclass(frozen=True, repr=False)
class Snapshot(LiveResult):
    """What the files of a run say at one moment; `taken` is in seconds of a clock that only runs forward.

    `state` is `not begun`, `starting`, `training`, `finished`, `interrupted`, `what-if of ...` or `damaged: ...`.
    `progress` is what the process that trains has written last. A snapshot that `is_drawn_only` is nothing but a
    picture: what there is to say comes another way.
    """

    name: str
    folder: str
    state: str
    taken: float
    holder: str = ""
    method: str = ""
    base_model: str = ""
    rounds: int = 0
    lines: Sequence[Mapping[str, Any]] = ()
    """Of metrics.jsonl, of rounds and clients."""
    files: Mapping[int, str] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[float] = ()
    """Of the last steps."""
    last_loss: Mapping[int, float] = field(default_factory=dict)
    """Of each client's last step."""
    is_drawn_only: bool = False

    @property
    def is_open(self) -> bool:
        """Whether there is more to come."""
        return self.state in ("not begun", "starting", "training")

    @property
    def done(self) -> Sequence[Mapping[str, Any]]:
        """The lines of the rounds that are measured, without that of the untrained base."""
        return [line for line in self.lines if line["kind"] == "round" and line["round"] > 0]

    @property
    def at_work(self) -> Sequence[Mapping[str, Any]]:
        """The clients that train: name, round, step of steps (0 where its steps are not heard of), loss."""
        return [
            {
                "client_id": work["client_id"],
                "client": shown_client(work["client_id"], self.files),
                "round": work["round"],
                "step": work["step"],
                "steps": work["steps"],
                "loss": self.last_loss.get(work["client_id"]),
            }
            for work in self.progress.get("at_work", ())
        ]

    @property
    def excluded(self) -> Sequence[Mapping[str, Any]]:
        """Who was left out of which round, and why."""
        return [
            {
                "round": line["round"],
                "client_id": each["client_id"],
                "client": shown_client(each["client_id"], self.files),
                "reason": each["reason"],
            }
            for line in self.done
            for each in line.get("quarantined", ())
        ]

    def headline(self) -> str:
        """Name, method, base, state and rounds."""
        if self.state == "not begun":
            return one_line(f"{self.name}: not begun: there is no run in {self.folder} yet")
        if self.state == "starting":
            return one_line(f"{self.name}: {self.holder} reads the data and loads the base model")
        holder = f" by {self.holder}" if self.holder else ""
        what = f"{self.method} on {self.base_model}, " if self.method else ""
        return one_line(f"{self.name}: {what}{self.state}{holder}, {len(self.done)} of {counted(self.rounds, 'round')}")

    def pace(self) -> str:
        """Examples, speed, time left and memory; empty where no process trains the run."""
        facts = self.progress
        if not facts or self.state != "training":
            return ""
        told = [f"{facts['done']:,} of {counted(facts['total'], 'example')}"]
        if facts.get("tokens_per_second"):
            told.append(f"{facts['tokens_per_second']:,.0f} tokens/s")
        if facts.get("seconds_left") is not None:
            told.append(f"about {duration(facts['seconds_left'])} left")
        memory = facts.get("memory", {})
        if "process" in memory:
            told.append(f"{size_text(memory['process'])} of memory")
        if "device" in memory:
            told.append(f"{size_text(memory['device'])} on the GPU")
        return ", ".join(told)

    def workers(self) -> Sequence[str]:
        """A text on each client that trains."""
        texts = []
        for work in self.at_work:
            step = f", step {work['step']} of {work['steps']}" if work["steps"] else ""
            loss = f", loss {work['loss']:.3f}" if work["loss"] is not None else ""
            texts.append(one_line(f"{work['client']}: round {work['round']}{step}{loss}"))
        return texts

    def exclusions(self) -> Sequence[str]:
        """A text on each client that was left out."""
        return [one_line(f"round {each['round']}: {each['client']}: {each['reason']}") for each in self.excluded]

    def table(self) -> Table | None:
        """The last rounds."""
        if not self.done:
            return None
        return table_text(COLUMNS, [_cells(line, self.files) for line in self.done[-ROUNDS_SHOWN:]], left=(6,))

    def parts(self) -> Sequence[str]:
        workers = [f"at work: {'; '.join(self.workers())}"] if self.at_work else []
        excluded = [f"excluded: {text}" for text in self.exclusions()]
        return [self.headline(), self.pace(), *workers, self.table() or "", *excluded]

    def picture(self) -> Any:
        return draw(self)

    def news(self, shown: LiveResult | None) -> Sequence[str]:
        if self.is_drawn_only:
            return []
        if not isinstance(shown, Snapshot):
            return [part for part in self.parts() if part]
        lines = []
        for row in self.done[len(shown.done) :]:
            records = [line for line in self.lines if line["kind"] == "client" and line["round"] == row["round"]]
            lines += describe_round(row, records, self.rounds, self.files)
        if (self.state, self.holder) != (shown.state, shown.holder):
            lines.append(self.headline())
        if not lines and self.taken - shown.taken >= EVERY_SECONDS and self.pace():
            lines.append("; ".join([self.pace(), *self.workers()]))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Losses in nats per response token, times in seconds, memory in bytes."""
        facts = self.progress if self.state == "training" else {}
        names = ("loss", "val_loss", "seconds", "num_tokens", "privacy")
        return {
            "name": self.name,
            "folder": self.folder,
            "state": self.state,
            "process": self.holder or None,
            "method": self.method,
            "base_model": self.base_model,
            "rounds": self.rounds,
            "rounds_done": [
                {"round": line["round"], **{name: line[name] for name in names if name in line}} for line in self.done
            ],
            "examples": {"done": facts["done"], "total": facts["total"]} if facts else None,
            "tokens_per_second": facts.get("tokens_per_second"),
            "seconds_left": facts.get("seconds_left"),
            "memory": facts.get("memory"),
            "at_work": list(self.at_work) if facts else [],
            "excluded": list(self.excluded),
            "last_losses": list(self.losses[-LOSSES_TOLD:]),
        }


def _cells(line: Mapping[str, Any], files: Mapping[int, str]) -> Sequence[str]:
    return [
        str(line["round"]),
        number_text(line.get("loss")),
        number_text(line.get("val_loss")),
        str(len(line.get("cohort", ()))),
        f"{line['num_tokens']:,}" if "num_tokens" in line else NOTHING,
        duration(line["seconds"]) if "seconds" in line else NOTHING,
        one_line(", ".join(shown_client(each["client_id"], files) for each in line.get("quarantined", ()))) or NOTHING,
    ]
