"""FedRot-LoRA: clients turn their factors towards the server's before they are averaged (arXiv 2602.23638).

`(B R)(R^T A)` is the same update for any rotation R, but the mean of factors is not the same mean. In odd rounds R
brings A next to the server's A, in even rounds B next to its B: `R` is the rotation that minimises the distance
(orthogonal Procrustes, determinant 1). With `rotation_strength` below 1 the rotation is mixed with the identity and
made one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.federated.adapters import layer_pairs
from fedlora.methods.fedavg import FedAvg, TrainAndSend
from fedlora.types import AdapterState, ClientId, ClientMemory, Download, LocalResult, ServerState, Upload

ALIGN = {"A": "align_a", "B": "align_b"}
"""Names by which the server says which factor is aligned with its own."""


@dataclass(frozen=True)
class FedRot(FedAvg):
    """Server half: FedAvg, and which factor is aligned in this round."""

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return Download(state.adapter, extra={ALIGN["A" if round_number % 2 else "B"]: {}})


@dataclass(frozen=True)
class RotateAndSend(TrainAndSend):
    """Client half: the trained factors, turned; their product is what it was."""

    rotation_strength: float = 0.5

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        aligns_a = ALIGN["A"] in download.extra
        turned = align_factors(results[0].adapter, download.adapter, by_a=aligns_a, strength=self.rotation_strength)
        return super().upload([LocalResult(turned)], download, memory)


def align_factors(state: AdapterState, reference: AdapterState, *, by_a: bool, strength: float) -> AdapterState:
    """Every layer's `B R` and `R^T A` with R turning A (or B) of `state` towards the reference's."""
    result = dict(state)
    for a_key, b_key in layer_pairs(state).values():
        a, b = state[a_key].to(torch.float64), state[b_key].to(torch.float64)
        match = a @ reference[a_key].to(torch.float64).T if by_a else b.T @ reference[b_key].to(torch.float64)
        if not bool(match.any()):
            continue
        rotation = _mix(_nearest_rotation(match), strength)
        result[a_key] = (rotation.T @ a).to(state[a_key].dtype).contiguous()
        result[b_key] = (b @ rotation).to(state[b_key].dtype).contiguous()
    return result


def _nearest_rotation(match: Tensor) -> Tensor:
    """The rotation R of determinant 1 with the largest `trace(R^T match)`; match: (r, r)."""
    u, _, vh = torch.linalg.svd(match)
    signs = torch.ones(match.shape[0], dtype=match.dtype)
    signs[-1] = torch.det(u @ vh).sign()
    return (u * signs) @ vh


def _mix(rotation: Tensor, strength: float) -> Tensor:
    identity = torch.eye(rotation.shape[0], dtype=rotation.dtype)
    return _nearest_rotation(strength * rotation + (1 - strength) * identity)
