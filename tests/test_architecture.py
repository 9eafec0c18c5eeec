"""The shape of the package, read from its source: who may import whom, and who may write files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.methods.table import METHODS

PACKAGE = Path(__file__).parent.parent / "src" / "fedlora"
FLOORS = [
    *("ground", "data", "federated", "methods", "llm", "evaluation", "reporting", "runs", "engines", "stages", "doors"),
]
DOORS = {
    "__init__",
    "api",
    "cli",
    "command_help",
    "command_table",
    "flags",
    "demo",
    "live_output",
    "chat_terminal",
    "__main__",
}
FEATURES = {"comparing", "planning", "flower", "training", "laws", "exporting", "watching", "tracking", "chatting"}
"""Folders of the stages' floor: a stage calls a feature, and a feature may run stages."""
GROUND_INSIDE = {
    *("flower.commands", "flower.flower_config", "flower.node_config", "flower.folders"),
    *("methods.row", "methods.rows", "methods.options", "methods.table", "methods.combinations"),
    *("methods.outside", "methods.own_options", "methods.source"),
}
"""Modules that lie with their feature, and that the entry points read without loading it."""
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def floor_of(module: str) -> int:
    """Height of a module named without the leading `fedlora.`."""
    first = module.split(".")[0]
    if ".".join(module.split(".")[:2]) in GROUND_INSIDE:
        return FLOORS.index("ground")
    if first in FEATURES:
        return FLOORS.index("stages")
    if first in DOORS:
        return FLOORS.index("doors")
    return FLOORS.index(first) if first in FLOORS else FLOORS.index("ground")


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in `tree`, inside functions too; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers_of(*packages: str) -> set[str]:
    """Modules that import one of `packages` or anything inside it."""
    prefixes = tuple(f"{package}." for package in packages)
    return {
        module for module, tree in MODULES.items() if any(f"{name}.".startswith(prefixes) for name in imports_of(tree))
    }


def on_floor(*floors: str) -> set[str]:
    return {module for module in MODULES if FLOORS[floor_of(module)] in floors}


def test_a_floor_imports_only_from_itself_and_below():
    inside = {
        module: [name.removeprefix("fedlora.") for name in imports_of(tree) if name.startswith("fedlora.")]
        for module, tree in MODULES.items()
    }
    assert sum(map(len, inside.values())) > 500, "the imports are not seen"
    above = {module: [name for name in names if floor_of(name) > floor_of(module)] for module, names in inside.items()}
    assert not {module: names for module, names in above.items() if names}


def test_only_llm_knows_the_model_libraries():
    assert not importers_of("transformers", "peft") - on_floor("llm")


def test_only_the_package_of_standard_tasks_knows_their_library():
    assert {module.rpartition(".")[0] for module in importers_of("lm_eval")} == {"evaluation.tasks"}


def test_only_its_own_module_knows_a_tracker():
    trackers = ("tensorboard", "wandb", "mlflow", "trackio")
    assert importers_of(*trackers) == {f"tracking.{tracker}_tracker" for tracker in trackers}


def test_only_the_feature_across_machines_knows_flower():
    assert not {module for module in importers_of("flwr") if not module.startswith("flower.")}
    outside = {module for module in importers_of("fedlora.flower") if not module.startswith("flower.")}
    assert outside == {"command_table"}


def test_data_and_ground_work_without_torch():
    assert not importers_of("torch") & on_floor("data", "ground") - {"types"}


def test_federated_has_no_files_and_no_clock():
    impure = importers_of("os", "io", "pathlib", "shutil", "tempfile", "time", "datetime", "numpy", "safetensors")
    assert not impure & on_floor("federated")
    assert not importers_of("fedlora.files") & on_floor("federated")


def test_no_module_draws_from_python_s_global_random_state():
    drawn = {
        f"{module}: random.{node.attr}"
        for module, tree in MODULES.items()
        # the library of standard tasks draws from it: its seed is set, and what it was put back
        if module != "evaluation.tasks.quiet_library"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "random" and node.attr != "Random"
    }
    assert not drawn


def test_only_the_command_line_parses_arguments():
    assert not importers_of("argparse", "shtab") - {"cli", "flags"}


def test_nothing_unpickles():
    """No module asks for code out of a file: not by pickle and its kin, not by those who call it.

    `pickletools` takes a pickle apart and runs nothing; one module reads the listing of a `.bin` file with it.
    """
    assert importers_of("pickletools") == {"llm.bin_listing"}
    unpicklers = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
    assert not importers_of(*unpicklers)
    called = {
        f"{module}: {ast.unparse(node)}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load")
    }
    assert not called
    assert not [name for module in MODULES for name in imports_of(MODULES[module]) if name == "torch.load"]


def test_no_module_evaluates_text():
    called = {
        f"{module}: {ast.unparse(node)}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("eval", "exec", "compile", "os.system", "__import__")
    }
    assert not called


