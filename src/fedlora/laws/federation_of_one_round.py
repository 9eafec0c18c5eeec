"""Rounds of a strategy without an engine: updates are given, the next state comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlora.types import AdapterState, ClientMemory, ClientUpdate, RoundContext

LAYERS = {"wide": (5, 9), "tall": (8, 3), "square": (6, 6), "thin": (4, 2), "low": (2, 7), "dot": (2, 2)}
"""Layer -> (d_out, d_in): wide, tall, square, and with inputs, outputs or both as few as its rank."""


def adapter(seed: int, rank: int = 2, *, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random factors for every layer."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, (d_out, d_in) in LAYERS.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=draw, dtype=dtype)
        state[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=draw, dtype=dtype)
    return state


def scalar(value: float) -> dict[str, torch.Tensor]:
    """An adapter of one number."""
    return {"one.lora_B.weight": torch.tensor([[value]], dtype=torch.float64)}


def update(client: int, sent: AdapterState, *, rows: int = 1, extra=None) -> ClientUpdate:
    return ClientUpdate("", 1, client, sent, ClientMemory(), rows, 1, 1, "", {}, extra or {})


def context(round_number: int = 1, clients: int = 8) -> RoundContext:
    return RoundContext(round_number, 0, tuple(range(clients)), tuple(range(clients)))


def aggregate(strategy, state, sent: Sequence[AdapterState], rows: Sequence[int] | None = None, round_number: int = 1):
    """One round: what the clients sent, weighted by their rows."""
    rows = rows or [1] * len(sent)
    updates = [update(client, one, rows=count) for client, (one, count) in enumerate(zip(sent, rows, strict=True))]
    return strategy.aggregate(state, updates, context(round_number, len(sent)))


def close(one: AdapterState, other: AdapterState, tolerance: float = 1e-10) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[key], other[key], rtol=0, atol=tolerance) for key in one
    )


def product(state: AdapterState, layer: str) -> torch.Tensor:
    return state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
