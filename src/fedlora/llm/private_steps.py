"""Example-level DP-SGD on the trained LoRA factors of one client (Abadi et al., CCS 2016, arXiv 1607.00133).

Every step takes each row with the same probability (a lot, perhaps empty), scales each row's gradient to a norm of at
most C over all trained factors together, adds noise once, and divides by the fixed size of a lot. A row's loss is the
mean over its own response tokens, so nothing of a row's gradient depends on who else is in the lot. Each row of a pass
gets copies of the factors, equal in value; their gradients are the rows' own, whatever the base layer is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora.config.train import TrainConfig
from fedlora.federated.privacy.budget import count_lots, lot_rate
from fedlora.federated.privacy.randomness import Secret
from fedlora.llm.dropout import drop
from fedlora.llm.examples import Example
from fedlora.llm.lora import LoraLinear, LoraModel

GRADIENT_BYTES = 256_000_000
"""Most that the rows of one pass may take with gradients of their own; a pass holds one row at least."""


class PrivateSteps:
    """The steps of one client in one round; `factors` are those that are trained, by PEFT key.

    Raises ValueError without the secret that lots and noise are drawn from: the public seed would hide nothing.
    """

    def __init__(
        self,
        lora: LoraModel,
        factors: Mapping[str, nn.Parameter],
        config: TrainConfig,
        secret: Secret | None,
        *,
        round_number: int,
        client_id: int,
    ) -> None:
        if secret is None or config.dp_example_clip is None or config.dp_example_noise_multiplier is None:
            raise ValueError("private steps need a clip, a noise multiplier and the run's secret")
        self._lora = lora
        self._factors = factors
        self._clip = config.dp_example_clip
        self._noise = config.dp_example_noise_multiplier * config.dp_example_clip
        self._lot_size = config.local_batch_size
        self._epochs = config.local_num_epochs
        self._secret = secret
        self._place = (round_number, client_id)
        self._denominator = float(self._lot_size)
        self.most_rows = max(1, GRADIENT_BYTES // (4 * sum(factor.numel() for factor in factors.values())))

    def draw_lots(self, examples: Sequence[Example]) -> list[list[Example]]:
        """As many lots as plain training has steps; each row is in each with probability lot size / rows."""
        rate = lot_rate(len(examples), self._lot_size)
        self._denominator = rate * len(examples)
        return [
            [
                example
                for index, example in enumerate(examples)
                if self._secret.uniform("lot", *self._place, step, index) < rate
            ]
            for step in range(count_lots(len(examples), self._lot_size, self._epochs))
        ]

    def draw_seeds(self, count: int, step: int) -> list[int]:
        """What the dropout of each example of a lot is drawn from: the secret.

        An example's place in a lot depends on the others in it. Under dropout that others can compute, one example
        more would change the gradients of all that follow, and by more than C.
        """
        return [self._secret.integer("dropout", *self._place, step, row) for row in range(count)]

    def add_clipped(self, rows: Sequence[Example], backward: Callable[[], Tensor]) -> Tensor:
        """Add the clipped gradients of one pass to the factors'; `backward` runs the pass and returns its loss ()."""
        copies = [_Copies(layer, len(rows), self._factors.values()) for layer in self._lora.layers.values()]
        try:
            loss = backward()
        finally:
            for copy in copies:
                copy.layer.instead = None
        own = [pair for copy in copies for pair in copy.gradients()]
        labels = torch.tensor([example.num_labels for example in rows], dtype=torch.float64, device=loss.device)
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for _, g in own])
        norms = torch.linalg.vector_norm(norms, dim=0) / labels
        weights = (self._clip / norms.clamp(min=self._clip) / labels).float()
        for factor, gradient in own:
            clipped = torch.tensordot(weights, gradient, dims=1)
            factor.grad = clipped if factor.grad is None else factor.grad.add_(clipped)
        return loss

    def add_noise(self, step: int) -> None:
        """Finish a step: `(sum of clipped gradients + noise) / lot size` in the factors' gradients."""
        for index, factor in enumerate(self._factors.values()):
            total = torch.zeros_like(factor) if factor.grad is None else factor.grad
            if self._noise:
                noise = self._secret.normal(factor.shape, "example_noise", *self._place, step, index)
                total = total + (self._noise * noise).to(total.device, total.dtype)
            factor.grad = total / self._denominator


class _Copies:
    """One layer's factors, once for every row of a pass: a (rows, r, d_in), b (rows, d_out, r)."""

    def __init__(self, layer: LoraLinear, rows: int, trained: Iterable[nn.Parameter]) -> None:
        ids = {id(factor) for factor in trained}
        self.layer = layer
        self.a, self.b = (
            factor.detach().expand(rows, -1, -1).requires_grad_(id(factor) in ids) for factor in (layer.a, layer.b)
        )
        layer.instead = self

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or len(x) != len(self.a):
            raise ValueError(f"a layer sees {tuple(x.shape)}, not the {len(self.a)} rows of its pass one by one")
        layer = self.layer
        kept, scaling = layer.draw_dropout(x)
        seen = x if kept is None else drop(x, kept)
        low = seen @ self.a.to(x.dtype).transpose(1, 2)
        return layer.background.add_to(layer.base(x), x) + scaling * (low @ self.b.to(x.dtype).transpose(1, 2))

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Factor and the rows' own gradients (rows, *shape) of each that is trained."""
        pairs = ((self.layer.a, self.a), (self.layer.b, self.b))
        return [(factor, copy.grad) for factor, copy in pairs if copy.grad is not None]
