"""The clients of a run on this machine: those of this process, and those of a worker process per further device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.engines.device_worker import Worker
from fedlora.engines.devices import DeviceClients
from fedlora.engines.simulation import MemoryReader, SimulatedClients
from fedlora.engines.workbench import Workbench
from fedlora.federated.privacy.randomness import Secret
from fedlora.methods.choosing import LoadedMethod
from fedlora.types import ClientPool, Step


@contextlib.contextmanager
def open_pool(
    bench: Workbench,
    config: TrainConfig,
    method: LoadedMethod,
    memories: MemoryReader,
    on_step: Callable[[Step], None],
    secret: Secret | None = None,
) -> Iterator[ClientPool]:
    """A pool over the configured devices; worker processes end with the block."""
    clients = bench.examples
    local = SimulatedClients(bench.trainer, method.client, clients, memories, on_step=on_step)
    if len(config.devices) < 2:
        yield local
        return
    if method.order != "parallel":
        say(f"{config.federation_mode} trains one client after another: only {config.devices[0]} is used")
        yield local
        return
    layout = bench.book.layout
    # a run that is gone on with has the hyper-parameters it was started with, whatever the defaults are now
    values = {name: value for name, value in method.hyperparameters.items() if method.option(name)}
    asked = config.model_copy(update={"method_options": values})
    what = (asked, clients.files, layout, secret, bench.base.name)
    workers = [Worker(device, *what) for device in config.devices[1:]]
    try:
        yield DeviceClients(local, workers)
    finally:
        for worker in workers:
            worker.close()
