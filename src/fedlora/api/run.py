"""A run and its rounds on disk: what `fedlora.train` and `fedlora.open` return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.console import duration
from fedlora.data.client_names import client_numbers, shown_client
from fedlora.errors import UsageError
from fedlora.home import path_at_home
from fedlora.nearest import suggest
from fedlora.paths import OutputName, RunPaths
from fedlora.plain_text import NOTHING, Table, counted, number_text, one_line, size_text, table_text
from fedlora.results import Result
from fedlora.runs.listing import describe_run
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.run_folder import read_run
from fedlora.runs.run_records import RunRecord

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]
    import torch

    from fedlora.api.answers import Answers
    from fedlora.api.entrance import PathLike
    from fedlora.api.picture import Picture
    from fedlora.stages.export import Export
    from fedlora.stages.report import Report
    from fedlora.stages.tasks import TaskResults
    from fedlora.stages.verify import Verification


COLUMNS = ("round", "clients", "training loss", "held-out loss", "sent down", "sent up", "time", "excluded")
MOST_ROUNDS = 40
"""A table shows so many of the last rounds."""


@dataclass(frozen=True, repr=False)
class Run(Result):
    """A run on disk, read again at every call: finished, interrupted, or trained by another process at this moment.

    `len(run)` counts its committed rounds, iteration gives each as a Round, and `run[3]` is round 3 (`run[-1]` is the
    last).
    """

    paths: RunPaths

    @property
    def name(self) -> str:
        """The run's name, which is that of its folder."""
        return self.paths.exp_name

    @property
    def folder(self) -> Path:
        """Where the run lies: run.json, metrics.jsonl and a folder for each round."""
        return self.paths.root

    @property
    def record(self) -> RunRecord:
        """run.json: configuration, versions, clients."""
        return read_run(self.paths)

    @property
    def clients(self) -> dict[str, int]:
        """Name -> number of every client."""
        return client_numbers(self._files)

    @property
    def _files(self) -> dict[int, str]:
        return {facts.client_id: facts.file for facts in self.record.clients}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl as dictionaries, in file order; `kind` is round, client or update.

        Losses are in nats per response token, `seconds` in seconds, `bytes_*` in bytes.
        docs/reference/metrics.md explains every field.
        """
        return MetricsLog(self.paths.metrics_file).rows()

    def frame(self) -> pandas.DataFrame:
        """`metrics()` as a pandas.DataFrame, a row per line. Raises UsageError where pandas is not installed."""
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UsageError("pandas is not installed", hint="`pip install pandas`, or use metrics()") from None
        return pandas.DataFrame(self.metrics())

    def __len__(self) -> int:
        return len(self.paths.committed_rounds())

    def __iter__(self) -> Iterator[Round]:
        return (Round(self, number) for number in self.paths.committed_rounds())

    def __getitem__(self, number: int) -> Round:
        """Round `number`, counted from 1; below zero from the end. Raises UsageError for a round that is not there."""
        done = self.paths.committed_rounds()
        wanted = done[number] if -len(done) <= number < 0 else number
        if wanted not in done:
            raise UsageError(f"run {self.name} has no round {number}", hint=f"its rounds are {done or 'none yet'}")
        return Round(self, wanted)

    def answer(
        self,
        questions: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, str]]],
        of: list[str | int] | str | int = "global",
        *,
        progress: bool = True,
        **keywords: Any,
    ) -> dict[str | int, Any]:
        """What each of `of` answers, in one load of the base and one batch; nothing is written.

        A question is text, a row with `instruction` and `input`, a conversation, or `{"prompt": text}`, which no
        template frames. A conversation is a list of messages with `role` and `content`, the last one the user's, or a
        row that has it as `messages`, and may have `system`. A list of messages is one conversation; every other list
        is several questions. The result maps each entry of `of` to its answer, or to a list of answers where there are
        several questions; of `all` and of ranges it has everyone by name. Keywords are those of `generate`, such as
        `round`, `max_new_tokens` and `temperature`.

        Raises UsageError (a client, a round), DataError (a row).

        >>> answers = fl.open("models/pair").answer("Capital of France?", of=["base", "global", 1], max_new_tokens=4)
        >>> list(answers)
        ['base', 'global', 1]
        """
        from fedlora.api.answers import answer

        return answer(questions, of, self._names(**keywords), progress=progress)

    def generate(
        self, test: PathLike, of: Sequence[str | int] | str | int = "global", *, progress: bool = True, **keywords: Any
    ) -> Answers:
        """Answer the rows of the file `test` and write the predictions: `fedlora.generate` of this run."""
        from fedlora.api.answers import generate

        return generate(progress=progress, **self._names(test=test, of=of, **keywords))

    def tasks(
        self,
        tasks: Sequence[str] | str,
        of: Sequence[str | int] | str | int = ("base", "global"),
        *,
        progress: bool = True,
        **keywords: Any,
    ) -> TaskResults:
        """Measure standard tasks: `fedlora.tasks` of this run."""
        from fedlora.api.answers import tasks as measure

        return measure(progress=progress, **self._names(tasks=tasks, of=of, **keywords))

    def verify(self, *, progress: bool = True, **keywords: Any) -> Verification:
        """Recheck every hash and recompute every aggregate: `fedlora.verify` of this run.

        Where the method is not installed, `method` names it once more: an object, or `file.py:name`.
        """
        from fedlora.api.looking import verify

        return verify(progress=progress, **self._names(**keywords))

    def report(self, folder: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Report:
        """Write the report of this run alone to `folder`, by default `reports/NAME`: `fedlora.report` of this run.

        The result's `page` is report.html there, `file` report.md.
        """
        from fedlora.api.looking import report

        place = Path("reports", self.name) if folder is None else path_at_home(folder).absolute()
        given = {"names": [self.name], "round": self._last(), "model_dir": self.paths.model_dir}
        return report(progress=progress, report_dir=place.parent, report_name=place.name, **{**given, **keywords})

    def export(self, folder: PathLike, *, progress: bool = True, **keywords: Any) -> Export:
        """Write an adapter of this run to `folder` for other programs: `fedlora.export` of this run."""
        from fedlora.api.looking import export

        return export(progress=progress, **self._names(to=folder, **keywords))

    def plot(self, **keywords: Any) -> Picture:
        """Losses by round, and the exact match of what was scored: the figure of the report.

        Keywords are those of `report` that say where results lie. A notebook shows the picture; `save` writes it.
        """
        from fedlora.api.picture import draw_run

        return draw_run({"names": [self.name], "round": self._last(), "model_dir": self.paths.model_dir, **keywords})

    def _names(self, **keywords: Any) -> dict[str, Any]:
        return {"name": self.name, "model_dir": self.paths.model_dir, **keywords}

    def _last(self) -> int:
        return max(self.paths.committed_rounds(), default=1)

    def __bool__(self) -> bool:
        return True

    def parts(self) -> Sequence[str]:
        """A line on the run, and a table of its rounds."""
        line = describe_run(self.paths)
        best = NOTHING if line.best_loss is None else f"{line.best_loss:.3f} after round {line.best_round}"
        head = one_line(
            f"{line.name}: {line.mode} on {line.base_model}, {line.state}, {line.rounds_done} of "
            f"{counted(line.rounds, 'round')}, "
            f"best held-out loss {best}"
        )
        rounds = self.paths.committed_rounds()
        shown = [self._table(rounds[-MOST_ROUNDS:])] if rounds else []
        left_out = len(rounds) - MOST_ROUNDS
        return [head, *([f"... and {counted(left_out, 'round')} before these"] if left_out > 0 else []), *shown]

    def _table(self, numbers: Sequence[int]) -> Table:
        measured = {row["round"]: row for row in self.metrics() if row["kind"] == "round"}
        has_excluded = any(measured[number].get("quarantined") for number in numbers if number in measured)
        files = self._files if has_excluded else {}
        return table_text(COLUMNS, [_cells(number, measured.get(number, {}), files) for number in numbers], left=(7,))

    def as_dict(self) -> dict[str, Any]:
        """Name, folder, state and the line of every round, as JSON values."""
        line = describe_run(self.paths)
        rounds = [row for row in self.metrics() if row["kind"] == "round"]
        return {"name": self.name, "folder": str(self.folder), "state": line.state, "rounds": rounds}

    def find_client(self, client: int | str) -> int:
        """The number of a client that is given by number or name. Raises UsageError with the nearest name."""
        names = self.clients
        if isinstance(client, str) and client in names:
            return names[client]
        if isinstance(client, int) and client in names.values():
            return client
        hint = suggest(str(client), names) or f"its clients are {', '.join(names)}"
        raise UsageError(f"run {self.name} has no client {client!r}", hint=hint)


def _cells(number: int, row: Mapping[str, Any], files: Mapping[int, str]) -> list[str]:
    """A round as a row of the run's table."""
    excluded = [shown_client(each["client_id"], files) for each in row.get("quarantined", ())]
    return [
        str(number),
        str(len(row["cohort"])) if "cohort" in row else NOTHING,
        number_text(row.get("loss")),
        number_text(row.get("val_loss")),
        *(size_text(row[name]) if name in row else NOTHING for name in ("bytes_down", "bytes_up")),
        duration(row["seconds"]) if "seconds" in row else NOTHING,
        one_line(", ".join(excluded)),
    ]


