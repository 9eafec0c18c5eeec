"""Configuration of the `generate` stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from fedlora.config.prompting import NamesTemplate, TemplateDate, TemplateKwargs
from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import OptionalFloat, OptionalInt, flag
from fedlora.config.train_fields import Precision
from fedlora.config.who import ROUNDS, WORDS, Subjects, WhichRound, contract_words, refuse_both


def _split_stops(value: Any) -> Any:
    """Accept texts with commas between them, line breaks as \\n, and `none` for no text."""
    if not isinstance(value, str):
        return value
    texts = [text.replace("\\n", "\n") for text in value.split(",") if text]
    return () if texts == ["none"] else tuple(texts) or None


Stops = Annotated[tuple[str, ...] | None, BeforeValidator(_split_stops)]


class GenerateConfig(ReadingConfig, NamesTemplate):
    """Answer every row of a test file with the base model, the global adapter or a client's."""

    exp_name: str = flag("fedavg-1B", "run whose adapters answer", everyday=True)
    of_subjects: Subjects = flag(None, f"who answers: {WORDS}", everyday=True, if_none="global")
    base_model: str = flag(
        "meta-llama/Llama-3.2-1B", "base model; of a run, where the base that it was trained on lies now", everyday=True
    )
    model_dir: Path = flag(Path("./models"), "root folder of all runs", everyday=True)
    is_global_model: bool = flag(True, "answer with the global adapter; false: with the one of client_id")
    client_id: int = flag(0, "number of the client whose adapter answers, where is_global_model is false", ge=0)
    communication_rounds: WhichRound = flag(
        None,
        f"round whose adapters answer: {ROUNDS}",
        everyday=True,
        if_none="the run's last; 20 for a base without a run",
    )
    test_file_path: Path = flag(
        Path("./data/dataset1/dolly_test_200.jsonl"),
        "rows to answer: a file, or a folder of clients' files",
        everyday=True,
    )
    prediction_dir: Path = flag(Path("./predictions"), "root folder of all predictions", everyday=True)
    batch_size: OptionalInt = flag(
        None, "most examples answered at once", ge=1, if_none="as many as tokens_per_pass allows"
    )
    tokens_per_pass: OptionalInt = flag(
        None, "most tokens held at once, answers included", ge=1, if_none="what fits into memory"
    )
    is_base_model: bool = flag(False, "answer with the untrained base model")
    all: bool = flag(False, "answer with base, global and every client's adapter, in one model load")

    preset: Literal["greedy", "reference"] = flag("greedy", "decoding; reference: the reference project's sampling")
    temperature: OptionalFloat = flag(
        None, "sampling temperature; 0 is greedy", everyday=True, ge=0, if_none="0; 0.1 with preset=reference"
    )
    top_p: OptionalFloat = flag(
        None, "nucleus sampling: probability mass", gt=0, le=1, if_none="1; 0.75 with preset=reference"
    )
    top_k: OptionalInt = flag(
        None, "sample among so many likeliest tokens; 0: all", ge=0, if_none="0; 50 with preset=reference"
    )
    repetition_penalty: OptionalFloat = flag(
        None, "penalty on tokens that were used; 1: none", gt=0, if_none="1; 1.1 with preset=reference"
    )
    max_new_tokens: int = flag(128, "longest answer, in tokens", everyday=True, ge=1)
    seed: int = flag(309, "seed of the sampling; every row has a random stream of its own", everyday=True, ge=0)

    prompt_template: str = flag(
        "auto",
        "prompt format: alpaca, chat or a Jinja file; auto: the one the run was trained with",
        everyday=True,
    )
    template_kwargs: TemplateKwargs = flag(
        {}, "what the chat template is given, such as enable_thinking=false", if_none="what the run gave it"
    )
    template_date: TemplateDate = flag(
        "", "date that a chat template inserts where it asks for today's", if_none="the run's"
    )
    stop: Stops = flag(
        None,
        "texts before which an answer ends, such as '\\n### Instruction:', or none",
        if_none="what the template would begin next; none with preset=reference",
    )
    cutoff_len: OptionalInt = flag(
        None, "longest prompt, in tokens; the answer comes on top", ge=8, if_none="the run's cutoff_len"
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>", everyday=True)
    base_dtype: Precision = flag(
        "auto", "number type of the frozen base model; auto: bfloat16 where the device multiplies it fast"
    )
    quantization: Literal["auto", "none", "int8", "nf4"] = flag("auto", "how the base is held; auto: as in training")
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")
    overwrite: bool = flag(False, "replace predictions that exist", everyday=True)

    @model_validator(mode="after")
    def _one_way_to_say_who(self) -> GenerateConfig:
        refuse_both(self, "of_subjects", "all", "is_base_model", "is_global_model", "client_id")
        if self.all and (self.is_base_model or not self.is_global_model or self.chosen("client_id")):
            raise ValueError("all answers with everyone: leave is_base_model, is_global_model and client_id alone")
        return self

    @model_validator(mode="after")
    def _stops_are_texts(self) -> GenerateConfig:
        if any(not text.strip() for text in self.stop or ()):
            raise ValueError("stop: an answer cannot end before an empty text")
        return self

    @property
    def stop_texts(self) -> tuple[str, ...] | None:
        """The texts that end an answer; None is what the template would begin next."""
        return () if self.stop is None and self.preset == "reference" else self.stop

    @property
    def words(self) -> tuple[str, ...]:
        """Who answers, as `of` has it."""
        if self.of_subjects is not None:
            return self.of_subjects
        if self.all:
            return ("all",)
        return contract_words(
            is_base_model=self.is_base_model, is_global_model=self.is_global_model, client_id=self.client_id
        )