NAMED = {
    ("config.compare", "homo"): "the default",
    ("config.compare", "seq"): "the default of curves",
    ("config.train_fields", "homo"): "the default",
    ("demo", "homo"): "the demo's list",
    ("demo", "seq"): "the demo's list",
    ("demo", "none"): "the demo's list",
    ("demo", "pooled"): "the demo's list",
    ("laws.run_laws", "pooled"): "the trainer that one step of all clients is compared with",
    ("laws.run_laws", "none"): "a client keeps no factors",
    ("laws.promises", "none"): "a client keeps no factors",
    ("paths", "pooled"): "the folder of the one trainer",
    ("reporting.detail_rows", "none"): "an adapter that is not there",
    ("llm.adapter_config", "none"): "PEFT's bias",
    ("evaluation.tasks.task_scores", "none"): "lm-eval's filter that does nothing",
    **{(module, "none"): "torch's loss of each label" for module in ("llm.loss", "llm.fast.fast_layers")},
    ("runs.saved_adapters", "none"): "no round",
    **{
        (module, "none"): "no quantisation"
        for module in (
            *(
                "config.train_fields",
                "config.generate",
                "config.tasks",
                "llm.base_model",
                "llm.footprint",
                "llm.quantization",
            ),
            *("config.chat", "config.data", "runs.environment", "engines.answerers", "planning.run_plan"),
            *("config.importing", "exporting.exported"),
        )
    },
}
"""Where a string is a method's name outside `methods/`, and what it is there."""


def test_no_method_is_named_outside_its_table():
    found = {
        (module, node.value)
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if not module.startswith("methods.") and isinstance(node, ast.Constant) and node.value in METHODS
    }
    assert found == NAMED.keys()


def test_no_module_is_longer_than_300_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path.relative_to(PACKAGE)): length for path, length in lengths.items() if length > 300}


def writes_of(tree: ast.AST) -> Iterator[str]:
    """Calls that write to a path themselves instead of leaving it to fedlora.files."""
    buffers = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "BytesIO" in ast.dump(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        texts = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        last = name.split(".")[-1]
        opened = last in ("open", "fdopen") and any(re.fullmatch("[rbt+]*[wax+][bt+]*", text) for text in texts)
        written = name.endswith((".write_text", ".write_bytes")) and not name.startswith("files.")
        saved = name == "torch.save" and (len(call.args) < 2 or ast.unparse(call.args[1]) not in buffers)
        if opened or written or saved or last == "save_file" or name == "json.dump":
            yield ast.unparse(call)


def test_files_are_written_by_the_one_atomic_writer():
    found = {module: list(writes_of(MODULES[module])) for module in set(MODULES) - {"files"} - on_floor("runs")}
    assert not {module: calls for module, calls in found.items() if calls}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("open(p, 'w')", 1),
        ("p.open('ab')", 1),
        ("p.open(mode='x')", 1),
        ("os.fdopen(d, 'wb')", 1),
        ("p.write_text(t)", 1),
        ("torch.save(s, p)", 1),
        ("save_file(s, p)", 1),
        ("json.dump(v, h)", 1),
        ("p.open()\nopen(p, 'rb')\np.open('r', encoding='utf-8')", 0),
        ("files.write_text(p, t)\nwrite_json(p, v)\nb = io.BytesIO()\ntorch.save(s, b)", 0),
    ],
)
def test_the_rule_on_writing_sees_what_it_should(source, count):
    assert len(list(writes_of(ast.parse(source)))) == count


PRINTERS = {
    "cli",
    "flags",
    "console",
    "flower.server",
    "live_output",
    "chat_terminal",
    "evaluation.tasks.quiet_library",
}
"""The command line, messages, the line that tells the exit code of Flower's app, of which only its output comes back,
and what keeps another library's prints away."""


def prints_of(tree: ast.AST) -> Iterator[str]:
    """Everything that reaches for standard output."""
    for node in ast.walk(tree):
        named = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.split(".")[-1] in ("print", "redirect_stdout") or named in ("sys.stdout", "sys.__stdout__"):
            yield ast.unparse(node)


def test_only_the_command_line_prints():
    printing = {module: list(prints_of(tree)) for module, tree in MODULES.items() if list(prints_of(tree))}
    assert set(printing) <= PRINTERS, printing


def settings_of(tree: ast.AST) -> Iterator[str]:
    """Fields that are set on any object but the one whose method it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) != "self":
            yield ast.unparse(node)


FOREIGN = {
    "__init__": "the class of the package's own module",
    "api.signatures": "signature and docstring of the public functions",
    "flags": "argparse's parsers",
    "flower.guard": "Flower's own modules, whose commands are narrowed",
    "laws.linear_federation": "gradients of torch's parameters",
    "redaction": "records of the logging module",
    "stopping": "a timer's flag",
}
"""Modules that set fields of objects of other libraries; torch's, in llm, are not listed."""


def test_nothing_is_set_on_an_object_from_outside():
    found = {module: list(settings_of(tree)) for module, tree in MODULES.items() if list(settings_of(tree))}
    assert not {module: lines for module, lines in found.items() if module not in FOREIGN and module[:4] != "llm."}
