"""Private metrics: numbers of a client's own test rows under the base, the global adapter and its own.

A simulation and a node call the same function, so both give the same numbers. What leaves it is what
`evaluation/private_numbers.py` lets out: means, standard errors and counts, and nothing of too few rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedlora.config.train import TrainConfig
from fedlora.console import Progress
from fedlora.data.own_tests import read_own_tests
from fedlora.engines.workbench import Workbench
from fedlora.evaluation.private_numbers import SHARES, summarise_rows, withheld
from fedlora.evaluation.rouge import AnswerScorer
from fedlora.evaluation.score_table import Measure
from fedlora.evaluation.text_measures import chrf, is_same, token_f1
from fedlora.federated.base_delta import background_of
from fedlora.federated.ranks import rank_of_adapter
from fedlora.llm.background import as_background
from fedlora.llm.decoding import Decoding, Request
from fedlora.llm.examples import encode_rows
from fedlora.llm.generation import generate_answers
from fedlora.llm.limits import check_tokens
from fedlora.llm.row_losses import measure_rows
from fedlora.rows import Row
from fedlora.runs.reader import RunReader
from fedlora.runs.saved_adapters import find_additions
from fedlora.types import AdapterState, BaseDelta, ClientId, ClientUpdate

NO_ROWS = "it has no test rows"
ASKS_NOTHING = "its test rows are plain text, which asks nothing: only the loss can be measured"


@dataclass(frozen=True)
class Placed:
    """A model: the adapter in the layers, and what lies beside them; the base has neither."""

    adapter: AdapterState | None = None
    background: AdapterState | None = None


@dataclass(frozen=True)
class Asked:
    """One measurement: after which round, of whom, the global adapter with the additions to the base that it stands
    on, and in which round the server last accepted an update of each client."""

    round: int
    clients: Sequence[ClientId]
    accepted: Mapping[ClientId, int]
    shared: AdapterState | None
    base: BaseDelta | None


class Owners(Protocol):
    """Those who have the test rows."""

    def measure(self, asked: Asked) -> dict[ClientId, dict[str, Any]]:
        """Of every client its numbers, or why they are withheld: JSON values."""
        ...


class SimulatedOwners:
    """All clients of a run in this process. Further devices take no part, so their number changes no byte."""

    def __init__(self, bench: Workbench, config: TrainConfig, reader: RunReader) -> None:
        self._bench = bench
        self._config = config
        self._reader = reader

    def measure(self, asked: Asked) -> dict[ClientId, dict[str, Any]]:
        """One client after another."""
        found = {}
        with Progress(f"private metrics, round {asked.round}", len(asked.clients), "clients") as progress:
            for client in asked.clients:
                found[client] = self._measure(client, asked)
                progress.advance()
        return found

    def _measure(self, client: ClientId, asked: Asked) -> dict[str, Any]:
        config = self._config
        own, additions, accepted = None, None, asked.accepted.get(client)
        if accepted is not None:
            paths = self._reader.paths
            update = self._reader.read_accepted(client, accepted)
            own = own_adapter(update, asked.shared, is_new=accepted == asked.round)
            additions = background_of(find_additions(paths, accepted))
        models = place_models(self._bench, asked.shared, background_of(asked.base), own, additions)
        rows = read_own_tests(self._bench.examples.files[client].path, config)
        return measure_own_rows(
            self._bench, config, rows, models, names=config.private_metrics, fewest=config.private_metrics_min
        )


def own_adapter(update: ClientUpdate, shared: AdapterState | None, *, is_new: bool) -> AdapterState | None:
    """A client's own adapter: the one that its method keeps, else that of its last training.

    A half that was sent is completed by the global adapter of the same round (`is_new`); of an earlier round there is
    none.
    """
    if update.memory.adapter is not None or update.upload is None:
        return update.memory.adapter
    is_whole = len({key.partition(".lora_")[2] for key in update.upload}) > 1
    return update.upload if is_whole else {**(shared or {}), **update.upload} if is_new else None


def place_models(
    bench: Workbench,
    shared: AdapterState | None,
    shared_background: AdapterState | None,
    own: AdapterState | None,
    own_background: AdapterState | None,
) -> dict[str, Placed]:
    """The models that there are: the base always."""
    models = {"base": Placed()}
    if shared is not None:
        models["global"] = _place(bench, shared, shared_background)
    if own is not None:
        models["personal"] = _place(bench, own, own_background)
    return models


def _place(bench: Workbench, adapter: AdapterState, background: AdapterState | None) -> Placed:
    if rank_of_adapter(adapter) == bench.lora.spec.r:
        return Placed(adapter, background)
    # of another rank, so beside the layers and not in them
    return Placed(None, as_background(adapter, bench.lora.spec.scaling))


def measure_own_rows(
    bench: Workbench,
    config: TrainConfig,
    rows: Sequence[Row],
    models: Mapping[str, Placed],
    *,
    names: Sequence[str],
    fewest: int,
) -> dict[str, Any]:
    """The numbers of one client's test rows that may leave it: JSON values.

    `names` are the metrics that its owner gives, `fewest` the prompts that a number needs at least. Answers are greedy
    and have at most `private_metrics_tokens` tokens.
    """
    if not rows:
        return withheld(NO_ROWS)
    prompts = [row.prompt for row in rows]
    if len(set(prompts)) < fewest:
        # nothing is computed that will not be given
        return summarise_rows({}, prompts, fewest)
    texts = [name for name in names if name != "loss"]
    if texts and any(row.kind == "text" for row in rows):
        if "loss" not in names:
            return withheld(ASKS_NOTHING)
        texts = []
    measured: dict[str, dict[str, Measure]] = {model: {} for model in models}
    for model, placed in models.items():
        if "loss" in names:
            measured[model]["loss"] = _measure_loss(bench, config, rows, placed)
        if texts:
            measured[model] |= _measure_answers(rows, _answer(bench, config, rows, placed), texts)
    return summarise_rows(measured, prompts, fewest)


def _measure_loss(bench: Workbench, config: TrainConfig, rows: Sequence[Row], placed: Placed) -> Measure:
    options = {"cutoff": config.cutoff_len, "train_on": config.measured_tokens}
    examples = encode_rows(rows, bench.encoder, **options).examples
    tokens = np.array([example.num_labels for example in examples], dtype=float)
    sums = measure_rows(bench.trainer, placed.adapter, examples, background=placed.background)
    return Measure(np.array(sums) / tokens, tokens)


def _answer(bench: Workbench, config: TrainConfig, rows: Sequence[Row], placed: Placed) -> list[str]:
    encoder, base = bench.encoder, bench.base
    check_tokens(base, encoder)
    decoding = Decoding(config.private_metrics_tokens)
    room = {"context": base.context, "max_new_tokens": decoding.max_new_tokens}
    prompts = [encoder.question(row, cutoff=config.cutoff_len, **room) for row in rows]
    ends = encoder.ends(None if any(row.kind != "completion" for row in rows) else ())
    bench.lora.set_background(placed.background)
    bench.lora.set_adapter(placed.adapter)
    answers = generate_answers(
        base,
        [Request(prompt.ids, number) for number, prompt in enumerate(prompts)],
        decoding,
        # that of the run's record, so that a resumed run batches alike
        tokens_per_pass=bench.book.layout.tokens_per_pass,
        ends=ends,
    )
    return [ends.cut(encoder.decode(answer)) for answer in answers]


def _measure_answers(rows: Sequence[Row], answers: Sequence[str], names: Sequence[str]) -> dict[str, Measure]:
    pairs = [(answer, row.output) for answer, row in zip(answers, rows, strict=True)]
    scored = [AnswerScorer().score(*pair, "") for pair in pairs] if {"exact", "rougeL"} & set(names) else []
    columns = {
        "exact": lambda: [float(one.exact) for one in scored],
        "normalised": lambda: [float(is_same(*pair)) for pair in pairs],
        "f1": lambda: [token_f1(*pair) for pair in pairs],
        "rougeL": lambda: [one.rouge["rougeL"] for one in scored],
        "chrf": lambda: [chrf(*pair) for pair in pairs],
    }
    return {name: Measure(np.array(columns[name]()), is_share=name in SHARES) for name in names}
