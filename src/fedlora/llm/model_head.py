"""What stands between a model's hidden states and its logits, as its own code has it: scales, soft caps, layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def find_decoder(model: Any) -> str:
    """The name of the part of a model that holds its input embedding; empty where the model itself holds it."""
    embedding = model.get_input_embeddings()
    return next((name for name, part in model.named_children() if any(embedding is one for one in part.modules())), "")


def logits_of(model: Any, decoder: str, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary) of hidden states (n, d): the model's own forward pass, after its decoder."""
    # the copy shares every part with the model; its table of parts is its own
    head = copy.copy(model)
    head._modules = {**model._modules, decoder: _Given()}
    return head(inputs_embeds=hidden[None], use_cache=False).logits[0]


class _Given(nn.Module):
    """Takes the decoder's place and answers with the states that it gets as embeddings."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _States(inputs_embeds)


class _States:
    """A decoder's output with nothing in it but the hidden states."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
