"""How lm-evaluation-harness is kept to itself.

It prints, draws bars, starts processes and draws from Python's and numpy's global random states. Inside these contexts
none of that reaches a caller.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch

_NO_PROCESSES = "DISABLE_MULTIPROC"
_RUN_CODE = "HF_ALLOW_CODE_EVAL"


class Quiet:
    """Inside, nothing of the library is shown; within `aloud` our own lines are."""

    def __init__(self, *, run_model_code: bool = False) -> None:
        """`run_model_code` lets metrics run the code that a model writes."""
        self._run_model_code = run_model_code
        self._stack = contextlib.ExitStack()
        self._shown = sys.stderr

    def __enter__(self) -> Quiet:
        self._shown = sys.stderr
        nowhere = io.StringIO()
        self._stack.enter_context(contextlib.redirect_stdout(nowhere))
        self._stack.enter_context(contextlib.redirect_stderr(nowhere))
        for name in ("lm_eval", "datasets", "huggingface_hub"):
            self._stack.enter_context(_silenced(logging.getLogger(name)))
        # its bootstrap forks a process for each core, which threads of torch do not survive
        self._stack.enter_context(_set_variable(_NO_PROCESSES, "1"))
        if self._run_model_code:
            self._stack.enter_context(_set_variable(_RUN_CODE, "1"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def aloud(self) -> contextlib.AbstractContextManager[object]:
        """Inside, standard error is what it was."""
        return contextlib.redirect_stderr(self._shown)


@contextlib.contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _set_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def seeded(*, python: int, others: int) -> Iterator[None]:
    """Inside, the global random states that tasks draw from are seeded; afterwards they are what they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(python)
    np.random.seed(others)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(others)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
