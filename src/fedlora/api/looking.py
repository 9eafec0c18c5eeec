"""Functions that look at runs and carry them: `open`, `runs`, `verify`, `report`, `export`, `compare` and others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlora.api.entrance import PathLike, call, entered
from fedlora.api.run import Run
from fedlora.api.signatures import takes
from fedlora.config.compare import CompareConfig
from fedlora.config.evaluate import ReportConfig
from fedlora.config.export import ExportConfig
from fedlora.config.importing import ImportConfig
from fedlora.config.reaggregate import ReaggregateConfig
from fedlora.config.runs import RunsConfig, VerifyConfig
from fedlora.config.track import TrackConfig
from fedlora.home import path_at_home
from fedlora.openmp import limit_spinning
from fedlora.paths import RunPaths
from fedlora.runs.run_folder import read_run

if TYPE_CHECKING:
    from fedlora.reporting.what_ifs import LeftOutEach, Reaggregated
    from fedlora.stages.compare import Comparison, PlanOfRuns
    from fedlora.stages.export import Export
    from fedlora.stages.report import Report
    from fedlora.stages.runs import RunList
    from fedlora.stages.track import TrackedRun
    from fedlora.stages.verify import Verification


def open(folder: PathLike) -> Run:  # noqa: A001 - the public name
    """The run in `folder`, which is `model_dir/name` of its training. Raises UsageError where there is none.

    >>> run = fl.open("models/pair")
    >>> run.name, len(run)
    ('pair', 2)
    """
    with entered("open", RunsConfig, {"model_dir": folder}, progress=True):
        place = path_at_home(folder).absolute()
        paths = RunPaths(place.parent, place.name)
        read_run(paths)
    return Run(paths)


def runs(folder: PathLike = "models", *, progress: bool = True) -> RunList:
    """The runs under `folder`, a line each: state, rounds done, best round, size in bytes.

    >>> [line.name for line in fl.runs("models").lines]
    ['loop', 'pair']
    """
    from fedlora.stages import runs as stage

    return call("runs", RunsConfig, stage.run, None, {"model_dir": folder}, progress=progress)


@takes(VerifyConfig)
def verify(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Verification:
    """Recheck every hash of a run and recompute every aggregate from the clients' files; nothing is written.

    Raises StorageError with the first fault, UsageError where the secret of a private run is missing; `result` of the
    error lists everything that was checked.

    >>> print(fl.verify(name="pair", progress=False))
    base model: ok
    round 1: ok, 9 files, recomputed to the same bytes
    round 2: ok, 9 files, recomputed to the same bytes
    metrics.jsonl: ok
    """
    from fedlora.stages import verify as stage

    return call("verify", VerifyConfig, stage.run, config, keywords, progress=progress)


@takes(TrackConfig)
def track(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> TrackedRun:
    """Send a run to experiment trackers: the numbers of metrics.jsonl, the configuration, the table of rounds, the
    report. `to` names them: tensorboard, wandb, mlflow, trackio.

    What was sent before is not sent again. Raises UsageError (no run, no library), StorageError where a tracker fails.

    >>> fl.track(name="pair", to=["tensorboard"], progress=False)
    tensorboard: 2 rounds sent, run pair, tracking/tensorboard
    """
    from fedlora.stages import track as stage

    return call("track", TrackConfig, stage.run, config, keywords, progress=progress)


@takes(ReportConfig)
def report(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Report:
    """Put runs side by side: write report.html, report.md, report.json and plots to `report_dir/report_name`.

    `page` of the result is report.html, `file` report.md. Raises UsageError where no run of these names is there, or a
    file cannot be read.

    >>> fl.report(names=["pair"], round=2, progress=False).file
    PosixPath('reports/report/report.md')
    """
    from fedlora.stages import report as stage

    return call("report", ReportConfig, stage.run, config, keywords, progress=progress)


@takes(ReaggregateConfig)
def reaggregate(
    config: PathLike | None = None, *, progress: bool = True, **keywords: Any
) -> Reaggregated | LeftOutEach:
    """Combine the stored updates of a run by another server, other weights or without some clients; nothing is trained.

    Every round starts from where the run really stood, so each line is a what-if of one round. The adapters are written
    to `model_dir/new_name`. Raises UsageError, StorageError.

    >>> [line["round"] for line in fl.reaggregate(name="pair", weights="uniform", progress=False).rounds]
    [1, 2]
    """
    from fedlora.stages import reaggregate as stage

    return call("reaggregate", ReaggregateConfig, stage.run, config, keywords, progress=progress)


@takes(ExportConfig)
def export(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Export:
    """Write an adapter of a run for other programs, to the folder `to`: a PEFT folder, a merged model, or GGUF.

    `commands` of the result are what loads the folder in transformers, vLLM, Ollama or llama.cpp; README.md in it is a
    model card. Raises UsageError, StorageError; then there is no folder. Nothing is uploaded without `push`.

    >>> found = fl.export(name="pair", to="out", progress=False)
    >>> sorted(file.name for file in found.folder.glob("adapter*"))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    from fedlora.stages import export as stage

    return call("export", ExportConfig, stage.run, config, keywords, progress=progress)


@takes(ImportConfig, "folder")
def import_adapter(folder: PathLike, config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Run:
    """Make a run of adapters that another program left in `folder`: a PEFT adapter, or rounds of the reference project
    or of Shepherd. It answers, is scored and exported like any other.

    Raises UsageError for files that are no adapters of `model`, which are never unpickled.

    >>> fl.export(name="pair", to="shared", progress=False).folder
    PosixPath('shared')
    >>> run = fl.import_adapter("shared", model="smollm2-135m", name="theirs", progress=False)
    >>> run.answer("Capital of France?", max_new_tokens=2) == fl.open("models/pair").answer(
    ...     "Capital of France?", max_new_tokens=2)
    True
    """
    from fedlora.stages import import_adapter as stage

    made = call("import_adapter", ImportConfig, stage.run, config, {**keywords, "folder": folder}, progress=progress)
    return Run(made.paths)


@takes(CompareConfig)
def compare(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> Comparison | PlanOfRuns:
    """Train and score methods over seeds and settings on one data set, under one budget, and put them into one table.

    `config` is mostly a YAML file; a call that was interrupted is repeated to resume. With `plan=True` nothing is
    trained, and the result says what would be. `record` of the result is comparison.json: means over seeds with 95 %
    intervals, losses in nats per response token.

    Raises UsageError where no run of the comparison is possible, StorageError, LockedError. What is wrong with a single
    run is a note of the result.

    >>> study = dict(methods=["homo", "fedprox"], seeds=[1, 2], learning_rates=[1e-3], budget_steps=8)
    >>> study |= dict(train={"base_model": "smollm2-135m"}, data={"train_per_cat": 8}, plan=True)
    >>> fl.compare(name="study", **study, progress=False).record["runs"]
    8
    """
    from fedlora.stages import compare as stage

    limit_spinning()
    return call("compare", CompareConfig, stage.run, config, keywords, progress=progress)
