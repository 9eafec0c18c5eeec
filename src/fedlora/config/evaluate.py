"""Configurations of the two evaluations and the report."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import field_validator

from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Config, Names, OptionalInt, flag


class EvaluateRougeConfig(ReadingConfig):
    """Score predictions against the test file's answers with ROUGE and exact match."""

    exp_name: str = flag("fedavg-1B", "experiment whose predictions are scored")
    is_global_model: bool = flag(True, "score the global adapter's predictions; false: client_id's")
    client_id: int = flag(0, "whose predictions are scored when is_global_model is false", ge=0)
    is_base_model: bool = flag(False, "score the base model's predictions")
    communication_rounds: int = flag(20, "round of the predictions", ge=1)
    target_file: Path = flag(Path("./data/dataset1/dolly_test_200.jsonl"), "rows with the right answers")
    target_key: str = flag("output", "field of the right answer")
    prediction_dir: Path = flag(Path("./predictions"), "root of all predictions")
    prediction_key: str = flag("answer", "field of the prediction")
    evaluation_dir: Path = flag(Path("./evaluations_rouge"), "root of all ROUGE results")


class EvaluateLlmConfig(ReadingConfig):
    """Ask an OpenAI-compatible judge to compare our predictions with a baseline's, in both orders.

    The key comes from the environment (`api_key` or OPENAI_API_KEY) or from api_key_file, never from a flag.
    """

    exp_name: str = flag("fedavg-1B", "experiment of the baseline")
    is_global_model: bool = flag(True, "baseline: the global adapter's predictions; false: client_id's")
    client_id: int = flag(0, "whose predictions are the baseline when is_global_model is false", ge=0)
    is_base_model: bool = flag(False, "baseline: the base model's predictions")
    communication_rounds: int = flag(20, "round of the baseline", ge=1)
    proposed_file: Path = flag(
        Path("homo-1B/20/global_output.jsonl"), "our predictions, relative to prediction_dir unless absolute"
    )
    prediction_dir: Path = flag(Path("./predictions"), "root of all predictions")
    evaluation_dir: Path = flag(Path("./evaluations_llm"), "root of all judge results")
    target_file: Path | None = flag(None, "rows with reference answers, shown to the judge")
    target_key: str = flag("output", "field of the reference answer")
    prediction_key: str = flag("answer", "field of the prediction")
    gpt_model: str = flag("gpt-4.1", "the judge", min_length=1)
    base_url: str = flag("https://api.openai.com/v1", "endpoint of the judge; http:// only on this machine")
    api_key_file: Path | None = flag(None, "file that holds the key")
    batch_size: int = flag(20, "samples per request", ge=1, le=100)
    concurrency: int = flag(4, "requests in flight at once", ge=1, le=64)
    max_calls: OptionalInt = flag(None, "stop with exit code 8 rather than make more requests than this", ge=0)
    max_retries: int = flag(5, "retries of one request on 429, 5xx and timeouts", ge=0, le=20)
    timeout_seconds: float = flag(120.0, "of one request", gt=0)
    seed: int = flag(42, "seed of the delimiters that fence the answers", ge=0)
    overwrite: bool = flag(False, "forget stored verdicts and ask anew")

    @field_validator("base_url")
    @classmethod
    def _safe_address(cls, value: str) -> str:
        parts = urlsplit(value)
        # reading the port raises ValueError where it is none
        if not parts.hostname or parts.port == 0 or not value.isprintable():
            raise ValueError("needs a host, such as https://api.openai.com/v1")
        loopback = parts.hostname in {"localhost", "127.0.0.1", "::1"}
        if parts.username or parts.password:
            raise ValueError("no user name or password in the address; the key comes from the environment")
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise ValueError("must be https://, or http:// to this machine: the key would travel in the clear")
        return value.rstrip("/")

    @field_validator("target_file", "api_key_file", mode="before")
    @classmethod
    def _empty_path_is_none(cls, value: object) -> object:
        return None if value == "" else value


class ReportConfig(Config):
    """Tables and a plot over the modes of one set of experiments."""

    exp_names: Names = flag(("homo-1B", "seq-1B", "none-1B"), "experiments, comma separated")
    communication_rounds: int = flag(20, "round whose results are compared", ge=1)
    model_dir: Path = flag(Path("./models"), "root of all runs")
    prediction_dir: Path = flag(Path("./predictions"), "root of all predictions")
    rouge_dir: Path = flag(Path("./evaluations_rouge"), "root of all ROUGE results")
    llm_dir: Path = flag(Path("./evaluations_llm"), "root of all judge results")
    report_dir: Path = flag(Path("./reports"), "root of all reports")
    report_name: str = flag("report", "folder of this report under report_dir")
