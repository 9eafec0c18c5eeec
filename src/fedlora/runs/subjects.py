"""Who answers, is scored or is judged: from what a person types to adapters and to files of predictions.

A subject is the base model, the global adapter or a client's adapter, of one round of one run. Clients are known by
their number and by the name of their file, which run.json records.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fedlora.config.command_line import command_line
from fedlora.config.evaluate import ReportConfig
from fedlora.config.who import WORDS, WhichRound, read_round
from fedlora.data.client_names import client_numbers, is_on_node, name_of_file, shown_client
from fedlora.data.held_out import Share
from fedlora.errors import UsageError
from fedlora.nearest import suggest
from fedlora.paths import OutputName, ResultPaths, RunPaths, is_number
from fedlora.plain_text import one_line
from fedlora.runs.run_folder import read_run
from fedlora.runs.run_records import RunRecord
from fedlora.runs.saved_adapters import names_in_round

ROUND_WITHOUT_RUN = 20
"""The round that answers of a base model get where there is no run."""
_RANGE = re.compile(r"(\d+)-(\d+)")
_MOST = 100_000
"""Most clients that a range without a run may mean."""


@dataclass(frozen=True)
class Subject:
    """The base model, the global adapter or a client's, of one round of a run."""

    run: str
    round_number: int
    output: OutputName
    name: str
    """What tables and messages call it: `base`, `global`, `library`, `client 3`."""

    @property
    def word(self) -> str:
        """What names it from any run: `NAME/ROUND/who`."""
        who = self.output.client_id if self.output.kind == "client" else self.output.kind
        return f"{self.run}/{self.round_number}/{who}"

    def record(self) -> dict[str, Any]:
        """As JSON values; `of` names it on any command line."""
        return {"name": self.name, "of": self.word, "run": self.run, "round": self.round_number}


class Wanted(NamedTuple):
    """One word of `of` or `against`: who, of which run, after which round."""

    run: str
    round: WhichRound
    who: str


def find_adapters(words: Sequence[str], *, run: str, round_number: WhichRound, model_dir: Path) -> list[Subject]:
    """Whose adapters `words` mean, each once, in their order.

    `all` is the base and everyone whose adapter the round has. A round that is not named is the run's last committed
    one, for a base without a run 20. Raises UsageError for an unknown run, round or client; whether an adapter lies
    there is found when it is read.
    """
    runs = _Runs(model_dir)
    found: list[Subject] = []
    for wanted in _read_words(words, run, round_number):
        known = runs[wanted.run]
        number = known.committed_round(wanted)
        everyone = [OutputName("base"), *names_in_round(known.paths, number)] if wanted.who == "all" else None
        found += known.subjects(everyone or known.outputs(wanted.who), number)
    return list(dict.fromkeys(found))


def find_answers(
    words: Sequence[str], *, run: str, round_number: WhichRound, model_dir: Path, prediction_dir: Path
) -> list[Subject]:
    """Whose predictions `words` mean, each once, in their order; `all` is everyone whose predictions the round has.

    A round that is not named is the last one whose folder holds the file. Raises UsageError for an unknown client, and
    where no round holds the predictions.
    """
    runs = _Runs(model_dir)
    found: list[Subject] = []
    for wanted in _read_words(words, run, round_number):
        known = runs[wanted.run]
        if wanted.who == "all":
            folder = known.answered_round(wanted, None, prediction_dir)
            found += known.subjects(folder.predicted(), folder.round_number)
            continue
        for output in known.outputs(wanted.who):
            folder = known.answered_round(wanted, output, prediction_dir)
            found += known.subjects([output], folder.round_number)
    return list(dict.fromkeys(found))


