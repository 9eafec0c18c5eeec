"""Configuration of the `tasks` stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from fedlora.config.schema import Config, Names, OptionalFloat, OptionalInt, flag, place_of_base
from fedlora.config.train_fields import Precision
from fedlora.config.who import ROUNDS, WORDS, Subjects, WhichRound

LIBRARY_SEEDS = (0, 1234, 1234)
"""lm-eval's own: of Python's random numbers, of numpy's and torch's, and of the examples before a question."""


class TasksConfig(Config):
    """Measure the base model, the global adapter or a client's on standard tasks of lm-evaluation-harness.

    Prompts and scores are the library's, log-probabilities and answers those of the engine that trains: one base in
    memory, adapters swapped in it or answering side by side. Each score has the library's standard error.
    """

    exp_name: str = flag("fedavg-1B", "run whose adapters are measured", everyday=True)
    tasks: Names = flag(
        (),
        "tasks, groups or tags by lm-eval's names, YAML files of tasks or folders of them; a task file may name Python "
        "functions, which then run",
        everyday=True,
    )
    of_subjects: Subjects = flag(None, f"who is measured: {WORDS}", everyday=True, if_none="base,global")
    communication_rounds: WhichRound = flag(
        None, f"round whose adapters are measured: {ROUNDS}", everyday=True, if_none="the run's last"
    )
    base_model: str = place_of_base(everyday=True)
    model_dir: Path = flag(Path("./models"), "root folder of all runs", everyday=True)
    evaluation_dir: Path = flag(Path("./evaluations_tasks"), "root folder of all results of tasks", everyday=True)
    num_fewshot: OptionalInt = flag(
        None, "examples before each question; a task that says 0 keeps it", everyday=True, ge=0, if_none="the task's"
    )
    limit: OptionalFloat = flag(
        None, "first rows of each task, or a share of them below 1: to try a task", everyday=True, gt=0, if_none="all"
    )
    seed: OptionalInt = flag(
        None, "seed of everything that a task draws", ge=0, if_none="lm-eval's, 1234 for the examples before a question"
    )
    chat_template: bool = flag(
        False, "frame prompts by the tokenizer's chat template, as lm-eval's apply_chat_template", everyday=True
    )
    system_instruction: str = flag("", "system prompt before each question", if_none="none")
    fewshot_as_multiturn: bool = flag(True, "with chat_template: examples as turns of a conversation, not as one text")
    max_length: OptionalInt = flag(
        None, "longest context and continuation, in tokens; contexts are cut from the left", ge=2, if_none="the base's"
    )
    bootstrap_iters: int = flag(
        1000, "resamples for standard errors that have no formula; 0: none. lm-eval takes 100000", ge=0
    )
    run_model_code: bool = flag(
        False, "let tasks such as humaneval run the code that a model writes; only this flag can allow it"
    )
    batch_size: OptionalInt = flag(
        None, "most prompts answered at once", ge=1, if_none="as many as tokens_per_pass allows"
    )
    tokens_per_pass: OptionalInt = flag(None, "most tokens held at once", ge=1, if_none="what fits into memory")
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>", everyday=True)
    base_dtype: Precision = flag(
        "auto", "number type of the frozen base model; auto: bfloat16 where the device multiplies it fast"
    )
    quantization: Literal["auto", "none", "int8", "nf4"] = flag("auto", "how the base is held; auto: as in training")
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")
    overwrite: bool = flag(False, "measure again and replace results that exist", everyday=True)

    @field_validator("tasks")
    @classmethod
    def _some_task(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("limit")
    @classmethod
    def _whole_or_share(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("a number of rows, or a share below 1")
        return value

    @property
    def words(self) -> tuple[str, ...]:
        """Who is measured."""
        return self.of_subjects or ("base", "global")

    @property
    def seeds(self) -> tuple[int, int, int]:
        """Of Python's random numbers, of numpy's and torch's, and of the examples before a question."""
        return LIBRARY_SEEDS if self.seed is None else (self.seed, self.seed, self.seed)
