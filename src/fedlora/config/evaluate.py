"""Configurations of the two evaluations and the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

from fedlora.config.judge_address import check_address, check_query
from fedlora.config.judge_models import JudgeNames, JudgePrices, check_prices, judges_at_endpoint, split_judges
from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Config, Names, OptionalFloat, OptionalInt, Pairs, flag
from fedlora.config.train_fields import Precision
from fedlora.config.who import ROUNDS, WORDS, LastRound, Subjects, WhichRound, contract_words, refuse_both

RougeTokenizer = Literal["ascii", "unicode"]

_LAST = "the last that holds the predictions"
_BASELINE = ("is_base_model", "is_global_model", "client_id")
_MODEL_DIR = "root folder of all runs, where names of clients and the best round are looked up"

_OF_LOCAL_JUDGES = ("device", "base_dtype")
_OF_ENDPOINTS = (
    *("base_url", "judge_query", "allow_plain_http", "api_key_file", "batch_size", "concurrency", "max_calls"),
    *("max_cost", "judge_price_in", "judge_price_out", "judge_max_tokens", "max_retries", "timeout_seconds", "seed"),
    *("reasons", "repeats", "batch"),
)


class EvaluateRougeConfig(ReadingConfig):
    """Score predictions against the test file's answers with exact match and ROUGE."""

    exp_name: str = flag("fedavg-1B", "run whose predictions are scored", everyday=True)
    of_subjects: Subjects = flag(None, f"whose predictions: {WORDS}", everyday=True, if_none="global")
    is_global_model: bool = flag(True, "score the global adapter's predictions; false: those of client_id")
    client_id: int = flag(0, "number of the client that is scored, where is_global_model is false", ge=0)
    is_base_model: bool = flag(False, "score the base model's predictions")
    communication_rounds: WhichRound = flag(None, f"round of the predictions: {ROUNDS}", everyday=True, if_none=_LAST)
    target_file: Path = flag(
        Path("./data/dataset1/dolly_test_200.jsonl"),
        "rows with the reference answers: a file, or a folder of clients' files",
        everyday=True,
    )
    target_key: str = flag("output", "field of the reference answer; unless it is given, response is taken too")
    prediction_dir: Path = flag(Path("./predictions"), "root folder of all predictions", everyday=True)
    prediction_key: str = flag("answer", "field of the prediction")
    evaluation_dir: Path = flag(Path("./evaluations_rouge"), "root folder of all ROUGE results", everyday=True)
    rouge_tokenizer: RougeTokenizer = flag(
        "ascii",
        "words of ROUGE; ascii: a to z and 0 to 9, as rouge-score; unicode: words of any script, and the characters of "
        "Chinese, Japanese, Thai, Khmer and the like",
        everyday=True,
    )
    model_dir: Path = flag(Path("./models"), _MODEL_DIR, everyday=True)

    @model_validator(mode="after")
    def _one_way_to_say_who(self) -> EvaluateRougeConfig:
        refuse_both(self, "of_subjects", "is_base_model", "is_global_model", "client_id")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """Whose predictions are scored, as `of` has it."""
        return self.of_subjects or contract_words(
            is_base_model=self.is_base_model, is_global_model=self.is_global_model, client_id=self.client_id
        )


