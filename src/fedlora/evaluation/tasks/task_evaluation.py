"""One task and one model: the library builds the prompts and scores what our engine answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.utils import handle_non_serializable  # pyright: ignore[reportMissingImports]

from fedlora.config.tasks import TasksConfig
from fedlora.errors import DataError, FedloraError, UsageError
from fedlora.evaluation.tasks.asked_model import AskedModel
from fedlora.evaluation.tasks.quiet_library import Quiet, seeded
from fedlora.evaluation.tasks.task_files import TaskItem, load_tasks
from fedlora.evaluation.tasks.task_scores import TaskScore, read_scores
from fedlora.plain_text import one_line
from fedlora.stopping import stop_if_asked


@dataclass(frozen=True)
class TaskResult:
    """What one model scored, and the library's line for every row and filter."""

    scores: Sequence[TaskScore]
    rows: str
    """JSON lines."""


def load_all(config: TasksConfig) -> list[TaskItem]:
    """The tasks that a configuration names, with their rows."""
    with Quiet(run_model_code=config.run_model_code), _seeds(config):
        return load_tasks(config.tasks, num_fewshot=config.num_fewshot)


def evaluate_task(config: TasksConfig, item: TaskItem, model: AskedModel, quiet: Quiet) -> TaskResult:
    """The scores of one model. Raises UsageError, DataError for what a task's own code cannot do."""
    fewshot_seed = config.seeds[2]
    with quiet, _seeds(config):
        for task in item.tasks.values():
            task.set_fewshot_seed(seed=fewshot_seed)
        try:
            limit: Any = config.limit
            found: Any = evaluate(
                lm=model,
                task_dict=item.loaded,
                limit=limit,
                bootstrap_iters=config.bootstrap_iters,
                system_instruction=config.system_instruction or None,
                apply_chat_template=config.chat_template,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                confirm_run_unsafe_code=config.run_model_code,
            )
        except FedloraError:
            raise
        except Exception as error:  # whatever a task's own code raises
            stop_if_asked()
            raise _explain(item, error) from error
    lines = [{"task": task, **sample} for task, samples in found["samples"].items() for sample in samples]
    rows = "".join(json.dumps(line, ensure_ascii=False, default=handle_non_serializable) + "\n" for line in lines)
    return TaskResult(tuple(read_scores(found)), rows)


def _seeds(config: TasksConfig) -> AbstractContextManager[None]:
    python, others, _ = config.seeds
    return seeded(python=python, others=others)


def _explain(item: TaskItem, error: Exception) -> FedloraError:
    reason = f"task {item.name}: {type(error).__name__}: {one_line(str(error))[:300]}"
    if any(getattr(task, "UNSAFE_CODE", False) for task in item.tasks.values()):
        hint = "it runs code that the model writes: give --run_model_code if this machine may run that"
        return UsageError(reason, hint=hint)
    return DataError(reason, hint="the task's own file or code fails on its rows, or its fewer than --num_fewshot rows")
