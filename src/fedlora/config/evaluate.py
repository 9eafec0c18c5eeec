"""Configurations of the two evaluations and the report."""

from __future__ import annotations

import ipaddress
import math
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import ValidationInfo, field_validator, model_validator

from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Config, Names, OptionalFloat, OptionalInt, Pairs, flag
from fedlora.config.train_fields import Precision
from fedlora.config.who import ROUNDS, WORDS, LastRound, Subjects, WhichRound, contract_words, refuse_both

RougeTokenizer = Literal["ascii", "unicode"]

_LAST = "the last that holds the predictions"
_BASELINE = ("is_base_model", "is_global_model", "client_id")
_MODEL_DIR = "root folder of all runs, where names of clients and the best round are looked up"


_LOCAL = "local:"
_OF_LOCAL_JUDGES = ("device", "base_dtype")
_OF_ENDPOINTS = (
    *("base_url", "judge_query", "allow_plain_http", "api_key_file", "batch_size", "concurrency", "max_calls"),
    *("max_cost", "judge_price_in", "judge_price_out", "judge_max_tokens", "max_retries", "timeout_seconds", "seed"),
    "reasons",
)
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_PRIVATE_NAMES = (".local", ".lan", ".internal", ".home.arpa")
"""Endings that no public name has."""
_LIKE_A_SECRET = re.compile(r"key|token|secret|password|signature|\bsig\b", re.IGNORECASE)


def _is_private(host: str) -> bool:
    """Whether a host is in a private network: by its address, or by a name that no public one has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_NAMES)
    return address.is_private and not address.is_unspecified and not address.is_reserved


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
    gpt_model: str = flag(
        "gpt-4.1",
        "model that judges; local:<model> is a base model on this machine, of which the probabilities of the verdicts "
        "are compared",
        everyday=True,
        min_length=1,
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
        None, "most requests; with more to make, stop with exit code 8", everyday=True, ge=0, if_none="no limit"
    )
    max_cost: OptionalFloat = flag(
        None,
        "most that the requests may cost, in the currency of the prices; with more to make, stop with exit code 8",
        everyday=True,
        ge=0,
        if_none="no limit",
    )
    judge_price_in: OptionalFloat = flag(
        None, "price of a million tokens that the judge reads", ge=0, if_none="no cost is computed"
    )
    judge_price_out: OptionalFloat = flag(
        None, "price of a million tokens that the judge writes", ge=0, if_none="no cost is computed"
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
        if (self.judge_price_in is None) != (self.judge_price_out is None):
            raise ValueError("give judge_price_in and judge_price_out, or neither")
        if self.max_cost is not None and self.judge_price_in is None:
            raise ValueError(f"max_cost={self.max_cost:g} needs judge_price_in and judge_price_out")
        return self

    @model_validator(mode="after")
    def _only_what_this_judge_has(self) -> EvaluateLlmConfig:
        if self.gpt_model == _LOCAL:
            raise ValueError(f"gpt_model={_LOCAL!r}: name a model, such as local:smollm2-135m")
        others, kind = (_OF_ENDPOINTS, "a local judge") if self.local_judge else (_OF_LOCAL_JUDGES, "an endpoint")
        # a script names them all, with their defaults
        fields = EvaluateLlmConfig.model_fields
        if given := [name for name in others if getattr(self, name) != fields[name].default]:
            raise ValueError(f"{given[0]} is not supported with {kind} (gpt_model={self.gpt_model!r})")
        return self

    @property
    def local_judge(self) -> str | None:
        """The base model that judges on this machine; None where an endpoint does."""
        return self.gpt_model.removeprefix(_LOCAL) if self.gpt_model.startswith(_LOCAL) else None

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
        parts = urlsplit(value)
        # reading the port raises ValueError where it is none
        if not parts.hostname or parts.port == 0 or not value.isprintable():
            raise ValueError("needs a host, such as https://api.openai.com/v1")
        may_be_plain = parts.hostname in _THIS_MACHINE or (
            bool(info.data.get("allow_plain_http")) and _is_private(parts.hostname)
        )
        if parts.username or parts.password:
            raise ValueError("no user name or password in the address; the key comes from the environment")
        if parts.query or parts.fragment:
            raise ValueError("takes no query; give what stands after the ? with judge_query")
        if parts.scheme != "https" and not (parts.scheme == "http" and may_be_plain):
            raise ValueError(
                "must be https://, or http:// to this machine: the key would travel in the clear; for an address of a "
                "private network there is allow_plain_http"
            )
        return value.rstrip("/")

    @field_validator("judge_query")
    @classmethod
    def _no_secret_in_the_address(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if _LIKE_A_SECRET.search(name):
                raise ValueError(f"{name}: addresses are logged on their way; the key comes from the environment")
        return value

    @field_validator("max_cost", "judge_price_in", "judge_price_out")
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
    report_dir: Path = flag(Path("./reports"), "root folder of all reports")
    report_name: str = flag("report", "folder of this report under report_dir")
