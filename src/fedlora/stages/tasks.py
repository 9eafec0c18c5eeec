"""The `tasks` stage: standard tasks of lm-evaluation-harness, answered by the base model and by a run's adapters.

The base is loaded once. Adapters are swapped in it for likelihoods; to prompts they answer side by side, as in
`generate`. A result that lies there with these settings is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config.command_line import command_line
from fedlora.config.evaluate import ReportConfig
from fedlora.config.tasks import TasksConfig
from fedlora.console import say
from fedlora.engines.answerers import Answerers, by_round, gather_answerers, source_of_run, source_without_run
from fedlora.engines.answering import TOGETHER_ROWS
from fedlora.errors import UsageError
from fedlora.evaluation.tasks.installed import LIBRARY_VERSION, check_library
from fedlora.evaluation.tasks.task_scores import TaskScore, score_cells, stored_scores
from fedlora.files import read_json, sha256_of, write_json, write_text
from fedlora.llm.base_identity import BaseIdentity
from fedlora.llm.base_model import BaseModel
from fedlora.llm.memory import plan_batch
from fedlora.llm.resident_adapters import ResidentAdapters
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import OutputName, ResultPaths, RunPaths
from fedlora.plain_text import Table, counted, one_line, table_text
from fedlora.results import Result
from fedlora.runs.environment import library_versions
from fedlora.runs.subjects import Subject, find_adapters, round_to_name, shown_names

if TYPE_CHECKING:
    from fedlora.evaluation.tasks.task_files import TaskItem

Place = tuple[Subject, str]
"""A model and the name of a task."""


@dataclass(frozen=True)
class SubjectTask:
    """What one task measured of one model; a group has the scores of its tasks too."""

    subject: Subject
    task: str
    scores: tuple[TaskScore, ...]
    file: Path
    is_new: bool
    """Whether this call measured it."""


@dataclass(frozen=True, repr=False)
class TaskResults(Result):
    """The scores of everyone who was asked for, on every task."""

    results: tuple[SubjectTask, ...]
    config: TasksConfig

    @property
    def next_command(self) -> str:
        """The report that shows these scores; empty where there is no run."""
        config, subjects = self.config, [one.subject for one in self.results]
        names = tuple(dict.fromkeys(one.run for one in subjects if _has_run(config, one)))
        asked = {
            "exp_names": names,
            "communication_rounds": round_to_name(subjects, config.evaluation_dir),
            "model_dir": config.model_dir,
            "tasks_dir": config.evaluation_dir,
        }
        return command_line("report", ReportConfig, asked, positional="exp_names") if names else ""

    def parts(self) -> Sequence[str]:
        """A row for each model and measure, and the folders of the files."""
        folders = dict.fromkeys(str(one.file.parent) for one in self.results)
        return (_scores_table(self.results), *folders)

    def as_dict(self) -> dict[str, Any]:
        """Per model and task who it is, the file, and every score with its standard error and interval."""
        return {
            "results": [
                {
                    **one.subject.record(),
                    "task": one.task,
                    "file": str(one.file),
                    "scores": [score.record() for score in one.scores],
                }
                for one in self.results
            ]
        }


def run(config: TasksConfig, *, load: Callable[..., BaseModel] | None = None) -> TaskResults:
    """Measure every model that `config` names on every task. `load` takes the place of `load_base_model`.

    Everything is found and checked before a base is loaded; runs on one base share it. Raises UsageError for an unknown
    run, round, adapter or task, and where the rows of a task cannot be had; DataError where a task's own code fails.
    """
    check_library()
    if not config.tasks:
        raise UsageError("tasks: name at least one", hint="give --tasks with a name of lm-eval or a task file")
    # the library takes seconds to import
    from fedlora.evaluation.tasks.task_evaluation import load_all

    load = load or ResidentBase().load
    subjects = find_adapters(
        config.words, run=config.exp_name, round_number=config.communication_rounds, model_dir=config.model_dir
    )
    parts = {place: _find_answerers(config, place, found) for place, found in by_round(subjects).items()}
    items = load_all(config)
    settings = {item.name: _settings(config, item) for item in items}
    facts = {
        (one, item.name): {**settings[item.name], **_facts(parts[one.run, one.round_number], one.output)}
        for one in subjects
        for item in items
    }
    done = {place for place in facts if _is_done(config, place, facts[place])}
    _say_done(done)
    for place, answerers in parts.items():
        here = [one for one in subjects if (one.run, one.round_number) == place]
        left = [(item, wanted) for item in items if (wanted := [one for one in here if (one, item.name) not in done])]
        if left:
            _measure_round(config, answerers, left, facts, load)
    results = [
        SubjectTask(one, item.name, stored_scores(file), file, (one, item.name) not in done)
        for one in subjects
        for item in items
        for file in [_file(config, (one, item.name))]
    ]
    return TaskResults(tuple(results), config)


def _has_run(config: TasksConfig, subject: Subject) -> bool:
    return RunPaths(config.model_dir, subject.run).run_file.is_file()


def _find_answerers(config: TasksConfig, place: tuple[str, int], subjects: Sequence[Subject]) -> Answerers:
    paths = RunPaths(config.model_dir, place[0])
    if all(one.output.kind == "base" for one in subjects) and not paths.run_file.is_file():
        if not config.base_model:
            raise UsageError(
                f"{paths.root}: no such run, so it is not known which base is meant",
                hint="name a run, or a base with --base_model",
            )
        source = source_without_run(paths, config.base_model, config.quantization)
    else:
        source = source_of_run(paths, config.base_model, config.quantization)
    return gather_answerers(paths, place[1], source, subjects)


def _settings(config: TasksConfig, item: TaskItem) -> dict[str, Any]:
    """What decides a task's questions and how the answers are scored."""
    names = ("num_fewshot", "limit", "seed", "chat_template", "system_instruction", "fewshot_as_multiturn")
    return {
        **{name: getattr(config, name) for name in (*names, "max_length", "bootstrap_iters")},
        "task": item.name,
        "task_sha256": item.fingerprint(config.limit),
        "base_dtype_asked": config.base_dtype,
        "lm_eval": LIBRARY_VERSION,
    }