class EvaluateLlmConfig(ReadingConfig):
    """Ask an OpenAI-compatible judge to compare predictions with a baseline's, in both orders.

    The key comes from the environment (`api_key` or OPENAI_API_KEY) or from api_key_file, never from a flag.
    """

    exp_name: str = flag("fedavg-1B", "run whose predictions are compared", everyday=True)
    of_subjects: Subjects = flag(
        None, f"who is judged: {WORDS}", everyday=True, if_none="global with against; else proposed_file"
    )
    against_subjects: Subjects = flag(
        None,
        "the baseline, as in of",
        everyday=True,
        if_none="base with of; else is_base_model, is_global_model and client_id choose",
    )
    is_global_model: bool = flag(True, "baseline: the global adapter's predictions; false: those of client_id")
    client_id: int = flag(0, "number of the baseline client, where is_global_model is false", ge=0)
    is_base_model: bool = flag(False, "baseline: the base model's predictions")
    communication_rounds: WhichRound = flag(None, f"round of the predictions: {ROUNDS}", everyday=True, if_none=_LAST)
    proposed_file: Path = flag(
        Path("homo-1B/20/global_output.jsonl"),
        "predictions that are judged: a file below prediction_dir, or a path from here",
    )
    prediction_dir: Path = flag(Path("./predictions"), "root folder of all predictions", everyday=True)
    evaluation_dir: Path = flag(Path("./evaluations_llm"), "root folder of all judge results", everyday=True)
    model_dir: Path = flag(Path("./models"), _MODEL_DIR, everyday=True)
    target_file: Path | None = flag(
        None,
        "rows with reference answers, shown to the judge: a file, or a folder of clients' files",
        everyday=True,
        if_none="the judge sees no reference",
    )
    target_key: str = flag("output", "field of the reference answer; unless it is given, response is taken too")
    prediction_key: str = flag("answer", "field of the prediction")
    gpt_model: JudgeNames = flag(
        "gpt-4.1",
        "model that judges, or several with commas, whose majority is the result; local:<model> is a base model on "
        "this machine, of which the probabilities of the verdicts are compared",
        everyday=True,
        min_length=1,
    )
    repeats: int = flag(
        1, "times that each judge at an endpoint is asked about a sample in each order, 1 to 20", ge=1, le=20
    )
    batch: bool = flag(
        False,
        "hand the requests to the endpoint's Batch API and end with exit code 9; the same command collects the replies "
        "later",
    )
    allow_plain_http: bool = flag(
        False,
        "allow http:// to an address of a private network: the key and all rows travel there unencrypted, and others "
        "on that network can read them",
    )
    base_url: str = flag(
        "https://api.openai.com/v1",
        "OpenAI-compatible endpoint; http:// only on this machine, or with allow_plain_http",
        everyday=True,
    )
    judge_query: Pairs = flag({}, "query after the address, such as api-version=2024-10-21", if_none="nothing")
    api_key_file: Path | None = flag(
        None, "file that holds the key", everyday=True, if_none="the environment has the key"
    )
    batch_size: int = flag(20, "samples per request, 1 to 100", ge=1, le=100)
    concurrency: int = flag(4, "requests in flight at once, 1 to 64", ge=1, le=64)
    max_calls: OptionalInt = flag(
        None,
        "most requests of all judges; with more to make, stop with exit code 8",
        everyday=True,
        ge=0,
        if_none="no limit",
    )
    max_cost: OptionalFloat = flag(
        None,
        "most that the requests of all judges may cost, in the currency of the prices; with more to make, stop with "
        "exit code 8",
        everyday=True,
        ge=0,
        if_none="no limit",
    )
    judge_price_in: JudgePrices = flag(
        None, "price of a million tokens that a judge reads: one, or one for each judge", if_none="no cost is computed"
    )
    judge_price_out: JudgePrices = flag(
        None, "price of a million tokens that a judge writes: one, or one for each judge", if_none="no cost is computed"
    )
    judge_max_tokens: OptionalInt = flag(
        None,
        "most tokens of one reply, thoughts included",
        ge=1,
        if_none="with max_cost 4096 and 64 for each sample of a request, else the endpoint's own limit",
    )
    reasons: bool = flag(
        False, "ask for a sentence of reasons with each verdict, which costs more tokens; shown beside the texts"
    )
    allow_partial: bool = flag(
        False, "write a result of less than 95 % of the samples, and continue after replies that cannot be used"
    )
    max_retries: int = flag(5, "retries of one request on 429, 5xx and timeouts", ge=0, le=20)
    timeout_seconds: float = flag(120.0, "timeout of one request, in seconds", gt=0)
    seed: int = flag(42, "seed of the delimiters around the answers", ge=0)
    overwrite: bool = flag(False, "forget stored verdicts and ask again", everyday=True)
    device: str = flag("auto", "device of a local judge: auto, cpu, cuda or cuda:<n>")
    base_dtype: Precision = flag(
        "auto", "number type of a local judge; auto: bfloat16 where the device multiplies it fast"
    )

    @model_validator(mode="after")
    def _one_way_to_say_who(self) -> EvaluateLlmConfig:
        refuse_both(self, "of_subjects", "proposed_file")
        refuse_both(self, "against_subjects", *_BASELINE)
        return self

    @model_validator(mode="after")
    def _prices_of_a_limit(self) -> EvaluateLlmConfig:
        check_prices(self.judge_price_in, self.judge_price_out, self.gpt_model)
        if self.max_cost is not None and self.judge_price_in is None:
            raise ValueError(f"max_cost={self.max_cost:g} needs judge_price_in and judge_price_out")
        return self

    @model_validator(mode="after")
    def _only_what_these_judges_have(self) -> EvaluateLlmConfig:
        at_endpoint = len(judges_at_endpoint(self.gpt_model))
        absent = () if at_endpoint else _OF_ENDPOINTS
        absent += _OF_LOCAL_JUDGES if at_endpoint == len(self.judges) else ()
        # a script names them all, with their defaults
        fields = EvaluateLlmConfig.model_fields
        if given := [name for name in absent if getattr(self, name) != fields[name].default]:
            kind = "an endpoint" if at_endpoint else "a local judge"
            raise ValueError(f"{given[0]} is not supported with {kind} (gpt_model={self.gpt_model!r})")
        return self

    @property
    def judges(self) -> tuple[str, ...]:
        """The models that judge; `local:` begins those on this machine."""
        return split_judges(self.gpt_model)

    @property
    def by_contract(self) -> bool:
        """Whether the pair is named by the reference project's flags alone."""
        return self.of_subjects is None and self.against_subjects is None

    @property
    def proposed_words(self) -> tuple[str, ...] | None:
        """Who is judged, as `of` has it; None where proposed_file says it."""
        if self.of_subjects is None and self.against_subjects is not None and not self.chosen("proposed_file"):
            return ("global",)
        return self.of_subjects

    @property
    def baseline_words(self) -> tuple[str, ...]:
        """The baselines, as `against` has it."""
        if self.against_subjects is not None:
            return self.against_subjects
        if self.of_subjects is not None and not any(map(self.chosen, _BASELINE)):
            return ("base",)
        return contract_words(
            is_base_model=self.is_base_model, is_global_model=self.is_global_model, client_id=self.client_id
        )

    @field_validator("base_url")
    @classmethod
    def _safe_address(cls, value: str, info: ValidationInfo) -> str:
        return check_address(value, allow_plain_http=bool(info.data.get("allow_plain_http")))

    @field_validator("judge_query")
    @classmethod
    def _no_secret_in_the_address(cls, value: dict[str, str]) -> dict[str, str]:
        check_query(value)
        return value

    @field_validator("max_cost")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @field_validator("target_file", "api_key_file", mode="before")
    @classmethod
    def _empty_path_is_none(cls, value: object) -> object:
        return None if value == "" else value


class ReportConfig(Config):
    """Put runs side by side: tables and plots over methods that share data and rounds."""

    exp_names: Names = flag(("homo-1B", "seq-1B", "none-1B"), "runs, comma separated")
    communication_rounds: LastRound = flag(
        None, "round whose results are compared: a number or last", if_none="the last that has scores"
    )
    model_dir: Path = flag(Path("./models"), "root folder of all runs")
    prediction_dir: Path = flag(Path("./predictions"), "root folder of all predictions")
    rouge_dir: Path = flag(Path("./evaluations_rouge"), "root folder of all ROUGE results")
    llm_dir: Path = flag(Path("./evaluations_llm"), "root folder of all judge results")
    tasks_dir: Path = flag(Path("./evaluations_tasks"), "root folder of all results of tasks")
    report_dir: Path = flag(Path("./reports"), "root folder of all reports")
    noiseless_metrics: bool = flag(
        False, "show private metrics of runs with privacy flags too: they carry no noise and are not in epsilon"
    )
    report_name: str = flag("report", "folder of this report under report_dir")
