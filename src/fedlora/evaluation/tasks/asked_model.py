"""One of several resident adapters as lm-evaluation-harness asks a model.

Texts become tokens exactly as the library's model class for transformers makes them: contexts cut from the left, spaces
at the end of a context moved to the continuation, the beginning-of-text token in the place of an empty context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jinja2
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]  (an extra)
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from fedlora.console import Progress
from fedlora.errors import DataError, UsageError
from fedlora.llm.decoding import Decoding
from fedlora.llm.ends import Ends
from fedlora.llm.likelihood import Continuation
from fedlora.llm.limits import has_position_table
from fedlora.llm.resident_adapters import ResidentAdapters

MOST_NEW_TOKENS = 256
"""Of an answer, where the task names no limit: the library's own default."""
_SAMPLING = ("temperature", "top_p", "top_k")
_DECODING = frozenset({*_SAMPLING, "repetition_penalty", "do_sample", "until", "max_gen_toks", "max_length"})

Asked = tuple[str, dict[str, Any]]
"""A prompt, and how its answer is generated."""


@dataclass
class Conversation:
    """What the models of one group share: the adapters, and what all of them answered to the last list of prompts.

    The library asks one model after the other, with the same prompts. The first question is put to all of them.
    """

    adapters: ResidentAdapters
    names: Sequence[str]
    aloud: Callable[[], AbstractContextManager[object]]
    """Inside, progress is shown."""
    label: str = "tasks"
    seed: int = 1234
    max_length: int | None = None
    _asked: Sequence[Asked] = field(default=(), init=False)
    _texts: Sequence[Sequence[str]] = field(default=(), init=False)

    def texts(self, number: int, asked: Sequence[Asked], answer: Callable[[], list[list[str]]]) -> list[str]:
        """The answers of one adapter; `answer` gives those of all where these prompts are new."""
        if not self._texts or list(self._asked) != list(asked):
            self._texts = answer()
            self._asked = asked
        return list(self._texts[number])


class Until(Ends):
    """Texts before which an answer ends wherever they stand in it, among them the texts of control tokens."""

    def is_over(self, written: Sequence[int]) -> bool:
        text = self._tokenizer.decode(list(written[-self._tail :]), skip_special_tokens=False)
        return any(end in text for end in self.texts)


class AskedModel(TemplateLM):
    """The adapter `number` of a conversation."""

    def __init__(self, of: Conversation, number: int) -> None:
        super().__init__()
        self._of = of
        self._number = number
        self._base = of.adapters.base
        self.tokenizer = self._base.tokenizer
        self.max_length = self._find_max_length()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, with the tokenizer's own start token unless the text begins with its text."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        empty = next((request for request in requests if request.args[1] == ""), None)
        if empty is not None:
            raise DataError(
                f"task {empty.task_name}, row {empty.doc_id}: a choice is empty, so it has no likelihood",
                hint="give every choice a text",
            )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [make_disjoint_window(pair) for pair in found]
            windows += [(request.args, *part) for part in parts]
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation takes {len(continuation)} tokens, and 1 to {self.max_length} fit: "
                    f"{str(texts[-1])[:60]!r}",
                    hint="give a larger --max_length, or shorter choices",
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            asked.append(Continuation(ids, len(ids) - len(continuation)))
        name = self._of.names[self._number]
        with self._of.aloud(), Progress(f"{self._of.label} {name}", len(asked), "continuations") as progress:
            return [(one[0], one[1]) for one in self._of.adapters.score(self._number, asked, on_done=progress.advance)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        asked: list[Asked] = [request.args for request in requests]
        return self._of.texts(self._number, asked, lambda: self._answer_all(asked))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it, without its system turn where that has none."""
        how = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **how)
        except jinja2.exceptions.TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return self.tokenizer.apply_chat_template(turns, **how)

    def _answer_all(self, asked: Sequence[Asked]) -> list[list[str]]:
        """The answers of every adapter; prompts that are answered in one way are answered together."""
        adapters = self._of.adapters
        texts = [[""] * len(asked) for _ in adapters.states]
        ways: list[tuple[dict[str, Any], list[int]]] = []
        for place, (_, how) in enumerate(asked):
            same = next((places for known, places in ways if known == how), None)
            if same is None:
                ways.append((how, same := []))
            same.append(place)
        label = f"{self._of.label} {', '.join(self._of.names)}"
        total = len(asked) * len(adapters.states)
        with self._of.aloud(), Progress(label, total, "answers") as progress:
            for how, places in ways:
                decoding, until, most = self._read(how)
                prompts = [self._prompt(asked[place][0], most) for place in places]
                ends = Until((), until, self.tokenizer)
                found = adapters.answer(prompts, decoding, ends, on_done=progress.advance)
                for number, answers in enumerate(found):
                    for place, ids in zip(places, answers, strict=True):
                        text = self.tokenizer.decode(ids, skip_special_tokens=True)
                        texts[number][place] = postprocess_generated_text(text, until, None)
        return texts

    def _read(self, how: Mapping[str, Any]) -> tuple[Decoding, list[str], int]:
        """How tokens are chosen, the texts that end an answer, and most tokens of a prompt; UsageError for what our
        decoding has not."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(how), MOST_NEW_TOKENS))
        if unknown := sorted(settings.keys() - _DECODING):
            raise UsageError(
                f"generation_kwargs of the task: {unknown[0]} is not supported",
                hint=f"the task may have {', '.join(sorted(_DECODING))}",
            )
        end = self.tokenizer.eos_token_id
        eos = None if end is None else self.tokenizer.decode(end, skip_special_tokens=False)
        until = handle_stop_sequences(settings["until"], eos=eos)
        longest, room = settings["max_gen_toks"], self.max_length - settings["max_gen_toks"]
        if room <= 0:
            raise UsageError(
                f"max_gen_toks={longest} of the task leaves no room for a prompt in {self.max_length} tokens",
                hint="set max_gen_toks in the task's generation_kwargs, or give a larger --max_length",
            )
        wanted = (*(_SAMPLING if settings["do_sample"] else ()), "repetition_penalty")
        of_model = self._base.model.generation_config
        chosen = {name: settings.get(name, getattr(of_model, name, None)) for name in wanted}
        if settings["do_sample"] and chosen["temperature"] is None:
            chosen["temperature"] = 1.0
        given = {name: value for name, value in chosen.items() if value is not None}
        return Decoding(longest, seed=self._of.seed, **given), until, room

    def _prompt(self, text: str, most: int) -> list[int]:
        """The ids of a prompt, its last `most`."""
        options = {"add_special_tokens": False} if has_bos_prefix(text, self.tokenizer.bos_token) else {}
        return list(self.tokenizer(text, **options)["input_ids"])[-most:] or [self.prefix_token_id]

    def _find_max_length(self) -> int:
        """The longest input of the model, as the library finds it, or what was asked for."""
        model, asked = self._base.model, self._of.max_length
        own = min(resolve_max_length(model.config, self.tokenizer), self._base.can.longest)
        if asked is not None and asked > own and has_position_table(model, own):
            raise UsageError(
                f"max_length={asked} is more than the {own} positions of base_model={self._base.name!r}",
                hint=f"use --max_length {own} or less",
            )
        return min(asked or own, self._base.can.longest)
