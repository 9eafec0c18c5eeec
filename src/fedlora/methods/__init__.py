"""One federated method per file, and what a method from outside is written with.

The public names are loaded when they are used: this package alone needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.federated.adapters import combine, weighted_mean
    from fedlora.methods.fedavg import FedAvg, TrainAndSend
    from fedlora.methods.row import Method, Option

_PLACES = {
    "FedAvg": "fedlora.methods.fedavg",
    "Method": "fedlora.methods.row",
    "Option": "fedlora.methods.row",
    "TrainAndSend": "fedlora.methods.fedavg",
    "combine": "fedlora.federated.adapters",
    "weighted_mean": "fedlora.federated.adapters",
}

__all__ = ["FedAvg", "Method", "Option", "TrainAndSend", "combine", "weighted_mean"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
