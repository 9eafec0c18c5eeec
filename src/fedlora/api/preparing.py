"""`fedlora.silos`, `allocate` and `plan`: before a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.api.entrance import PathLike, call, entered, make_config
from fedlora.api.signatures import takes
from fedlora.config.data import AllocateConfig
from fedlora.config.plan import PlanConfig
from fedlora.config.reading import ReadingConfig
from fedlora.home import path_at_home
from fedlora.openmp import limit_spinning
from fedlora.rows import RowFormat

if TYPE_CHECKING:
    from fedlora.stages.allocate import AllocatedData
    from fedlora.stages.plan import Plan


def silos(
    clients: Mapping[str, PathLike | Iterable[Mapping[str, Any]]],
    folder: PathLike = "silos",
    *,
    row_kind: RowFormat = "auto",
    columns: Mapping[str, str] | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a folder with one file of rows per client, for `data` of `train`, and return it.

    `clients` maps each client's name to its rows: dictionaries, or anything that iterates over dictionaries (a
    `datasets.Dataset`, say), or a table of pyarrow, pandas or polars, or the path of a file or a folder that `train`
    reads as one client, which is copied. A name that ends in `.test` holds test rows of the client before it. A folder
    that holds exactly these files is left as it is; another one needs `overwrite=True`, and then its other files of
    rows are removed.

    `columns` maps fields of a row to the names that the given rows have, such as `{"response": "answers.text.0"}`;
    the rows are then written under the usual names. `row_kind` is as for `train`: with "any" give it to `train` too.
    Columns that are not used are not written, and are named once.

    Raises UsageError (a name, a file, a folder), DataError (a row that is no row), StorageError.

    >>> rows = [{"instruction": "Capital of France?", "output": "Paris"}]
    >>> sorted(file.name for file in fl.silos({"north": rows, "south": rows}, folder="two").iterdir())
    ['north.jsonl', 'south.jsonl']
    """
    from fedlora.data.silo_files import write_silos

    given = {"row_kind": row_kind, "columns": columns}
    with entered("silos", AllocateConfig, given, progress=progress):
        rules = make_config(ReadingConfig, None, given).read_rules
        return write_silos(clients, path_at_home(folder), rules=rules, overwrite=overwrite)


@takes(AllocateConfig)
def allocate(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> AllocatedData:
    """Split one file of rows into client files and a global test set, by category, iid, Dirichlet or shards.

    Same input and seed, same bytes. `manifest` of the result says who holds what. Raises UsageError, DataError (a row,
    a category that is too small), StorageError.

    >>> rows = [{"instruction": f"{n} + 1?", "output": str(n + 1), "category": "odd" if n % 2 else "even"}
    ...         for n in range(12)]
    >>> file = fl.silos({"sums": rows}, folder="raw") / "sums.jsonl"
    >>> split = fl.allocate(input_file=file, dataset_name="sums", train_per_cat=4, test_per_cat=2, progress=False)
    >>> [client["num_examples"] for client in split.manifest["clients"]]
    [4, 4]
    """
    from fedlora.stages import allocate as stage

    return call("allocate", AllocateConfig, stage.run, config, keywords, progress=progress)


@takes(PlanConfig)
def plan(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Plan:
    """Time, memory, traffic and faults of the data, before any training; nothing is written.

    It takes the keywords of `train`. `record` of the result holds the numbers: bytes, seconds, tokens. Raises what
    `train` would raise before its first round.

    >>> plan = fl.plan(data="silos", model="smollm2-135m", rounds=2, client_fraction=1, probe=False, progress=False)
    >>> plan.record["run"]["num_steps"]
    12
    """
    from fedlora.stages import plan as stage

    limit_spinning()
    return call("plan", PlanConfig, stage.run, config, keywords, progress=progress)
