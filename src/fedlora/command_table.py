"""The commands: each a configuration and the function that takes it.

Modules are named as text and imported when a command is called, so that `fedlora --help` loads neither pydantic nor
torch.
"""

from __future__ import annotations

from typing import NamedTuple

from fedlora.flower.commands import FLOWER_COMMANDS


class Command(NamedTuple):
    """A line of the overview, `module:Config`, `module:function` that returns a Result, the field given without a flag,
    a check that an extra is installed, whether the overview lists it first, and whether the same command resumes what
    was interrupted."""

    summary: str
    config: str
    run: str
    positional: str = ""
    requires: str = ""
    everyday: bool = False
    resumes: bool = False


COMMANDS = {
    "init": Command(
        "write a commented run.yaml for the rows in a folder",
        "fedlora.config.init:InitRunConfig",
        "fedlora.stages.init:run",
        positional="data_path",
        everyday=True,
    ),
    "plan": Command(
        "time, memory, traffic and faults of the data, before training",
        "fedlora.config.plan:PlanConfig",
        "fedlora.stages.plan:run",
        everyday=True,
    ),
    "train": Command(
        "train one federated method",
        "fedlora.config.train:TrainConfig",
        "fedlora.stages.train:run",
        everyday=True,
        resumes=True,
    ),
    "generate": Command(
        "answer a test file with the base model, the global adapter or a client's",
        "fedlora.config.generate:GenerateConfig",
        "fedlora.stages.generate:run",
        positional="exp_name",
        everyday=True,
        resumes=True,
    ),
    "score": Command(
        "score the answers: exact match, F1, ROUGE and chrF, with intervals and differences",
        "fedlora.config.score:ScoreConfig",
        "fedlora.stages.score:run",
        positional="exp_name",
        everyday=True,
    ),
    "loss": Command(
        "measure the loss of the base model, the global adapter or a client's, without training",
        "fedlora.config.loss:LossConfig",
        "fedlora.stages.loss:run",
        positional="exp_name",
    ),
    "tasks": Command(
        "measure standard tasks of lm-evaluation-harness, with standard errors",
        "fedlora.config.tasks:TasksConfig",
        "fedlora.stages.tasks:run",
        positional="exp_name",
        requires="fedlora.evaluation.tasks.installed:check_library",
        resumes=True,
    ),
    "report": Command(
        "put several runs side by side: tables and plots",
        "fedlora.config.evaluate:ReportConfig",
        "fedlora.stages.report:run",
        positional="exp_names",
        everyday=True,
    ),
    "compare": Command(
        "compare methods over seeds and settings under one budget",
        "fedlora.config.compare:CompareConfig",
        "fedlora.stages.compare:run",
        everyday=True,
        resumes=True,
    ),
    "export": Command(
        "write an adapter for PEFT, vLLM, llama.cpp or Ollama, or a merged model, with a model card",
        "fedlora.config.export:ExportConfig",
        "fedlora.stages.export:run",
        positional="exp_name",
        everyday=True,
    ),
    "import": Command(
        "take over adapters of another program as a run: a PEFT folder, rounds of the reference project or Shepherd",
        "fedlora.config.importing:ImportConfig",
        "fedlora.stages.import_adapter:run",
        positional="folder",
    ),
    "chat": Command(
        "ask the models of a run, side by side, in the terminal or in a browser",
        "fedlora.config.chat:ChatConfig",
        "fedlora.chat_terminal:run",
        positional="exp_name",
        everyday=True,
    ),
    "methods": Command(
        "list the federated methods, or describe one",
        "fedlora.config.methods:MethodsConfig",
        "fedlora.stages.methods:run",
        positional="federation_mode",
    ),
    "methods check": Command(
        "try the laws of federated methods on a method, also on your own",
        "fedlora.config.method_check:MethodCheckConfig",
        "fedlora.stages.methods_check:run",
        positional="federation_mode",
    ),
    "evaluate_llm": Command(
        "let an LLM judge compare two sets of answers",
        "fedlora.config.evaluate:EvaluateLlmConfig",
        "fedlora.stages.evaluate_llm:run",
        positional="exp_name",
        resumes=True,
    ),
    "evaluate_rouge": Command(
        "exact match and ROUGE, as the reference project has them",
        "fedlora.config.evaluate:EvaluateRougeConfig",
        "fedlora.stages.evaluate_rouge:run",
        positional="exp_name",
    ),
    "allocate": Command(
        "split one file of rows into client files and a test file",
        "fedlora.config.data:AllocateConfig",
        "fedlora.stages.allocate:run",
        positional="input_file",
    ),
    "runs": Command(
        "list the runs: state, rounds, best round, size",
        "fedlora.config.runs:RunsConfig",
        "fedlora.stages.runs:run",
    ),
    "watch": Command(
        "watch a run while another process trains it",
        "fedlora.config.runs:WatchConfig",
        "fedlora.stages.watch:run",
        positional="exp_name",
        everyday=True,
    ),
    "track": Command(
        "send a run to experiment trackers: TensorBoard, Weights & Biases, MLflow, trackio",
        "fedlora.config.track:TrackConfig",
        "fedlora.stages.track:run",
        positional="exp_name",
    ),
    "verify": Command(
        "recheck the hashes of a run and recompute its aggregates",
        "fedlora.config.runs:VerifyConfig",
        "fedlora.stages.verify:run",
        positional="exp_name",
    ),
    "reaggregate": Command(
        "combine the stored updates of a run differently, without training",
        "fedlora.config.reaggregate:ReaggregateConfig",
        "fedlora.stages.reaggregate:run",
        positional="exp_name",
    ),
    **{
        name: Command(*row, requires="fedlora.flower.library:check_flower", resumes=name == "flower local")
        for name, row in FLOWER_COMMANDS.items()
    },
    "data skills": Command(
        "write the skills data: short tasks with one right answer",
        "fedlora.config.data:SkillsConfig",
        "fedlora.stages.data_skills:run",
    ),
    "data dolly": Command(
        "fetch databricks-dolly-15k from the hub",
        "fedlora.config.data:DollyConfig",
        "fedlora.stages.data_dolly:run",
    ),
    "data hub": Command(
        "fetch a data set from the hub at a recorded commit",
        "fedlora.config.data:HubConfig",
        "fedlora.stages.data_hub:run",
        positional="repository",
        requires="fedlora.stages.data_hub:check_datasets",
    ),
    "model": Command(
        "install the embedded model, smollm2-135m",
        "fedlora.config.data:ModelConfig",
        "fedlora.stages.model:run",
        positional="name",
    ),
    "model check": Command(
        "try a base model: which faster ways give its own results, and why others do not",
        "fedlora.config.data:ModelCheckConfig",
        "fedlora.stages.model:check",
        positional="base_model",
    ),
    "demo": Command(
        "run the whole pipeline on the embedded model and data",
        "fedlora.config.demo:DemoConfig",
        "fedlora.demo:run",
    ),
}