def find_share(subjects: Sequence[Subject], model_dir: Path) -> Share | None:
    """The share of their clients' rows that the runs of `subjects` held out, None without a run; UsageError where they
    held out different rows."""
    runs = _Runs(model_dir)
    shares = {one.run: runs[one.run].share for one in subjects if runs[one.run].paths.run_file.is_file()}
    if len(set(shares.values())) > 1:
        shown = ", ".join(
            f"{name} {one.test_share:g} by seed {one.seed}" if one else f"{name} none" for name, one in shares.items()
        )
        raise UsageError(
            f"the runs did not hold out the same test rows: {shown}",
            hint="take each run by itself, or give test rows in a file",
        )
    return next(iter(shares.values()), None)


class _Run:
    """A run by name; what needs its run.json reads it, so that predictions alone can be scored without a run."""

    def __init__(self, model_dir: Path, name: str) -> None:
        self.name = name
        self.paths = RunPaths(model_dir, name)

    @cached_property
    def record(self) -> RunRecord:
        return read_run(self.paths)

    @cached_property
    def files(self) -> Mapping[int, str]:
        """Client -> its file; empty without a run."""
        return {facts.client_id: facts.file for facts in self.record.clients} if self.paths.run_file.is_file() else {}

    @property
    def share(self) -> Share | None:
        """The share of every client's rows that the run held out, and of which files; None where it held out none."""
        config = self.record.config
        # of a client on another machine neither the file's name nor its hash is known
        here = [facts for facts in self.record.clients if not is_on_node(facts.file)]
        files = tuple((name_of_file(facts.file), facts.sha256) for facts in here)
        return Share(share, config["seed"], files) if (share := config.get("test_share")) else None

    def outputs(self, who: str) -> list[OutputName]:
        """Everyone that one word means, `all` apart."""
        if who in ("base", "global"):
            return [OutputName(who)]
        names = client_numbers(self.files)
        if not is_number(who) and who in names:
            return [OutputName("client", names[who])]
        numbers = self._numbers(who)
        if numbers is None:
            raise self._nobody(f"{who!r} is not in run {self.name}", who)
        unknown = [number for number in numbers if self.files and number not in self.files]
        if unknown:
            raise self._nobody(f"run {self.name} has no client {unknown[0]}", "")
        return [OutputName("client", number) for number in numbers]

    def subjects(self, outputs: Sequence[OutputName], round_number: int) -> list[Subject]:
        """`outputs` under the names that tables show."""
        return [Subject(self.name, round_number, output, self._shown(output)) for output in outputs]

    def committed_round(self, wanted: Wanted) -> int:
        """The round whose adapters are wanted."""
        if isinstance(wanted.round, int):
            return wanted.round
        if wanted.round == "best":
            return self._best_round()
        if rounds := self.paths.committed_rounds():
            return rounds[-1]
        if wanted.round is None and wanted.who == "base" and not self.paths.run_file.is_file():
            return ROUND_WITHOUT_RUN
        state = self.record.state
        raise UsageError(f"{self.paths.root}: {state}, and no round is done", hint="train at least one round")

    def answered_round(self, wanted: Wanted, output: OutputName | None, prediction_dir: Path) -> ResultPaths:
        """The folder of the predictions of `output`, or of anyone, that are wanted."""
        folder = ResultPaths(prediction_dir, self.name, 0)
        if wanted.round is None or wanted.round == "last":
            numbers = folder.rounds[::-1]
        else:
            numbers = [wanted.round if isinstance(wanted.round, int) else self._best_round()]
        holding = [number for number in folder.rounds if _holds(replace(folder, round_number=number), output)]
        if found := [number for number in numbers if number in holding]:
            return replace(folder, round_number=found[0])
        raise self._not_answered(wanted, output, replace(folder, round_number=numbers[0] if numbers else 0), holding)

    def _not_answered(
        self, wanted: Wanted, output: OutputName | None, folder: ResultPaths, holding: Sequence[int]
    ) -> UsageError:
        who = wanted.who if output is None or output.kind != "client" else str(output.client_id)
        command = ["fedlora", "generate", self.name, "--of", who]
        if wanted.round in (None, "last"):
            what = f"{folder.folder.parent}: no round has predictions of {self._shown(output) if output else 'anyone'}"
        else:
            command += ["--round", str(folder.round_number)]
            what = f"{folder.predictions(output) if output else folder.folder}: no such predictions"
        others = f"of round {', '.join(map(str, holding))} there are some; " if holding else ""
        return UsageError(what, hint=f"{others}write them with `{shlex.join(command)}`")

    def _numbers(self, who: str) -> list[int] | None:
        if is_number(who):
            return [int(who)]
        if (ends := _RANGE.fullmatch(who)) is None or not who.isascii():
            return None
        first, last = (int(end) for end in ends.groups())
        if not 0 <= last - first < _MOST:
            raise UsageError(
                f"{who!r} is not a range of clients", hint="give the first and the last number, such as 0-3"
            )
        return list(range(first, last + 1))

    def _shown(self, output: OutputName) -> str:
        if output.kind != "client":
            return str(output)
        return shown_client(output.client_id, self.files)

    def _nobody(self, what: str, who: str) -> UsageError:
        if not self.files:
            return UsageError(what, hint=f"of takes {WORDS}; names need the run's folder under --model_dir")
        names = list(client_numbers(self.files))
        close = suggest(who, [*names, "base", "global", "all"]) if who else ""
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return UsageError(what, hint=f"{close} (its clients: {shown})" if close else f"its clients: {shown}")

    def _best_round(self) -> int:
        best = self.record.more.get("best_round")
        number = best.get("round") if isinstance(best, Mapping) else None
        if type(number) is not int:
            raise UsageError(
                f"{self.paths.run_file}: no best round is recorded",
                hint="only a finished run with held-out rows (--val_data_path) has one; name a round, or last",
            )
        return number


