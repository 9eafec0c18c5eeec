"""One owner's client: it answers a server with its facts, and with updates for tasks that it accepts.

The base model stays loaded from one task to the next. What goes back is the upload, counts and metrics; whatever the
client keeps is committed here first, with the update that it belongs to. The server hears which kind of thing went
wrong and never the words of an exception, which may quote a row.
"""

from __future__ import annotations

import hashlib
import hmac
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_facts import read_client_files
from fedlora.data.row_parts import sha256_of_rows
from fedlora.engines.messages import MissingAdditionsError, pack, pack_outcome, unpack, unpack_task
from fedlora.engines.simulation import SimulatedClients
from fedlora.engines.workbench import Workbench, make_workbench
from fedlora.errors import DataError, FedloraError, StorageError
from fedlora.federated.base_delta import background_of
from fedlora.federated.ranks import rank_of_adapter
from fedlora.files import sha256_of_json, write_bytes, write_text
from fedlora.flower.folders import NodePaths
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.node_store import OWNER_ONLY, NodeStore, folder_bytes, read_salt
from fedlora.flower.policy import Refusal, accept_config, check_task
from fedlora.flower.private_numbers import KIND, answer_numbers
from fedlora.llm.adapter_config import config_at_rank, make_peft_config
from fedlora.llm.adapter_files import CONFIG_NAME, SAFETENSORS_NAME, to_safetensors
from fedlora.llm.background import as_background
from fedlora.llm.examples import Example
from fedlora.llm.layout import Layout
from fedlora.llm.lora import is_fan_in_fan_out
from fedlora.llm.memory import is_out_of_memory
from fedlora.methods.choosing import choose_method
from fedlora.plain_text import counted
from fedlora.stopping import stop_if_asked
from fedlora.types import AdapterState, ClientFailure, ClientMemory, ClientUpdate, FailureKind, TrainTask

PUBLIC_REASONS: dict[FailureKind, str] = {
    "diverged": "local training diverged",
    "data": "its data cannot be used, or has changed",
    "crashed": "an unexpected error",
    "out_of_memory": "out of memory",
    "lost": "its disk refused",
}
"""The reasons of failures that the server receives; the node's log has the details."""


@dataclass(frozen=True)
class _Run:
    """A run this node takes part in, with its model loaded."""

    key: str
    config: TrainConfig
    bench: Workbench
    clients: SimulatedClients
    store: NodeStore


