"""Configuration of the commands that look at runs: `runs` and `verify`."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.schema import Config, flag


class RunsConfig(Config):
    """List the runs under model_dir: how far each is, who trains it now, its best round, its size."""

    model_dir: Path = flag(Path("./models"), "root of all runs")


class VerifyConfig(Config):
    """Recheck every hash of a run and recompute every aggregate from the clients' files; the base is not needed."""

    exp_name: str = flag("fedavg-1B", "name of the experiment: the folder of the run under model_dir")
    model_dir: Path = flag(Path("./models"), "root of all runs")
