"""Count a run before it starts: steps, tokens, passes, bytes that travel and bytes on disk.

Nothing here is estimated: cohorts, steps and passes come from the functions that the run itself draws them with. Work
is counted in the units by which passes are cut, padded tokens and what starting a pass costs, so that a probe of one
client speaks for clients with shorter rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from fedlora.config.train import TrainConfig
from fedlora.engines.cohorts import choose_cohort
from fedlora.engines.simulation import count_bytes
from fedlora.federated.adapters import num_bytes, shapes_of
from fedlora.federated.ranks import rank_of
from fedlora.llm.abilities import Abilities
from fedlora.llm.adapter_files import to_bin, to_safetensors
from fedlora.llm.examples import PASS_OVERHEAD_TOKENS, Example, cut_alike, order_steps
from fedlora.llm.layout import Layout
from fedlora.methods.choosing import LoadedMethod, Wave
from fedlora.planning.growth import forecast_growth
from fedlora.runs.server_state import state_to_bytes
from fedlora.types import (
    AdapterState,
    ClientId,
    ClientMemory,
    ClientUpdate,
    LocalResult,
    RoundContext,
    Upload,
)

EVERYTHING = Abilities()
"""What an outline is taken for: its base is not tried."""

RECORD_BYTES = 8192
"""Room for the small files of an update or a round: configuration, record, manifest, the lines of the log."""


@dataclass(frozen=True)
class Work:
    """One epoch over some rows; the heaviest pass holds `pass_tokens` padded tokens in rows of `pass_length`."""

    num_steps: int
    num_tokens: int
    units: int
    pass_tokens: int
    pass_length: int
    pass_labels: int


def measure_epoch(
    examples: Sequence[Example], config: TrainConfig, layout: Layout, client_id: ClientId, can: Abilities = EVERYTHING
) -> Work:
    """The first epoch of a client's first round, cut into passes as the run cuts it on a base of these abilities."""
    steps = order_steps(
        examples,
        batch_size=config.local_batch_size,
        seed=config.seed,
        round_number=1,
        client_id=client_id,
        epoch=0,
        by_length=config.group_by_length,
    )
    passes = [group for step in steps for group in cut_step(step, config, layout, can)]
    heaviest = max(passes, key=lambda group: (_padded(group), _longest(group)))
    return Work(
        num_steps=len(steps),
        num_tokens=sum(len(example.ids) for example in examples),
        units=count_units(passes),
        pass_tokens=_padded(heaviest),
        pass_length=_longest(heaviest),
        pass_labels=sum(example.num_labels for example in heaviest),
    )


def cut_step(
    rows: Sequence[Example], config: TrainConfig, layout: Layout, can: Abilities = EVERYTHING
) -> list[list[Example]]:
    """The passes of one step."""
    passes = cut_alike(
        [len(example.ids) for example in rows],
        can.padding,
        token_budget=layout.tokens_per_pass,
        most_rows=config.local_micro_batch_size if can.equal_rows else 1,
    )
    return [[rows[index] for index in group] for group in passes]


def count_units(passes: Iterable[Sequence[Example]]) -> int:
    """The work of some passes, in tokens."""
    return sum(_padded(group) + PASS_OVERHEAD_TOKENS for group in passes)


@dataclass(frozen=True)
class RunForecast:
    """A whole run. Bytes down and up are those of the busiest round, `disk_bytes` what the run's folder will take."""

    num_steps: int
    num_tokens: int
    num_updates: int
    most_updates: int
    bytes_down: int
    bytes_up: int
    disk_bytes: int
    steps_of: dict[ClientId, int]
    rounds_of: dict[ClientId, int]
    waves: list[Wave]


def draw_waves(config: TrainConfig, method: LoadedMethod, clients: Sequence[ClientId]) -> list[list[Wave]]:
    """Every round's waves, as the run will draw them."""
    shuffle = config.seq_order == "shuffled"
    rounds = range(1, config.num_communication_rounds + 1)
    cohorts = {number: choose_cohort(config, method, clients, number) for number in rounds}
    return [
        list(method.waves(cohorts[number], shuffle=shuffle, seed=config.seed, round_number=number)) for number in rounds
    ]


