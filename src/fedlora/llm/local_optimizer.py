"""The optimizer of a client's training, and its moments, which some methods keep between rounds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.config.train import TrainConfig

Moments = Mapping[str, Tensor]
"""`<key of a factor>:<name>` -> what AdamW keeps of it."""

_NAMES = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(
    config: TrainConfig, factors: Mapping[str, nn.Parameter], moments: Moments | None, device: torch.device
) -> torch.optim.Optimizer:
    """The configured optimizer over these factors; with moments it continues where they were read."""
    if config.local_optimizer == "sgd":
        return torch.optim.SGD(factors.values(), lr=config.local_learning_rate, weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(
        factors.values(),
        lr=config.local_learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not moments:
        return optimizer
    for key, factor in factors.items():
        optimizer.state[factor] = {name: moments[f"{key}:{name}"].to(device, copy=True) for name in _NAMES}
    return optimizer


def read_moments(factors: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Moments:
    """A copy on the CPU of what the optimizer keeps."""
    return {
        f"{key}:{name}": optimizer.state[factor][name].detach().to("cpu", copy=True)
        for key, factor in factors.items()
        for name in _NAMES
    }
