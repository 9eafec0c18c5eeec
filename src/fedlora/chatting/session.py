"""A conversation with several models: each has its own history, and all share the question and the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.config.chat import ChatConfig
from fedlora.engines.streamed_answers import Reply, StreamedAnswers
from fedlora.errors import UsageError
from fedlora.files import json_lines, write_text
from fedlora.home import path_at_home
from fedlora.paths import RunPaths
from fedlora.rows import Row, Turn
from fedlora.runs.run_folder import read_run
from fedlora.runs.subjects import find_adapters, shown_names

SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")
"""What can be changed between two questions, beside the template and the system prompt."""


class ChatSession:
    """Models of one or several runs that answer the same questions. Raises UsageError, StorageError.

    The base is loaded with the first question. Nothing is written unless `save` is called.
    """

    def __init__(self, config: ChatConfig, *, engine: StreamedAnswers | None = None) -> None:
        run = {"run": config.exp_name, "round_number": config.communication_rounds, "model_dir": config.model_dir}
        self._subjects = find_adapters(config.of_subjects or _everyone(config), **run)
        self._names = dict(zip(self._subjects, shown_names(self._subjects), strict=True))
        self._config = config
        self._how = config.generating()
        self._system = config.system
        self._engine = engine or StreamedAnswers(self._subjects)
        # files that are missing or damaged are found before the first question
        self._engine.template(self._how, self._subjects[0])
        self._said: dict[str, list[Turn]] = {name: [] for name in self.names}
        self._prompts: dict[str, str] = {}
        self._asked = 0

    def fresh(self) -> ChatSession:
        """Another session with the same models, which asks them through the same base. One of them asks at a time."""
        return ChatSession(self._config, engine=self._engine)

    @property
    def names(self) -> tuple[str, ...]:
        """What the models are called, in the order in which they were named."""
        return tuple(self._names.values())

    @property
    def system(self) -> str:
        """The system prompt; empty for the template's own."""
        return self._system

    @property
    def template(self) -> str:
        """The template that was asked for; auto is that of each run."""
        return self._how.prompt_template

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of decoding, by name."""
        return {name: getattr(self._how, name) for name in SETTINGS}

    @property
    def templates(self) -> dict[str, str]:
        """The template that frames what each model is asked."""
        return {name: self._engine.template(self._how, subject) for subject, name in self._names.items()}

    @property
    def forgetful(self) -> tuple[str, ...]:
        """The models whose template has no place for earlier turns: to them each question stands alone."""
        return tuple(name for subject, name in self._names.items() if not self._engine.takes_turns(self._how, subject))

    @property
    def prompts(self) -> Mapping[str, str]:
        """What each model was given last, as text with its control tokens."""
        return dict(self._prompts)

    def history(self, name: str) -> tuple[Turn, ...]:
        """What was said with one model so far."""
        return tuple(self._said[name])

    def ask(self, question: str, on_text: Callable[[str, str], None] = lambda name, text: None) -> dict[str, Reply]:
        """Every model's reply; `on_text` hears a model's name and its text so far, again and again.

        A question that raises, or is interrupted, is not part of any history.
        """
        if not question.strip():
            raise UsageError("the question is empty", hint="ask something")
        rows = {subject: self._row(subject, name, question) for subject, name in self._names.items()}
        heard = self._engine.answer(
            self._how, rows, self._asked + 1, lambda subject, text: on_text(self._names[subject], text)
        )
        self._asked += 1
        replies = {name: heard[subject] for subject, name in self._names.items()}
        for name, reply in replies.items():
            self._said[name] += [Turn("user", question), Turn("assistant", reply.text)]
            self._prompts[name] = reply.prompt
        return replies

    def set(self, name: str, value: Any) -> None:
        """Change a setting of decoding. Raises UsageError for an unknown name or a wrong value."""
        if name not in SETTINGS:
            raise UsageError(f"{name!r} cannot be set here", hint=f"one of {', '.join(SETTINGS)}")
        if (fault := ChatConfig.find_value_fault(name, value)) is not None:
            raise UsageError(f"{name}={value!r}: {fault}", hint="see fedlora chat --help")
        self._how = self._how.model_copy(update={name: getattr(ChatConfig.of(**{name: value}), name)})

    def set_system(self, text: str) -> None:
        """Change the system prompt; every conversation starts again, for it stands at its beginning."""
        self._system = text.strip()
        self.reset()

    def set_template(self, template: str) -> None:
        """Change the template of all models; every conversation starts again. Raises UsageError."""
        how = self._config.generating(prompt_template=template, template_text="", **self.settings)
        self._engine.template(how, self._subjects[0])
        self._how = how
        self.reset()

    def reset(self) -> None:
        """Forget every conversation."""
        self._said = {name: [] for name in self.names}
        self._prompts, self._asked = {}, 0

    def rows(self) -> list[Row]:
        """Every conversation as a row, whose category is the model's name; `fedlora` reads the file of `save` back."""
        system = (Turn("system", self._system),) if self._system else ()
        rows = []
        for name, said in self._said.items():
            # to a forgetful model each question stood alone
            pairs = [said[at : at + 2] for at in range(0, len(said), 2)]
            parts = pairs if name in self.forgetful else [said] if said else []
            for part in parts:
                before = () if name in self.forgetful else (*system, *part[:-2])
                rows.append(Row(part[-2].content, "", part[-1].content, name, before, "conversation"))
        return rows

    def save(self, file: str | Path) -> Path:
        """Write `rows` to a new .jsonl file, one conversation per line. Raises UsageError, StorageError."""
        path = path_at_home(file)
        if path.suffix != ".jsonl":
            raise UsageError(f"{path}: conversations are rows of a .jsonl file", hint=f"name it {path.stem}.jsonl")
        if path.exists():
            raise UsageError(f"{path}: there is such a file already", hint="choose another name")
        rows = self.rows()
        if not rows:
            raise UsageError("nothing has been said yet", hint="ask first")
        write_text(path, json_lines(row.as_dict() for row in rows))
        return path

    def _row(self, subject: Any, name: str, question: str) -> Row:
        if not self._engine.takes_turns(self._how, subject):
            if self._system:
                used = self._engine.template(self._how, subject)
                raise UsageError(
                    f"{name}: the template {used} has no place for a system prompt",
                    hint="leave it out, or choose the template chat",
                )
            return Row(question, "", "", "")
        system = (Turn("system", self._system),) if self._system else ()
        return Row(question, "", "", "", (*system, *self._said[name]), "conversation")


def _everyone(config: ChatConfig) -> tuple[str, ...]:
    """The base and the global adapter; where the run has no global adapter, the base and the clients."""
    record = read_run(RunPaths(config.model_dir, config.exp_name))
    return ("all",) if record.has_global_model is False else ("base", "global")
