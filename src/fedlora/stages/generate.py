"""Answer every row of a test file with the base model, the global adapter or a client's.

The base is loaded once; adapters are swapped in it, or answer side by side when the rows are few, and are
never merged: merging into bfloat16 weights loses most of an adapter. Beside each file of answers stands a
sidecar that says what produced it; a second call with the same settings finds it and answers nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.generate import GenerateConfig
from fedlora.console import say
from fedlora.data.client_files import is_silo_folder
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.engines.answerers import Answerers, by_round, find_answerers
from fedlora.engines.answering import Answers, Source
from fedlora.errors import UsageError
from fedlora.evaluation.matching import read_predictions
from fedlora.files import json_lines, read_json, sha256_of, write_json, write_text
from fedlora.llm.base_identity import BaseIdentity
from fedlora.llm.base_model import BaseModel
from fedlora.llm.decoding import choose_decoding
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import OutputName, ResultPaths
from fedlora.plain_text import counted
from fedlora.results import Result
from fedlora.runs.environment import library_versions
from fedlora.runs.subjects import Subject, find_adapters, find_share, round_to_name


@dataclass(frozen=True)
class SubjectAnswers:
    """The answers of one subject, in the order of the test file."""

    subject: Subject
    file: Path

    @property
    def name(self) -> str:
        """Who answered, as tables call them."""
        return self.subject.name

    @property
    def texts(self) -> tuple[str, ...]:
        """The answers, read from the file."""
        return tuple(row.output for row in read_predictions(self.file, "answer"))


@dataclass(frozen=True, repr=False)
class Predictions(Result):
    """The answers that the chosen adapters have now, each in a file."""

    answers: tuple[SubjectAnswers, ...]
    config: GenerateConfig
    has_replies: bool = True
    """Whether the test rows have replies that answers are scored against."""

    @property
    def next_command(self) -> str:
        """How the answers are scored against the same file; empty where it holds questions alone."""
        config = self.config
        if not self.has_replies:
            return ""
        asked = {
            "exp_name": config.exp_name,
            "of_subjects": None if config.words == ("global",) else config.words,
            "communication_rounds": round_to_name([one.subject for one in self.answers], config.prediction_dir),
            "target_file": config.test_file_path,
            "prediction_dir": config.prediction_dir,
            "model_dir": config.model_dir,
            **config.read_rules.record(),
        }
        return command_line("score", EvaluateRougeConfig, asked, positional="exp_name")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of predictions."""
        return tuple(answer.file for answer in self.answers)

    def text(self) -> str:
        """One file a line."""
        return "\n".join(map(str, self.files))

    def as_dict(self) -> dict[str, Any]:
        """Who answered, from which round, and the file."""
        return {"answers": [{**answer.subject.record(), "file": str(answer.file)} for answer in self.answers]}


@dataclass(frozen=True)
class _Part:
    """The adapters of one round of one run that answer, the settings of their answers, and the files."""

    answerers: Answerers
    facts: Mapping[OutputName, dict[str, Any]]
    results: ResultPaths

    def missing(self, *, overwrite: bool) -> Answerers:
        """Those who have not answered yet."""
        left = {
            name: adapter
            for name, adapter in self.answerers.adapters.items()
            if not _is_answered(self.results, name, self.facts[name], overwrite=overwrite)
        }
        return replace(self.answerers, adapters=left)


def run(config: GenerateConfig, *, load: Callable[..., BaseModel] | None = None) -> Predictions:
    """Write the predictions of the chosen adapters. `load` takes the place of `load_base_model`.

    Everything is found and checked before a base is loaded; runs on one base share it.
    """
    load = load or ResidentBase().load
    subjects = find_adapters(
        config.words,
        run=config.exp_name,
        round_number=config.communication_rounds,
        model_dir=config.model_dir,
    )
    share = find_share(subjects, config.model_dir) if is_silo_folder(config.test_file_path) else None
    tests = read_test_rows(config.test_file_path, rules=config.read_rules, share=share, needs_reply=False)
    _check_asking(tests, config.test_file_path)
    parts = {place: _make_part(config, place, found, tests) for place, found in by_round(subjects).items()}
    left = {place: part.missing(overwrite=config.overwrite) for place, part in parts.items()}
    for place, answerers in left.items():
        if answerers.adapters:
            for group, answers in answerers.answer(config, tests.rows, load):
                for name in group:
                    _write_answers(parts[place], name, tests, answers, config.test_file_path)
    return Predictions(
        tuple(
            SubjectAnswers(one, parts[one.run, one.round_number].results.predictions(one.output)) for one in subjects
        ),
        config,
        has_replies=any(row.output.strip() for row in tests.rows),
    )