class Node:
    """Answers requests, bytes for bytes; holds one run's model at a time."""

    def __init__(self, policy: NodeConfig) -> None:
        self.policy = policy
        self._run: _Run | None = None

    def answer(self, request: bytes) -> bytes:
        """The reply to a request as `ask_facts` or `ask_update` makes it; what cannot be done is a failure inside."""
        client = self.policy.client_id
        try:
            header, _ = unpack(request)
            kind = header.get("more", {}).get("kind")
            if kind == KIND:
                run = self._open(header["more"])
                return answer_numbers(self.policy, run.config, run.bench, run.store, request)
            if kind != "train":
                return self._describe(header)
            run = self._open(header["more"])
            task, _, _ = unpack_task(request, run.store.read_base())
            return pack_outcome(self._scrub(self._train(run, task)), {})
        except Refusal as refusal:
            say(f"refused: {refusal}")
            failure = ClientFailure(client, "refused", str(refusal))
        except MissingAdditionsError as error:
            say(f"additions to the base are missing here and are asked for: {error}")
            failure = ClientFailure(client, "lost", "it has not got what was added to the base before")
        except Exception as error:  # whatever it is, its words stay here
            stop_if_asked()
            hint = f" ({error.hint})" if isinstance(error, FedloraError) and error.hint else ""
            say(f"{error}{hint}" if isinstance(error, FedloraError) else traceback.format_exc())
            failure = self._scrub(ClientFailure(client, _kind_of(error), ""))
        return pack_outcome(failure, {})

    def _describe(self, header: Mapping[str, Any]) -> bytes:
        run = self._open(header["more"])
        facts = run.bench.examples.count_tokens(self.policy.client_id).record()
        # which file, and how its rows are spread over categories, is nobody's business
        told = {name: value for name, value in facts.items() if name.startswith("num_")}
        digest = hmac.new(read_salt(self.policy.state_dir), facts["sha256"].encode(), hashlib.sha256).hexdigest()
        shapes = run.bench.lora.shapes()
        return pack(
            {
                "facts": {**told, "client_id": self.policy.client_id, "sha256": digest},
                "shapes": sha256_of_json({key: list(shape) for key, shape in shapes.items()}),
                "dtype": run.bench.base.dtype_name,
                "base": identity.record() if (identity := run.bench.base.identity) else {},
            },
            {},
        )

    def _train(self, run: _Run, task: TrainTask) -> ClientUpdate | ClientFailure:
        check_task(self.policy, run.config, task)
        if (kept := run.store.find(task.round, task.id)) is not None:
            say(f"round {task.round}: answered from the store")
            return self._for_server(kept)
        run.store.forget_before(task.accepted or task.round)
        run.store.keep_base(task.download.base)
        outcome = run.clients.train_one(task)
        if isinstance(outcome, ClientFailure):
            say(f"round {task.round}: no update: {outcome.reason}")
            return outcome
        outcome = self._validate(run, task, outcome)
        run.store.keep(outcome)
        self._leave_model(run, outcome)
        say(
            f"round {task.round}: trained on {counted(outcome.num_examples, 'row')}, loss {outcome.metrics['loss']:.3f}"
        )
        return self._for_server(outcome)

    @staticmethod
    def _leave_model(run: _Run, update: ClientUpdate) -> None:
        """Write the client's personal model as PEFT reads it, for its owner; the run resumes from the update, not
        from this."""
        own = update.memory.adapter
        if own is None:
            return
        bench, folder = run.bench, run.store.paths.model_folder
        fan_in_fan_out = is_fan_in_fan_out(bench.base.model)
        settings = make_peft_config(
            bench.lora.spec, run.config.base_model, fan_in_fan_out=fan_in_fan_out, targets=bench.lora.peft_names
        )
        write_bytes(folder / SAFETENSORS_NAME, to_safetensors(own), mode=OWNER_ONLY)
        write_text(folder / CONFIG_NAME, config_at_rank(settings, rank_of_adapter(own)), mode=OWNER_ONLY)

    def _validate(self, run: _Run, task: TrainTask, update: ClientUpdate) -> ClientUpdate:
        """The update with the loss on the rows held back here, before and after training: one exchange, not two."""
        rows = run.bench.examples.own_validation(self.policy.client_id)
        if not rows:
            return update
        before = run.store.read_memory(task.client_id, task.accepted).adapter or task.download.adapter
        after: AdapterState = update.memory.adapter or {**task.download.adapter, **(update.upload or {})}
        additions = background_of(task.download.base)
        losses = [self._lose(run.bench, adapter, rows, additions) for adapter in (before, after)]
        return replace(update, metrics={**update.metrics, "val_loss_before": losses[0], "val_loss_after": losses[1]})

    @staticmethod
    def _lose(bench: Workbench, adapter: AdapterState, rows: list[Example], additions: AdapterState | None) -> float:
        if rank_of_adapter(adapter) == bench.lora.spec.r:
            return bench.trainer.validate(adapter, [rows], background=additions)
        # of another rank, so beside the layers and not in them
        return bench.trainer.validate(None, [rows], background=as_background(adapter, bench.lora.spec.scaling))

    def _for_server(self, update: ClientUpdate) -> ClientUpdate:
        """The update without what stays: memory always, but for an adapter that the owner lets out."""
        own = update.memory.adapter
        if own is not None and self.policy.share_own_adapter:
            return replace(update, memory=ClientMemory(own))
        return replace(update, memory=ClientMemory(), adapter_stays=own is not None)

    def _scrub(self, outcome: ClientUpdate | ClientFailure) -> ClientUpdate | ClientFailure:
        if isinstance(outcome, ClientUpdate) or outcome.kind not in PUBLIC_REASONS:
            return outcome
        return replace(outcome, reason=f"{PUBLIC_REASONS[outcome.kind]}; the log of the node has the details")

    def _open(self, more: Mapping[str, Any]) -> _Run:
        """The run that a request belongs to, its model loaded if it is not yet."""
        config = accept_config(self.policy, more["config"], more.get("method"))
        digest = sha256_of_rows(self.policy.data_path) if self.policy.data_path.exists() else ""
        model = self.policy.find_model(config.base_model)
        # two runs that compute the same may still go different ways, where somebody was lost in one
        what = [config.exp_name, config.identity(), self.policy.client_id, digest, model]
        key = sha256_of_json([*what, str(more.get("run_id", ""))[:64]])[:32]
        if self._run is None or self._run.key != key:
            self._run = None  # the model of one run leaves before that of another comes
            self._run = self._load(key, config.model_copy(update={"base_model": model}))
        # a run may have grown since
        self._run = replace(self._run, config=config)
        return self._run

    def _load(self, key: str, config: TrainConfig) -> _Run:
        policy = self.policy
        if not policy.data_path.exists():
            raise DataError(f"{policy.data_path}: no such file", hint="check data_path in the node's configuration")
        paths = NodePaths(policy.state_dir, key)
        if not paths.folder.exists() and folder_bytes(policy.state_dir) > policy.max_state_gb * 1e9:
            raise Refusal("this node keeps as much of earlier runs as its owner lets it")
        clients = read_client_files({policy.client_id: policy.data_path}, config)
        if clients[policy.client_id].facts.num_examples < policy.min_examples:
            raise Refusal(f"fewer rows to train on than the {policy.min_examples} that this node asks for")
        store = NodeStore(paths, policy.keep_rounds)
        recorded = store.read_layout()
        bench = make_workbench(
            config,
            clients,
            device=policy.device,
            layout=Layout.from_record(recorded) if recorded else None,
            on_layout=lambda layout: store.write_layout(layout.record()),
        )
        store.write_layout(bench.book.layout.record())
        clients = SimulatedClients(bench.trainer, choose_method(config).client, bench.examples, store)
        return _Run(key, config, bench, clients, store)


def _kind_of(error: Exception) -> FailureKind:
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, (StorageError, OSError)):
        return "lost"
    return "data" if isinstance(error, FedloraError) else "crashed"
