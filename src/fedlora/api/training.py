"""`fedlora.train` and `fedlora.rounds`."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.api.entrance import PathLike, entered, make_config
from fedlora.api.run import Round, Run
from fedlora.api.signatures import takes
from fedlora.config.train import TrainConfig
from fedlora.errors import LockedError
from fedlora.home import path_at_home
from fedlora.openmp import limit_spinning
from fedlora.paths import RunPaths, check_name
from fedlora.stages import train as stage


@takes(TrainConfig)
def train(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Run:
    """Train one federated method over all rounds, or over those that are left of an interrupted run.

    `config` is a YAML file; keywords win over it. Adapters and metrics are written to `model_dir/name`, the same bytes
    as by `fedlora train`. A call that was interrupted is repeated to resume. `progress=False` shows nothing.

    `method` is a name, a place such as `part_way.py:part_way`, or a `fedlora.methods.Method`; the fields of its server
    are keywords too. With several `devices` a script needs the guard `if __name__ == "__main__":`, because each further
    device is a process.

    Raises UsageError (a keyword, a model, a folder), DataError (a row), TrainingError (no usable update), StorageError,
    LockedError (another process trains this run), BudgetError (`max_epsilon`).

    >>> rows = [{"instruction": "Capital of France?", "output": "Paris"}, {"instruction": "2 + 3?", "output": "5"}]
    >>> data = fl.silos({"north": rows, "south": rows}, folder="silos")
    >>> run = fl.train(data=data, model="smollm2-135m", rounds=2, client_fraction=1, name="pair", progress=False)
    >>> len(run)
    2
    """
    with entered("train", TrainConfig, keywords, progress=progress):
        made = make_config(TrainConfig, config, keywords)
        run = _run_of(made)
    for _ in _iterate(made, run, "train", keywords, progress):
        pass
    return run


@takes(TrainConfig)
def rounds(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Iterator[Round]:
    """Train as `train` does, one round per iteration; each Round is yielded once it is committed and measured.

    Rounds of an earlier call are not yielded again. A loop that ends early leaves a run that the same call resumes, in
    a notebook also while the interrupted loop still stands in a traceback: a new call of this process takes its place.
    Keywords are checked at the call, everything else when the first round is asked for. Raises what `train` raises.

    >>> rows = [{"instruction": "Capital of France?", "output": "Paris"}, {"instruction": "2 + 3?", "output": "5"}]
    >>> data = fl.silos({"north": rows, "south": rows}, folder="silos")
    >>> wanted = dict(data=data, model="smollm2-135m", rounds=2, client_fraction=1, name="loop")
    >>> for round in fl.rounds(**wanted, progress=False):
    ...     print(round.number, round.metrics["loss"] > 0)
    1 True
    2 True
    """
    with entered("rounds", TrainConfig, keywords, progress=progress):
        made = make_config(TrainConfig, config, keywords)
        run = _run_of(made)
    # a loop may leave this folder before and between rounds
    here: dict[str, Any] = {name: getattr(made, name).absolute() for name in ("model_dir", "data_path", "track_dir")}
    if made.val_data_path:
        here["val_data_path"] = str(Path(made.val_data_path).absolute())
    base = path_at_home(made.base_model)
    place = str(base.absolute()) if base.is_dir() else ""
    return _iterate(made.model_copy(update=here), run, "rounds", keywords, progress, place)


_held: dict[Path, Generator[int]] = {}
"""Folder -> the loop of this process that holds the run there."""


def _iterate(
    config: TrainConfig, run: Run, function: str, keywords: Mapping[str, Any], progress: bool, place: str = ""
) -> Iterator[Round]:
    """The rounds of a run as they are done, each step of the training inside `entered`, and nothing between them;
    `place` is where the base lies, when that is not its name."""
    folder = run.folder
    if (earlier := _held.pop(folder, None)) is not None:
        # it runs in another thread when it cannot be closed, and then the run is locked
        with contextlib.suppress(ValueError):
            earlier.close()
    limit_spinning()
    steps = stage.rounds(config, place=place)
    _held[folder] = steps
    try:
        while True:
            with entered(function, TrainConfig, keywords, progress=progress):
                number = next(steps, None)
                if number is None and _held.get(folder) is not steps:
                    raise LockedError(f"{folder}: another call of this process trains this run", hint="use that one")
            if number is None:
                return
            yield run[number]
    except KeyboardInterrupt as stop:
        stop.add_note(f"run {run.name} was interrupted; the same call resumes it")
        raise
    finally:
        if _held.get(folder) is steps:
            del _held[folder]
        steps.close()


def _run_of(config: TrainConfig) -> Run:
    return Run(RunPaths(config.model_dir.absolute(), check_name(config.exp_name, "exp_name")))
