"""Private metrics across machines: the request to a node, the node's answer, and the checked reply, in plain values.

An owner answers with numbers of its test rows only where its policy names the metric.
"""

from __future__ import annotations

from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.own_tests import read_own_tests
from fedlora.engines.messages import pack, pack_task, unpack, unpack_task
from fedlora.engines.private_metrics import Asked, measure_own_rows, own_adapter, place_models
from fedlora.engines.workbench import Workbench
from fedlora.evaluation.private_numbers import read_numbers, withheld
from fedlora.federated.base_delta import background_of
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.node_replies import describe_run
from fedlora.flower.node_store import NodeStore
from fedlora.flower.policy import Refusal, check_measuring
from fedlora.types import ClientId, ClientMemory, Download, TrainTask

KIND = "measure"


def ask_numbers(client: ClientId, asked: Asked, config: TrainConfig, run_id: str) -> bytes:
    """The request for one client's numbers: the global adapter, and when the server accepted an update last."""
    download = Download(asked.shared or {}, base=asked.base)
    task = TrainTask("", asked.round, 0, client, (client,), download, asked.accepted.get(client))
    more = {"kind": KIND, **describe_run(config), "run_id": run_id, "has_global": asked.shared is not None}
    return pack_task(task, ClientMemory(), more)


def answer_numbers(
    policy: NodeConfig, config: TrainConfig, bench: Workbench, store: NodeStore, request: bytes
) -> bytes:
    """A node's reply: numbers that its owner allows. Raises Refusal where it allows none."""
    task, _, more = unpack_task(request, store.read_base())
    check_measuring(policy, config, task)
    names = [name for name in config.private_metrics if name in policy.private_metrics]
    if not names:
        raise Refusal("the owner of this node allows none of these private metrics")
    shared = task.download.adapter if more["has_global"] is True else None
    own, additions = None, None
    update = store.read_update(task.accepted) if task.accepted is not None else None
    base = store.read_base()
    if update is not None and (update.base_sha256 is None or (base and base.sha256 == update.base_sha256)):
        own = own_adapter(update, shared, is_new=task.accepted == task.round)
        additions = background_of(base) if update.base_sha256 is not None else None
    models = place_models(bench, shared, background_of(task.download.base), own, additions)
    fewest = max(config.private_metrics_min, policy.private_metrics_min)
    rows = read_own_tests(policy.data_path, config)
    numbers = measure_own_rows(bench, config, rows, models, names=names, fewest=fewest)
    say(f"private metrics, round {task.round}: {numbers.get('withheld') or ', '.join(names)}")
    return pack({"numbers": numbers}, {})


def read_reply(payload: bytes, config: TrainConfig) -> dict[str, Any]:
    """What a node gave, checked. Raises ValueError, or what a parser raises, for anything else."""
    header, _ = unpack(payload)
    if "failure" in header:
        return withheld(str(header["failure"]["reason"]))
    return read_numbers(header["numbers"], config.private_metrics, config.private_metrics_min)