class _Runs(dict[str, _Run]):
    """Runs by name, each read once."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__()
        self._model_dir = model_dir

    def __missing__(self, name: str) -> _Run:
        self[name] = _Run(self._model_dir, name)
        return self[name]


def _read_words(words: Sequence[str], run: str, round_number: WhichRound) -> Iterator[Wanted]:
    for word in words:
        parts = word.split("/")
        if len(parts) == 1:
            yield Wanted(run, round_number, word)
            continue
        try:
            named, number, who = parts
            yield Wanted(named, read_round(number), who)
        except ValueError:
            raise UsageError(f"{word!r} names no model", hint=f"give {WORDS}") from None


def _holds(folder: ResultPaths, output: OutputName | None) -> bool:
    return bool(folder.predicted()) if output is None else folder.predictions(output).is_file()


def shown_names(subjects: Sequence[Subject]) -> list[str]:
    """What a table calls each of them: with run and round where these differ."""
    alike = len({(one.run, one.round_number) for one in subjects}) == 1
    return [one_line(one.name if alike else f"{one.run}/{one.round_number}/{one.name}") for one in subjects]


def round_to_name(subjects: Sequence[Subject], root: Path) -> int | None:
    """The round of `subjects` where it is one and not the last that `root` has results of, which is meant anyway."""
    rounds = {one.round_number for one in subjects}
    last = ResultPaths(root, subjects[0].run, 0).rounds[-1:]
    return None if len(rounds) > 1 or rounds == set(last) else rounds.pop()


def report_command(subjects: Sequence[Subject], root: Path, *, model_dir: Path, **folders: Path) -> str:
    """How the results of `subjects`, below `root`, become a report; empty where none of their runs is there."""
    names = dict.fromkeys(one.run for one in subjects)
    asked = {
        "exp_names": tuple(name for name in names if RunPaths(model_dir, name).run_file.is_file()),
        "communication_rounds": round_to_name(subjects, root),
        "model_dir": model_dir,
        **folders,
    }
    return command_line("report", ReportConfig, asked, positional="exp_names") if asked["exp_names"] else ""