def _facts(answerers: Answerers, name: OutputName) -> dict[str, Any]:
    """What decides the answers of one model besides: its adapter and its base."""
    source, file, additions = answerers.source, answerers.adapters[name], answerers.additions
    return {
        "adapter_sha256": sha256_of(file) if file else None,
        **({"base_delta_sha256": additions.sha256} if additions is not None and name.kind == "client" else {}),
        "base_model": source.base.name,
        "base_identity": identity.record() if (identity := source.base.identity) else None,
        "quantization": source.quantization,
        "versions": library_versions(source.quantization),
    }


def _file(config: TasksConfig, place: Place) -> Path:
    subject, task = place
    return ResultPaths(config.evaluation_dir, subject.run, subject.round_number).task(subject.output, task, ".json")


def _is_done(config: TasksConfig, place: Place, facts: Mapping[str, Any]) -> bool:
    """Whether this very result lies there already; UsageError when another does and may not be replaced."""
    file = _file(config, place)
    if config.overwrite or not file.is_file():
        return False
    recorded = read_json(file).get("settings", {})
    then, now = (BaseIdentity.from_record(one.get("base_identity")) for one in (recorded, facts))
    same_base = then is not None and now is not None and not then.differences(now)
    # a base that is to be downloaded has no identity yet
    ignored = {"base_model", "base_identity"} if same_base else ({"base_identity"} if now is None else set())
    differing = sorted(key for key, value in facts.items() if key not in ignored and recorded.get(key) != value)
    if differing:
        raise UsageError(
            f"{file}: measured with other settings (different: {', '.join(differing)})",
            hint="give --overwrite to measure again, or another --evaluation_dir",
        )
    return True


def _say_done(done: set[Place]) -> None:
    if done:
        say(f"{counted(len(done), 'result')} with these settings {'is' if len(done) == 1 else 'are'} there, and kept")


def _measure_round(
    config: TasksConfig,
    answerers: Answerers,
    left: Sequence[tuple[TaskItem, list[Subject]]],
    facts: Mapping[Place, Mapping[str, Any]],
    load: Callable[..., BaseModel],
) -> None:
    """Write what is missing of one round of a run, task by task."""
    opened = answerers.open(config, load)
    # measured once, before adapters are stacked
    tokens = config.tokens_per_pass or plan_batch(opened.base)
    for item, wanted in left:
        num_rows = item.num_answers(config.limit) or TOGETHER_ROWS
        for group in opened.group(num_rows):
            members = [one for one in wanted if one.output in group]
            if not members:
                continue
            states, background = opened.load([one.output for one in members])
            adapters = ResidentAdapters(opened.base, opened.lora, states, background, tokens, config.batch_size)
            for one, written in _evaluate(config, item, members, adapters):
                file = _file(config, (one, item.name))
                identity = opened.base.identity
                settings = {**facts[one, item.name], "base_identity": identity.record() if identity else None}
                write_text(file.with_suffix(".jsonl"), written.pop("rows"))
                write_json(file, {"format": 1, "subject": one.record(), "settings": settings, **written})


def _evaluate(
    config: TasksConfig, item: TaskItem, members: Sequence[Subject], adapters: ResidentAdapters
) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """Every model of a group, and what its files hold."""
    from fedlora.evaluation.tasks.asked_model import AskedModel, Conversation
    from fedlora.evaluation.tasks.quiet_library import Quiet
    from fedlora.evaluation.tasks.task_evaluation import evaluate_task

    quiet = Quiet(run_model_code=config.run_model_code)
    options = {"label": item.name, "seed": config.seeds[1], "max_length": config.max_length}
    conversation = Conversation(adapters, [one.name for one in members], quiet.aloud, **options)
    for number, one in enumerate(members):
        began = time.monotonic()
        found = evaluate_task(config, item, AskedModel(conversation, number), quiet)
        how = {
            "answered_together": [str(member.output) for member in members],
            "base_dtype": adapters.base.dtype_name,
            "device": str(adapters.base.device),
            "seconds": round(time.monotonic() - began, 3),
        }
        yield one, {"scores": [score.record() for score in found.scores], "how": how, "rows": found.rows}


def _scores_table(results: Sequence[SubjectTask]) -> Table:
    names = dict(zip(every := [one.subject for one in results], shown_names(every), strict=True))
    rows = [
        [one_line(score.task), score.called, names[one.subject], *score_cells(score)]
        for one in sorted(results, key=lambda one: one.task)
        for score in one.scores
    ]
    return table_text(("task", "measure", "of", "value", "std. error", "95 %", "rows", "shots"), rows, left=(0, 1, 2))