@dataclass(frozen=True, repr=False)
class Round(Result):
    """One committed round of a run."""

    run: Run
    number: int

    @property
    def folder(self) -> Path:
        """A standard PEFT adapter: the global one, where the method leaves one."""
        return self.run.paths.round_folder(self.number)

    @property
    def metrics(self) -> dict[str, Any]:
        """The round's line of metrics.jsonl; empty where the round was not measured. Units as in `Run.metrics`."""
        return next((row for row in self._rows() if row["kind"] == "round"), {})

    @property
    def clients(self) -> list[dict[str, Any]]:
        """A line of metrics.jsonl for each client that took part."""
        return [row for row in self._rows() if row["kind"] == "client"]

    def adapter(self, client: int | str | None = None) -> dict[str, torch.Tensor]:
        """The global adapter, or that of a client given by number or name: PEFT key -> float32 tensor on the CPU.

        A is (r, d_in), B is (d_out, r); the update of a layer is `lora_alpha / r * B @ A`. The files are compared with
        their hashes first. Raises UsageError where the round has no such adapter, or it is damaged.
        """
        from fedlora.llm.adapter_files import BIN_NAME, GLOBAL_BIN_NAME, load_adapter, read_shapes
        from fedlora.runs.saved_adapters import adapter_file, check_committed

        paths = self.run.paths
        name = OutputName("global") if client is None else OutputName("client", self.run.find_client(client))
        # of both forms the one whose listing says the shapes
        file = adapter_file(paths, self.number, name).with_name(GLOBAL_BIN_NAME if client is None else BIN_NAME)
        check_committed(paths, self.number, file)
        return load_adapter(file, read_shapes(file))

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in self.run.metrics() if row["round"] == self.number]

    def parts(self) -> Sequence[str]:
        """The round's row."""
        return [self.run._table([self.number])]

    def as_dict(self) -> dict[str, Any]:
        """The round's line and those of its clients, as JSON values."""
        return {"number": self.number, "folder": str(self.folder), "metrics": self.metrics, "clients": self.clients}
