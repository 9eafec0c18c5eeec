"""The commands of a federation across machines: rows of the command line's table."""

FLOWER_COMMANDS = {
    "flower init": (
        "make certificates, keys and configurations of a federation across machines",
        "fedlora.flower.flower_config:InitConfig",
        "fedlora.flower.init:run",
    ),
    "flower server": (
        "run the server of a federation across machines",
        "fedlora.flower.flower_config:ServerConfig",
        "fedlora.flower.processes:run_server",
    ),
    "flower node": (
        "run one owner's node",
        "fedlora.flower.node_config:NodeConfig",
        "fedlora.flower.processes:run_node",
    ),
    "flower worker": (
        "run only the part of a node that holds the model; `flower node` starts it",
        "fedlora.flower.node_config:NodeConfig",
        "fedlora.flower.processes:run_worker",
    ),
    "flower run": (
        "train on the connected nodes: takes the configuration of `train`",
        "fedlora.flower.flower_config:SubmitConfig",
        "fedlora.flower.submit:run",
    ),
    "flower status": (
        "the nodes and runs of a server, with the round of each run",
        "fedlora.flower.flower_config:StatusConfig",
        "fedlora.flower.server_runs:run_status",
    ),
    "flower follow": (
        "watch a run on the nodes until it ends",
        "fedlora.flower.flower_config:FollowConfig",
        "fedlora.flower.server_runs:run_follow",
        "run",
    ),
    "flower stop": (
        "end a run on the nodes",
        "fedlora.flower.flower_config:StopConfig",
        "fedlora.flower.server_runs:run_stop",
        "run",
    ),
    "flower local": (
        "server, nodes and a run on this machine, for trying it out",
        "fedlora.flower.flower_config:LocalConfig",
        "fedlora.flower.local:run",
    ),
}
"""Name -> summary, configuration, function, and the field that is given without a flag."""
