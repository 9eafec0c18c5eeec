"""Adapters that answer the rows of one test file on one loaded base: who answers together, and the answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.generate import GenerateConfig
from fedlora.config.prompting import PromptSettings
from fedlora.config.train_fields import Quantization
from fedlora.console import Progress
from fedlora.llm.base_model import BaseModel
from fedlora.llm.decoding import choose_decoding
from fedlora.llm.examples import make_encoder
from fedlora.llm.generation import Request, generate_answers
from fedlora.llm.limits import check_answers, check_tokens
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.memory import plan_batch
from fedlora.paths import OutputName
from fedlora.rows import Row
from fedlora.runs.recorded_base import RecordedBase
from fedlora.types import AdapterState

TOGETHER_ROWS = 512
"""About so many prompts, of one adapter or of several together, keep batches full."""

TOGETHER_RANK = 128
"""Most ranks of adapters that answer together: every row pays for all of them."""


@dataclass(frozen=True)
class Source:
    """Everything the answers depend on, apart from the adapter."""

    base: RecordedBase
    prompting: PromptSettings
    cutoff_len: int
    quantization: Quantization


def group_names(
    names: list[OutputName], num_rows: int, specs: Mapping[OutputName, LoraSpec], *, apart: bool
) -> list[list[OutputName]]:
    """Who answers together: as many as it takes to fill batches when rows are few, so that a kill loses little.

    The base answers alone: in other company the last bits of its sums differ, and with them now and then a word,
    while runs that are compared must find the same base. So does, `apart`, a global adapter whose clients stand on
    additions to the base.
    """
    trained = [name for name in names if name.kind != "base" and not (apart and name.kind == "global")]
    groups = [[name] for name in names if name not in trained]
    rank = max((specs[name].r for name in trained), default=1)
    size = max(1, min(TOGETHER_ROWS // num_rows, TOGETHER_RANK // rank))
    return groups + [trained[start : start + size] for start in range(0, len(trained), size)]


@dataclass(frozen=True)
class Answers:
    """What a group of adapters said, and how."""

    texts: dict[OutputName, list[str]]
    num_new_tokens: dict[OutputName, int]
    how: dict[str, Any]


class Answering:
    """One loaded model and one test file: who answers changes, what is asked does not."""

    def __init__(
        self,
        config: GenerateConfig,
        source: Source,
        base: BaseModel,
        lora: LoraModel | None,
        rows: Sequence[Row],
        *,
        label: str,
        called: Mapping[OutputName, str],
    ) -> None:
        """`label` is the run that progress names, `called` what it calls who answers."""
        self.config = config
        self.label = label
        self.called = called
        self.base = base
        self.lora = lora
        self.encoder = make_encoder(base.tokenizer, source.prompting)
        check_tokens(base, self.encoder)
        self.decoding = choose_decoding(config)
        # what no template frames has no next turn
        is_framed = any(row.kind != "completion" for row in rows)
        self.ends = self.encoder.ends(config.stop_texts if is_framed or config.stop_texts else ())
        # measured once, before adapters are stacked
        self.tokens = config.tokens_per_pass or plan_batch(base)
        room = {"context": base.context, "max_new_tokens": self.decoding.max_new_tokens}
        self.prompts = [self.encoder.question(row, cutoff=source.cutoff_len, **room) for row in rows]
        check_answers(base, [len(prompt.ids) for prompt in self.prompts], self.decoding.max_new_tokens)

    def set_adapters(self, states: Sequence[AdapterState | None], background: AdapterState | None) -> LoraModel | None:
        """Put adapters into the layers, stacked where there are several; returns the layers then, by which each request
        chooses its own. `background` is what they stand on beside the base."""
        if self.lora is None:
            return None
        self.lora.set_background(background)
        if len(states) == 1:
            self.lora.set_adapter(states[0])
            return None
        self.lora.stack_adapters(states, self.base.dtype)
        return self.lora

    def answer(
        self, names: Sequence[OutputName], states: Sequence[AdapterState | None], background: AdapterState | None
    ) -> Answers:
        """Answer every row with every adapter of a group, in shared batches when there are several.

        `background` is what they stand on beside the base.
        """
        requests = [
            Request(prompt.ids, row, adapter)
            for adapter in range(len(names))
            for row, prompt in enumerate(self.prompts)
        ]
        together = self.set_adapters(states, background)
        began = time.monotonic()
        with Progress(
            f"generate {self.label} {', '.join(self.called[name] for name in names)}", len(requests), "answers"
        ) as progress:
            found = generate_answers(
                self.base,
                requests,
                self.decoding,
                tokens_per_pass=self.tokens,
                most_rows=self.config.batch_size,
                ends=self.ends,
                lora=together,
                on_rows=progress.advance,
            )
        how = {
            "answered_together": [str(name) for name in names],
            "base_identity": self.base.identity.record() if self.base.identity else None,
            "base_dtype": self.base.dtype_name,
            "device": str(self.base.device),
            "num_shortened": sum(prompt.num_removed > 0 for prompt in self.prompts),
            **({"stop_texts": list(self.ends.texts)} if self.ends.texts else {}),
            "seconds": round(time.monotonic() - began, 3),
        }
        size = len(self.prompts)
        parts = {name: found[index * size : (index + 1) * size] for index, name in enumerate(names)}
        texts = {name: [self.ends.cut(self.encoder.decode(answer)) for answer in part] for name, part in parts.items()}
        return Answers(texts, {name: sum(map(len, part)) for name, part in parts.items()}, how)
