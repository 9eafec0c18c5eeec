"""Federated LoRA fine-tuning of language models, simulated on one machine or run across many.

    import fedlora as fl

    run = fl.train(data="silos", model="smollm2-135m", rounds=3, client_fraction=1)

Every function takes the flags of its command as keywords, runs the same stage and leaves the same files as the command
line. The public names are those of `__all__`. Each is loaded when it is first used: torch is imported when something
needs it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora import errors
    from fedlora.api.answers import Answers, generate, judge, loss, score, tasks
    from fedlora.api.checks import check_method
    from fedlora.api.looking import compare, export, import_adapter, open, reaggregate, report, runs, track, verify  # noqa: A004
    from fedlora.api.preparing import allocate, plan, silos
    from fedlora.api.run import Round, Run
    from fedlora.api.talking import chat
    from fedlora.api.training import rounds, train
    from fedlora.stages.score import Scores

__version__ = "0.1.0"

__all__ = [
    "Answers",
    "Round",
    "Run",
    "Scores",
    "allocate",
    "chat",
    "check_method",
    "compare",
    "errors",
    "export",
    "generate",
    "import_adapter",
    "judge",
    "loss",
    "open",
    "plan",
    "reaggregate",
    "report",
    "rounds",
    "runs",
    "score",
    "silos",
    "tasks",
    "track",
    "train",
    "verify",
]

_PLACES = MappingProxyType(
    {
        **dict.fromkeys(("Answers", "generate", "judge", "loss", "score", "tasks"), "fedlora.api.answers"),
        "Scores": "fedlora.stages.score",
        "check_method": "fedlora.api.checks",
        **dict.fromkeys(
            ("compare", "export", "import_adapter", "open", "reaggregate", "report", "runs", "track", "verify"),
            "fedlora.api.looking",
        ),
        **dict.fromkeys(("allocate", "plan", "silos"), "fedlora.api.preparing"),
        **dict.fromkeys(("Round", "Run"), "fedlora.api.run"),
        "chat": "fedlora.api.talking",
        **dict.fromkeys(("rounds", "train"), "fedlora.api.training"),
    }
)
"""Public name -> the module that has it."""


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name in __all__:
        return import_module(f"fedlora.{name}")
    raise AttributeError(f"module 'fedlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, with the function `runs` under a name that its subpackage `fedlora.runs` has too.

    Importing a module of the subpackage sets the attribute; it keeps its meaning.
    """

    @property
    def runs(self) -> Any:
        return __getattr__("runs")

    @runs.setter
    def runs(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
