"""`fedlora.generate`, `score`, `loss` and `judge`: answers of a run's adapters, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.api.entrance import PathLike, call, entered, make_config
from fedlora.api.signatures import takes
from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.loss import LossConfig
from fedlora.config.score import ScoreConfig
from fedlora.config.tasks import TasksConfig
from fedlora.errors import UsageError
from fedlora.home import path_at_home
from fedlora.plain_text import counted, one_line, table_text
from fedlora.results import Result
from fedlora.rows import STRICT, Row

if TYPE_CHECKING:
    from fedlora.stages.evaluate_llm import Judgements
    from fedlora.stages.loss import MeasuredLosses
    from fedlora.stages.score import Scores
    from fedlora.stages.tasks import TaskResults

QUESTION_HINT = "give text, a row with instruction and input, messages that end with the user's, or a prompt"
MOST_ROWS, MOST_LETTERS = 10, 60
"""What a table of answers shows of them."""


@dataclass(frozen=True, repr=False)
class Answers(Result):
    """Answers of one or several adapters to the rows of a test file; they lie in the files of predictions."""

    questions: tuple[Row, ...]
    files: Mapping[str, Path]
    """Who answered -> the file, with a line per row in the order of the test file."""
    texts: Mapping[str, tuple[str, ...]]
    """Who answered -> one text per row."""
    made_by: Mapping[str, Any]
    """The keywords with which `score` finds the predictions."""

    def score(self, test: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Scores:
        """Exact match and ROUGE of these answers, by `fedlora.score`; the result files are written.

        `test` holds the reference answers, by default the file that was answered.
        """
        given = {**self.made_by, **({} if test is None else {"test": path_at_home(test).absolute()}), **keywords}
        return score(progress=progress, **given)

    def parts(self) -> Sequence[str]:
        """The first rows, with everybody's answer beside each."""
        columns = [[_cell(_last_said(row)) for row in self.questions]]
        columns += [[_cell(text) for text in texts] for texts in self.texts.values()]
        rows = list(zip(*columns, strict=True))
        table = table_text(("question", *self.texts), rows[:MOST_ROWS], left=range(len(columns)))
        left_out = len(rows) - MOST_ROWS
        return [
            table,
            *([f"... and {counted(left_out, 'row')} more"] if left_out > 0 else []),
            *map(_shown, self.files.values()),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Who answered, the file, and the texts, as JSON values."""
        return {
            "answers": [
                {"name": name, "file": str(file), "texts": list(self.texts[name])} for name, file in self.files.items()
            ]
        }


def _last_said(row: Row) -> str:
    """What a row asks; of a conversation its last user turn, and how many turns came before."""
    return f"({counted(len(row.before), 'turn')}) {row.instruction}" if row.before else row.instruction


def _shown(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _cell(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= MOST_LETTERS else f"{line[: MOST_LETTERS - 3]}..."


@takes(GenerateConfig)
def generate(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Answers:
    """Answer every row of the file `test` with the base model, the global adapter or a client's.

    The answers are written to `prediction_dir/name/round`; a second call with the same settings reads them. `of` says
    who answers, by name or number: `["base", "global", 2]`.

    Raises UsageError (a run, a round, a client), DataError (a row), StorageError.

    >>> rows = [{"instruction": "Capital of Italy?", "output": "Rome", "category": "capitals"}]
    >>> test = fl.silos({"questions": rows}, folder="tests") / "questions.jsonl"
    >>> answers = fl.generate(name="pair", test=test, of=["base", "global"], max_new_tokens=8, progress=False)
    >>> list(answers.texts), [len(texts) for texts in answers.texts.values()]
    (['base', 'global'], [1, 1])
    """
    from fedlora.evaluation.matching import read_predictions
    from fedlora.runs.subjects import shown_names
    from fedlora.stages import generate as stage

    with entered("generate", GenerateConfig, keywords, progress=progress):
        made = make_config(GenerateConfig, config, keywords)
        predictions = stage.run(made)
        rows = tuple(read_predictions(predictions.files[0], "answer"))
        names = shown_names([one.subject for one in predictions.answers])
        answers = dict(zip(names, predictions.answers, strict=True))
        return Answers(
            rows,
            {name: one.file.absolute() for name, one in answers.items()},
            {name: one.texts for name, one in answers.items()},
            {
                "of": [one.subject.word for one in predictions.answers],
                "name": made.exp_name,
                "test": made.test_file_path.absolute(),
                **{name: getattr(made, name).absolute() for name in ("prediction_dir", "model_dir")},
            },
        )


def answer(
    questions: Any, of: Sequence[str | int] | str | int, keywords: Mapping[str, Any], *, progress: bool
) -> dict[str | int, Any]:
    """`Run.answer`: what everybody of `of` says, by the words that name them."""
    from fedlora.runs.subjects import Subject, find_adapters, shown_names
    from fedlora.stages.answer import answer_rows

    several = of.split(",") if isinstance(of, str) else of if isinstance(of, list | tuple | range) else [of]
    words: list[Any] = list(several)
    given = {**keywords, "of": words}
    with entered("generate", GenerateConfig, given, progress=progress):
        made = make_config(GenerateConfig, None, given)
        is_one = not isinstance(questions, list | tuple) or _is_conversation(questions)
        asked = [questions] if is_one else questions
        rows = [_row_of(question, f"question {number}") for number, question in enumerate(asked, start=1)]
        if not rows:
            raise UsageError("no questions", hint=QUESTION_HINT)
        where = {"run": made.exp_name, "round_number": made.communication_rounds, "model_dir": made.model_dir}
        named: dict[str | int, Subject] = {}
        for word in words:
            found = find_adapters([str(word)], **where)
            shown: list[Any] = [word] if len(found) == 1 else list(shown_names(found))
            named.update(zip(shown, found, strict=True))
        texts = answer_rows(made, list(dict.fromkeys(named.values())), rows)
        return {word: texts[one][0] if is_one else texts[one] for word, one in named.items()}


def _is_conversation(given: Any) -> bool:
    """Whether a list is the turns of one conversation rather than several questions."""
    turns = given if isinstance(given, list | tuple) else ()
    return bool(turns) and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns)


def _row_of(question: Any, called: str) -> Row:
    """A question as a row, by the rules for rows of a file; UsageError for what is none."""
    from fedlora.data.fields import RowFields
    from fedlora.data.raw_records import Record, RecordError

    if isinstance(question, str):
        return Row(question, "", "", "")
    given = {"messages": question} if _is_conversation(question) else question
    if not isinstance(given, Mapping):
        raise UsageError(f"{called}: {question!r} is no question", hint=QUESTION_HINT)
    try:
        row = RowFields(STRICT, needs_reply=False).make_row(Record(_plain(given), ""))
    except RecordError as error:
        raise UsageError(f"{called}: {error}", hint=QUESTION_HINT) from None
    if row.kind == "text":
        raise UsageError(f"{called}: a text asks nothing", hint=QUESTION_HINT)
    return row


def _plain(value: Any) -> Any:
    """Mappings and sequences as the dicts and lists that a JSON file holds."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


@takes(ScoreConfig)
def score(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Scores:
    """Score predictions against the answers in the file `test`: exact match, token F1, ROUGE F1 and chrF, all in 0..1.

    Every measure has a 95 % interval (bootstrap over prompts; Wilson's for exact match), and is compared with that of
    the base, or of `against`, on the same rows. Overall numbers are plain means over categories. Sources: Lin 2004 for
    ROUGE, by the package rouge-score; Popovic 2015 for chrF. Three files per subject are written to
    `evaluation_dir/name/round`. Raises UsageError where predictions are missing, DataError where predictions and rows
    do not belong together.

    >>> scores = fl.score(name="pair", test="tests/questions.jsonl", of="base", progress=False)
    >>> 0 <= scores["base"].exact_match <= 1
    True
    """
    from fedlora.stages import score as stage

    return call("score", ScoreConfig, stage.run, config, keywords, progress=progress)


@takes(LossConfig)
def loss(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> MeasuredLosses:
    """Measure the loss of stored adapters on the rows in the file `test`, without training.

    Losses are in nats per response token. `losses` of the result has an entry per subject, with its loss overall and by
    category or client, each with a 95 % interval (bootstrap over prompts), and its difference to the base on the same
    rows. Where rows have a list `choices`, `choices` is the share whose right one is the most probable.

    Raises UsageError (a run, a round, a client), DataError (a row).

    >>> measured = fl.loss(name="pair", test="tests/questions.jsonl", of=["base", "global"], progress=False)
    >>> [one.overall.loss > 0 for one in measured.losses]
    [True, True]
    """
    from fedlora.stages import loss as stage

    return call("loss", LossConfig, stage.run, config, keywords, progress=progress)


@takes(TasksConfig)
def tasks(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> TaskResults:
    """Measure a base and stored adapters on standard tasks of lm-evaluation-harness; needs the extra `tasks`.

    `tasks` names tasks of that library, or files of tasks. Each score has the library's standard error and a 95 %
    interval of 1.96 of them. Two files per model and task are written to `evaluation_dir/name/round/who`; a second call
    with the same settings reads them.

    Raises UsageError (a run, a round, a client, a task, rows that cannot be had), DataError (a task's own code fails).

    >>> measured = fl.tasks(name="pair", tasks="colours.yaml", of=["base", "global"], progress=False)
    >>> [(one.subject.name, one.scores[0].measure) for one in measured.results]
    [('base', 'acc'), ('global', 'acc')]
    """
    from fedlora.stages import tasks as stage

    return call("tasks", TasksConfig, stage.run, config, keywords, progress=progress)


@takes(EvaluateLlmConfig)
def judge(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Judgements:
    """Let an OpenAI-compatible judge compare the predictions of `of` with those of `against`, each row in both orders.

    The key comes from the environment (`api_key` or OPENAI_API_KEY) or from `api_key_file`. Verdicts are kept as they
    come, so a call that was interrupted is repeated to resume. Scores are 1 to 100; the win rate is in 0..1. Of several
    judges (`judge_model=["a", "b"]`) a judgement's record is their majority's, with their agreement, and `judges` has
    each one's own. Works inside a running event loop too.

    Raises UsageError (files, key), DataError (rows that do not match), JudgeError (the endpoint refuses), BudgetError
    (`max_calls`, `max_cost`), LockedError, PendingError (`batch`: call it again to collect).

    >>> verdicts = fl.judge(name="pair", of="global", against="base",
    ...                     judge_url="http://127.0.0.1:8000/v1", judge_model="some-model", progress=False)
    >>> [(one.names, one.record["num_samples"]) for one in verdicts.judgements]
    [(('global', 'base'), 1)]
    """
    from fedlora.stages import evaluate_llm as stage

    return call("judge", EvaluateLlmConfig, stage.run, config, keywords, progress=progress)
