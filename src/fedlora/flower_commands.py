"""The commands of a federation across machines: rows of the command line's table."""

FLOWER_COMMANDS = {
    "flower init": (
        "make certificates, keys and configurations of a federation across machines",
        "fedlora.config.flower:InitConfig",
        "fedlora.stages.flower_init:run",
    ),
    "flower server": (
        "run the server of a federation across machines",
        "fedlora.config.flower:ServerConfig",
        "fedlora.stages.flower_processes:run_server",
        "config",
    ),
    "flower node": (
        "run one owner's node",
        "fedlora.config.node:NodeConfig",
        "fedlora.stages.flower_processes:run_node",
        "config",
    ),
    "flower worker": (
        "run only the part of a node that holds the model; `flower node` starts it",
        "fedlora.config.node:NodeConfig",
        "fedlora.stages.flower_processes:run_worker",
        "config",
    ),
    "flower run": (
        "train on the connected nodes: the configuration of `train`",
        "fedlora.config.flower:SubmitConfig",
        "fedlora.stages.flower_submit:run",
    ),
    "flower status": (
        "nodes and runs of a server",
        "fedlora.config.flower:StatusConfig",
        "fedlora.stages.flower_submit:run_status",
    ),
    "flower follow": (
        "show a run on the nodes until it ends",
        "fedlora.config.flower:FollowConfig",
        "fedlora.stages.flower_submit:run_follow",
        "run",
    ),
    "flower stop": (
        "end a run on the nodes",
        "fedlora.config.flower:StopConfig",
        "fedlora.stages.flower_submit:run_stop",
        "run",
    ),
    "flower local": (
        "server, nodes and a run on this machine, for trying it out",
        "fedlora.config.flower:LocalConfig",
        "fedlora.stages.flower_local:run",
    ),
}
"""Name -> summary, configuration, function, and the field that is given without a flag."""