def _check_asking(tests: HeldOutRows, path: Path) -> None:
    """UsageError where a row is plain text."""
    texts = sum(row.kind == "text" for row in tests.rows)
    if texts:
        raise UsageError(
            f"{path}: {texts} of {counted(len(tests.rows), 'row')} are plain text, and a text asks nothing",
            hint=f"measure them with `fedlora loss --test {path}`, or give rows with a prompt",
        )


def _make_part(
    config: GenerateConfig, place: tuple[str, int], subjects: Sequence[Subject], tests: HeldOutRows
) -> _Part:
    answerers = find_answerers(config, place, subjects)
    facts = {name: _facts(config, answerers.source, adapter, tests) for name, adapter in answerers.adapters.items()}
    if (additions := answerers.additions) is not None:
        added = {"base_delta_sha256": additions.sha256}
        facts = {name: {**fact, **added} if name.kind == "client" else fact for name, fact in facts.items()}
    return _Part(answerers, facts, ResultPaths(config.prediction_dir, *place))


def _facts(config: GenerateConfig, source: Source, adapter: Path | None, tests: HeldOutRows) -> dict[str, Any]:
    """What decides the answers: two equal records mean equal predictions."""
    return {
        "adapter_sha256": sha256_of(adapter) if adapter else None,
        "base_model": source.base.name,
        # of a base that is still to be downloaded it is known once it is loaded, and written then
        "base_identity": identity.record() if (identity := source.base.identity) else None,
        **source.prompting.record(),
        "cutoff_len": source.cutoff_len,
        "answer_room": "context",
        "quantization": source.quantization,
        "decoding": {"preset": config.preset, **choose_decoding(config).record()},
        # answers of earlier releases ended nowhere but at end tokens, as those of the reference project do
        **({"stop": "template" if config.stop is None else list(config.stop)} if config.stop_texts != () else {}),
        "test_file": config.test_file_path.name,
        "test_file_sha256": tests.sha256,
        "num_rows": len(tests.rows),
        # left out where nothing was asked for, as in sidecars older than the rules
        **({"reading": rules} if (rules := config.read_rules.record()) else {}),
        "base_dtype_asked": config.base_dtype,
        "versions": library_versions(source.quantization),
    }


def _is_answered(results: ResultPaths, name: OutputName, facts: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether these very predictions lie there already; UsageError when others do and may not be replaced."""
    file, sidecar = results.predictions(name), results.predictions_meta(name)
    if overwrite or not file.is_file():
        return False
    recorded = read_json(sidecar) if sidecar.is_file() else {}
    if recorded.get("num_shortened") == 0:
        # older answers had their room within the cutoff: the same wherever no prompt was shortened for it
        recorded.setdefault("answer_room", "context")
    ignored = _find_base_names(file, recorded, facts)
    differing = sorted(key for key, value in facts.items() if recorded.get(key) != value and key not in ignored)
    if not differing and recorded.get("predictions_sha256") == sha256_of(file):
        say(f"{file}: already answered with these settings")
        return True
    raise UsageError(
        f"{file}: predictions made with other settings lie there (different: {', '.join(differing) or 'the rows'})",
        hint="give --overwrite to replace them, or another --prediction_dir",
    )


def _find_base_names(file: Path, recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> set[str]:
    """What need not be equal: the base's name where both records know its identity, and the identity itself, which is
    compared here. UsageError when it is another base."""
    then, now = (BaseIdentity.from_record(one.get("base_identity")) for one in (recorded, facts))
    if then is None or now is None:
        return {"base_identity"}
    if parts := then.differences(now):
        raise UsageError(
            f"{file}: predictions of another base model lie there: its identity is {then}, not {now} "
            f"(different: {', '.join(parts)})",
            hint="give --overwrite to replace them, or another --prediction_dir",
        )
    return {"base_model", "base_identity"}


def _write_answers(part: _Part, name: OutputName, tests: HeldOutRows, answers: Answers, test_path: Path) -> None:
    """One file of answers and its sidecar; the sidecar, which vouches for the file, comes last.

    `test_path` is where the test rows lie now: it decides no answer.
    """
    results, facts = part.results, part.facts[name]
    lines = [row.as_answered(text) for row, text in zip(tests.rows, answers.texts[name], strict=True)]
    for line, client in zip(lines, tests.clients, strict=False):
        line["client"] = client
    file = results.predictions(name)
    write_text(file, json_lines(lines))
    sidecar = {
        **facts,
        **answers.how,
        "test_path": str(test_path),
        "num_new_tokens": answers.num_new_tokens[name],
        "predictions_sha256": sha256_of(file),
    }
    write_json(results.predictions_meta(name), sidecar)
