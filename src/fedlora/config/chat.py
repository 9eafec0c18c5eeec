"""Configuration of `chat`: who answers, how, and where a browser finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from fedlora.config.generate import GenerateConfig
from fedlora.config.prompting import NamesTemplate, TemplateKwargs
from fedlora.config.schema import OptionalInt, PathText, flag, place_of_base
from fedlora.config.train_fields import Precision
from fedlora.config.who import ROUNDS, WORDS, Subjects, WhichRound

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ChatConfig(NamesTemplate):
    """Ask the models of a run, side by side, in the terminal or in a browser (--web).

    Every model has its own conversation. /help in the terminal lists what can be changed while it runs.
    """

    exp_name: str = flag("fedavg-1B", "run whose models answer", everyday=True)
    of_subjects: Subjects = flag(
        None, f"who answers: {WORDS}", everyday=True, if_none="base and global; base and all clients without a global"
    )
    base_model: str = place_of_base(everyday=True)
    model_dir: Path = flag(Path("./models"), "root folder of all runs", everyday=True)
    communication_rounds: WhichRound = flag(
        None, f"round whose adapters answer: {ROUNDS}", everyday=True, if_none="the run's last"
    )

    system: str = flag("", "system prompt of every conversation", everyday=True, if_none="the template's own")
    prompt_template: str = flag(
        "auto", "prompt format: alpaca, chat or a Jinja file; auto: the one the run was trained with", everyday=True
    )
    template_kwargs: TemplateKwargs = flag(
        {}, "what the chat template is given, such as enable_thinking=false", if_none="what the run gave it"
    )
    temperature: float = flag(0.0, "sampling temperature; 0 is greedy", everyday=True, ge=0, allow_inf_nan=False)
    top_p: float = flag(1.0, "nucleus sampling: probability mass", gt=0, le=1)
    top_k: int = flag(0, "sample among so many likeliest tokens; 0: all", ge=0)
    repetition_penalty: float = flag(1.0, "penalty on tokens that were used; 1: none", gt=0, allow_inf_nan=False)
    max_new_tokens: int = flag(256, "longest answer, in tokens", everyday=True, ge=1)
    seed: int = flag(309, "seed of the sampling", ge=0)
    cutoff_len: OptionalInt = flag(
        2048, "longest prompt, in tokens; earlier turns are left out first", ge=8, if_none="the run's cutoff_len"
    )

    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>", everyday=True)
    base_dtype: Precision = flag(
        "auto", "number type of the frozen base model; auto: bfloat16 where the device multiplies it fast"
    )
    quantization: Literal["auto", "none", "int8", "nf4"] = flag("auto", "how the base is held; auto: as in training")
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")

    web: bool = flag(False, "serve a page for a browser instead; needs the extra ui", everyday=True)
    host: str = flag("127.0.0.1", "address that the page listens on; any but the loopback needs a password")
    port: int = flag(7860, "port of the page", ge=1, le=65535)
    password_file: PathText = flag(
        "", "file with the page's password, for the user fedlora", if_none="the variable FEDLORA_CHAT_PASSWORD, if set"
    )

    @model_validator(mode="after")
    def _page_flags_need_the_page(self) -> ChatConfig:
        if not self.web and (given := [name for name in ("host", "port", "password_file") if self.chosen(name)]):
            raise ValueError(f"{given[0]} is for the page in a browser: give web too")
        return self

    def generating(self, **changes: object) -> GenerateConfig:
        """How an answer is made, with `changes` of its fields."""
        names = ("exp_name", "model_dir", "communication_rounds", "prompt_template", "template_text", "template_kwargs")
        names += ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed", "cutoff_len")
        names += ("device", "base_dtype", "quantization", "trust_remote_code", "base_model")
        given = {name: getattr(self, name) for name in names if getattr(self, name) not in ("", {})}
        return GenerateConfig.of(**{**given, **changes})