def forecast_run(
    config: TrainConfig,
    method: LoadedMethod,
    rounds: Sequence[Sequence[Wave]],
    work: dict[tuple[ClientId, ...], Work],
    adapter: AdapterState,
) -> RunForecast:
    """`work` has one epoch of every task's rows, by the clients whose rows they are."""
    steps_of: Counter[ClientId] = Counter()
    rounds_of: Counter[ClientId] = Counter()
    epochs = config.local_num_epochs * method.num_trainings
    num_tokens = 0
    for waves in rounds:
        for client, rows_of in (member for wave in waves for member in wave):
            epoch = work[rows_of]
            steps_of[client] += epoch.num_steps * epochs
            num_tokens += epoch.num_tokens * epochs
            rounds_of.update(rows_of)
    members = [[client for wave in waves for client, _ in wave] for waves in rounds]
    sending = [clients for number, clients in enumerate(members, start=1) if not method.server.asks_everybody(number)]
    updates = [len(clients) for clients in members]
    traffic = measure_clients(config, method, adapter, {client for clients in members for client in clients})
    growth = forecast_growth(config, method, rounds, shapes_of(adapter))
    sent = [sum(traffic[client].bytes_down for client in clients) for clients in sending]
    disk_bytes = _disk_bytes(config, method, adapter, [traffic[client] for clients in members for client in clients])
    return RunForecast(
        num_steps=steps_of.total(),
        num_tokens=num_tokens,
        num_updates=sum(updates),
        most_updates=max(updates),
        bytes_down=max(one + more for one, more in zip_longest(sent, growth.down, fillvalue=0)),
        bytes_up=max(sum(traffic[client].bytes_up for client in clients) for clients in sending),
        disk_bytes=disk_bytes + sum(growth.disk),
        steps_of=dict(sorted(steps_of.items())),
        rounds_of=dict(sorted(rounds_of.items())),
        waves=[wave for waves in rounds for wave in waves],
    )


def count_run_units(
    config: TrainConfig, waves: Iterable[Wave], work: dict[tuple[ClientId, ...], Work], devices: int = 1
) -> float:
    """Units of work from the run's begin to its end; a wave's clients share the devices."""
    total, epochs = 0.0, config.local_num_epochs * config.method.num_trainings
    for wave in waves:
        units = [work[rows_of].units * epochs for _, rows_of in wave]
        # at best evenly shared, and never faster than the client that takes longest
        total += max(sum(units) / max(1, devices), max(units))
    return total


def _disk_bytes(config: TrainConfig, method: LoadedMethod, adapter: AdapterState, updates: Sequence[Traffic]) -> int:
    per_update = RECORD_BYTES
    if config.optimizer_state == "keep":
        # two moments of the adapter's size, and a step count for each factor
        per_update += 2 * num_bytes(adapter) + RECORD_BYTES
    per_round = RECORD_BYTES + max(each.state_bytes for each in updates)
    if method.has_global_model:
        per_round += len(to_bin(adapter)) + len(to_safetensors(adapter))
    files = sum(each.file_bytes + each.extra_bytes + per_update for each in updates)
    return files + config.num_communication_rounds * per_round


@dataclass(frozen=True)
class Traffic:
    """What a method moves and stores for a client of some rank, in bytes of tensors: down and up (in the heavier of
    two rounds), beside its adapter, and beside the global one; `file_bytes` is the file of its adapter. What is added
    to the base is not in it: it grows."""

    bytes_down: int
    bytes_up: int
    extra_bytes: int
    state_bytes: int
    file_bytes: int


def measure_clients(
    config: TrainConfig, method: LoadedMethod, adapter: AdapterState, clients: Iterable[ClientId]
) -> dict[ClientId, Traffic]:
    """Client -> its traffic, measured once for each rank."""
    by_rank: dict[int, Traffic] = {}
    found = {}
    for client in sorted(clients):
        rank = rank_of(client, config.client_ranks, config.lora_r)
        if rank not in by_rank:
            by_rank[rank] = measure_traffic(method, adapter, client)
        found[client] = by_rank[rank]
    return found


def measure_traffic(method: LoadedMethod, adapter: AdapterState, client: ClientId = 0) -> Traffic:
    """The method itself, asked with one client that trained nothing."""
    state = method.server.init(adapter, (client,))
    down, up, extra, own = [], [], 0, adapter
    for number in (1, 2):
        download = method.server.broadcast(state, client, number)
        own = download.adapter
        phases = method.client.phases(download, ClientMemory())
        results = [LocalResult(phase.start, phase.start) for phase in phases]
        upload, memory = method.client.upload(results, download, ClientMemory())
        sizes = count_bytes(replace(download, base=None), upload) if not method.pools_rows else (0, 0)
        down.append(sizes[0])
        up.append(sizes[1])
        sent = upload or Upload({})
        extra = sum(map(num_bytes, [*sent.extra.values(), *memory.slots.values()]))
        if memory.adapter is not None:
            # a model of more ranks than travel, and what is sent where that is no part of it
            extra += num_bytes(memory.adapter) - num_bytes(own)
            extra += num_bytes(sent.adapter) if len(phases) > 1 else 0
        update = ClientUpdate("", number, client, sent.adapter, memory, 1, 1, 1, "", {}, sent.extra)
        if upload is not None:
            state = method.server.aggregate(state, [update], RoundContext(number, 0, (client,), (client,)))
    left = method.server.global_adapter(state)
    return Traffic(max(down), max(up), extra, len(state_to_bytes(state, left) or b""), len(to_bin(own)))


def _padded(group: Sequence[Example]) -> int:
    return _longest(group) * len(group)


def _longest(group: Sequence[Example]) -> int:
    return max(len(example.ids) for example in group)
