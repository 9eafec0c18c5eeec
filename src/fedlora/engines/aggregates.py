"""Check the server's result of a round before it is committed."""

from __future__ import annotations

from fedlora.errors import TrainingError
from fedlora.federated.validation import find_not_finite
from fedlora.types import AdapterState, ServerState


def check_finite(round_number: int, adapter: AdapterState, state: ServerState) -> None:
    """TrainingError when NaN or infinity is in the global adapter, the server's state or what it added to the base: no
    later round could use it."""
    added = state.base.background if state.base is not None else {}
    groups = (adapter, state.adapter, *state.slots.values(), added)
    key = next((key for group in groups if (key := find_not_finite(group)) is not None), None)
    if key is not None:
        raise TrainingError(
            f"round {round_number}: what the server made of the updates is not finite ({key})",
            hint="the rounds before it are intact; a new run may need a lower --server_learning_rate, or "
            "--max_update_norm with --norm_action quarantine",
        )
