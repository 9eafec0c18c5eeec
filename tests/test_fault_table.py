"""Every fault a user can cause, through the command line: exit code, what the message says, nothing lost."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fedlora import cli
from fedlora.files import sha256_of, write_json
from fedlora.runs.checking import describe_files, seal

GOOD = '{"instruction": "say it", "input": "", "output": "word", "category": "c"}'


class Case(NamedTuple):
    """`prepare` changes the world, which is the current folder, before the call."""

    arguments: str
    code: int
    parts: tuple[str, ...]
    prepare: Callable[[Path], Any] = lambda world: None


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Write a file below the world."""

    def write(world: Path) -> None:
        path = world / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def raw(content: str | bytes, code: int, *parts: str, name: str = "rows.jsonl", more: str = "") -> Case:
    """A file of raw rows that allocation is asked to split."""
    arguments = f"allocate --input_file {name} --output_root new --train_per_cat 1 --test_per_cat 1"
    return Case(f"{arguments} {more}", code, (name, *parts), put(name, content))


def row(**fields: Any) -> str:
    """A row on the third line of a file whose other lines are good."""
    given = {"instruction": "i", "input": "x", "output": "o", "category": "c", **fields}
    return f"{GOOD}\n\n" + json.dumps({key: value for key, value in given.items() if value is not ...}) + f"\n{GOOD}\n"


TRAIN = (
    "train --base_model model --base_dtype float32 --device cpu --data_path data --model_dir models --num_clients 3 "
    "--num_communication_rounds 2 --local_batch_size 1 --local_num_epochs 1 --prompt_template chat "
    "--client_selection_frac 1 --local_learning_rate 0.01"
)
GENERATE = (
    "generate --model_dir models --communication_rounds 2 --test_file_path test.jsonl --device cpu "
    "--prediction_dir new --max_new_tokens 2"
)


def train(more: str, code: int, *parts: str, prepare: Callable[[Path], Any] = lambda world: None) -> Case:
    name = "" if "--exp_name" in more else "--exp_name fresh"
    return Case(f"{TRAIN} {name} {more}", code, parts, prepare)


def generate(more: str, code: int, *parts: str, prepare: Callable[[Path], Any] = lambda world: None) -> Case:
    name = "" if "--exp_name" in more else "--exp_name done"
    return Case(f"{GENERATE} {name} {more}", code, parts, prepare)


def config(text: str, code: int, *parts: str) -> Case:
    return Case("train --config run.yaml", code, parts, put("run.yaml", text))


def change(name: str, how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replace what a file of the world holds."""

    def edit(world: Path) -> None:
        path = world / name
        path.write_bytes(how(path.read_bytes()))

    return edit


def flip(content: bytes) -> bytes:
    """One bit in the middle turned over."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def edit_config(**fields: Any) -> Callable[[Path], None]:
    """Other settings beside client 0's adapter."""
    return vouched(change(CONFIG, lambda content: json.dumps({**json.loads(content), **fields}).encode()))


def vouch(world: Path) -> None:
    """Make the round's manifest agree with what lies there now: whoever can write an adapter can write that too."""
    folder = world / "models/done/2"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = describe_files(folder, [folder / name for name in manifest["files"]])
    write_json(folder / "manifest.json", seal(manifest))


def vouched(prepare: Callable[[Path], Any]) -> Callable[[Path], None]:
    """The change, and a manifest that says it was always so."""

    def edit(world: Path) -> None:
        prepare(world)
        vouch(world)

    return edit


class Hostile:
    """Asks whoever unpickles it to make a folder."""

    def __reduce__(self):
        return (os.mkdir, ("canary",))


def replace_adapter(make: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Save something else in the place of client 0's adapter."""

    def save(world: Path) -> None:
        path = world / "models/done/2/client_0/adapter_model.bin"
        torch.save(make(torch.load(path, weights_only=True)), path)
        vouch(world)

    return save


def first(state: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    key = sorted(state)[0]
    return {**state, key: change(state[key])}


def other_library(world: Path) -> None:
    """The run's record, as whole as it was, tells of another torch."""
    path = world / "models/done/run.json"
    record = json.loads(path.read_text())
    record["versions"]["torch"] = "0.1"
    write_json(path, seal(record))


OWN = "--is_global_model false --client_id 0"
ADAPTER = "models/done/2/client_0/adapter_model.bin"
CONFIG = "models/done/2/client_0/adapter_config.json"

CASES: dict[str, Case] = {
    # rows: place, field, what was found
    "D1 a line that is no JSON": raw(f"{GOOD}\n{{'a': 1}}\n", 3, ":2:2: not valid JSON"),
    "D1 text behind a row": raw(f"{GOOD}\n{GOOD} more\n", 3, ":2:", "text after the end of the row"),
    "D1 an array that is not closed": raw(f"[\n{GOOD},\n{GOOD}\n", 3, ":4:1: expected ',' or ']'", name="rows.json"),
    "D1 text behind an array": raw(f"[{GOOD}]\nx", 3, ":2:1: text after the end of the array", name="rows.json"),
    "D1 an empty file": raw("", 3, "empty"),
    "D1 a file of blanks": raw("\r\n  \n", 3, "empty"),
    "D1 an empty array": raw("[]", 3, "holds no rows", name="rows.json"),
    "D1 not UTF-8": raw(GOOD.encode() + b"\n\xff\n", 3, ":2:1: not UTF-8"),
    "D1 no gzip under its name": raw(GOOD, 3, "gzip", name="rows.jsonl.gz"),
    "D1 a cut gzip": raw(gzip.compress(GOOD.encode() * 50)[:-9], 3, "rows.jsonl.gz", name="rows.jsonl.gz"),
    "D1 a CSV without the columns": raw("a,b\n1,2\n", 3, "instruction", name="rows.csv"),
    "D1 a CSV quote that stays open": raw('instruction,output,category\n"i,o,c\n', 3, ":2", name="rows.csv"),
    "D1 a CSV row with too many fields": raw("instruction,output,category\ni,o,c\ni,o,c,d\n", 3, ":3", name="rows.csv"),
    "D1 no Parquet under its name": raw(GOOD, 3, "Parquet", name="rows.parquet"),
    "D12 a pickle as data": raw(pickle.dumps([1]), 3, "rows.pkl", name="rows.pkl"),
    "D12 a program as data": raw("print(1)", 3, "rows.py", name="rows.py"),
    "D2 a field that is missing": raw(row(output=...), 3, ":3:1: the field 'response' or 'output' is missing"),
    "D2 a field that is null": raw(row(instruction=None), 3, ":3:1:", "'instruction' must be text, got null"),
    "D2 a number for text": raw(row(output=7), 3, ":3:1:", "'output' must be text, got a number"),
    "D2 a list for text": raw(row(input=["a"]), 3, ":3:1:", "'input' must be text, got a list"),
    "D2 an object for text": raw(row(category={"a": 1}), 3, ":3:1:", "'category' must be text, got an object"),
    "D2 a truth value for text": raw(row(output=True), 3, ":3:1:", "'output' must be text, got true or false"),
    "D2 two fields for one thing": raw(row(response="other"), 3, ":3:1:", "'response' and 'output' differ"),
    "D2 a row that is a list": raw(f"{GOOD}\n[1]\n", 3, ":2:1:", "expected a JSON object, got a list"),
    "D2 no category where it is needed": raw(row(category=...), 3, ":3:1:", "'category'"),
    "D3 a record above the limit": raw(
        row(output="x" * 5000), 3, ":3:", "max_record_bytes", more="--max_record_bytes 4096"
    ),
    "D3 not a number": raw(f'{GOOD}\n{GOOD[:-1]}, "n": NaN}}\n', 3, ":2:1: NaN is not valid JSON"),
    "D3 a key given twice": raw(f'{GOOD}\n{GOOD[:-1]}, "output": "b"}}\n', 3, ":2:1:", "'output' is given twice"),
    "D3 a number of 5000 digits": raw(f'{GOOD}\n{GOOD[:-1]}, "n": {"7" * 5000}}}\n', 3, ":2:1:", "5000 digits"),
    "D3 nested 100,000 deep": raw(f'{GOOD}\n{GOOD[:-1]}, "n": {"[" * 100_000}\n', 3, ":2:1: nested too deeply"),
    "D4 half a surrogate pair": raw(f'{GOOD}\n{GOOD[:-1]}, "context": "\\ud800"}}\n', 3, ":2:1:", "surrogate"),
    "D1 more bad rows than allowed": raw("x\ny\n" + GOOD, 3, ":2:1:", more="--skip_bad 1"),
    "D8 a category with too few rows": raw(row(), 3, "too few distinct prompts", "c (", more="--test_per_cat 9"),
    "D8 more clients than rows": raw(
        f"{GOOD}\n{GOOD.replace('say', 'do')}\n", 2, more="--num_clients 9 --partition iid"
    )._replace(parts=("num_clients=9",)),
    "data that is not there": Case("allocate --input_file none.json", 2, ("none.json", "fedlora data dolly")),
    # flags and configuration files
    "an unknown command": Case("trian", 2, ("unknown command 'trian'", "did you mean train?")),
    "an unknown flag": train("--lerning_rate 1", 2, "unknown flag --lerning_rate"),
    "an unknown method": train("--federation_mode fedavgg", 2, "federation_mode='fedavgg'", "did you mean fedavgm?"),
    "a rate of zero": train("--local_learning_rate 0", 2, "local_learning_rate='0'"),
    "a rate that is no number": train("--local_learning_rate nan", 2, "local_learning_rate='nan'"),
    "C12 a fraction of zero": train("--client_selection_frac 0", 2, "client_selection_frac='0'"),
    "C12 a fraction above one": train("--client_selection_frac 1.5", 2, "client_selection_frac='1.5'"),
    "no rounds": train("--num_communication_rounds 0", 2, "num_communication_rounds='0'"),
    "a limit that a mode cannot have": train("--federation_mode none --max_update_norm 1", 2, "combines nothing"),
    "the key as a flag": train("--api_key sk-CANARY", 2, "--api_key", "environment"),
    "a configuration that is not there": Case("train --config none.yaml", 2, ("none.yaml",)),
    "a configuration that is no YAML": config("a: [1\nb: }", 2, "run.yaml:"),
    "a field given twice": config("seed: 1\nseed: 2\n", 2, "run.yaml:2: 'seed' is given twice"),
    "a field nobody knows": config("sead: 1\n", 2, "unknown field 'sead'"),
    "F10 code allowed by a file": config("trust_remote_code: true\n", 2, "trust_remote_code cannot be set in a file"),
    # names and places
    "F6 a name that climbs": train("--exp_name ../x", 2, "exp_name='../x' cannot be a folder name"),
    "F6 an absolute name": train("--exp_name /etc/x", 2, "exp_name='/etc/x'"),
    "F6 a reserved name": train("--exp_name CON", 2, "exp_name='CON'"),
    "F6 a name of 300 letters": train(f"--exp_name {'a' * 300}", 2, "exp_name="),
    "F6 a run that is a link to elsewhere": train(
        "--exp_name link", 2, "leads outside", prepare=lambda world: (world / "models/link").symlink_to("/tmp")
    ),
    "a file where models should go": train("--model_dir test.jsonl", 5, "test.jsonl"),
    # what training needs
    "no data folder": train("--data_path none", 2, "none: no such folder"),
    "another number of clients": train("--num_clients 5", 2, "no data for 5 clients", "data/3"),
    "a client's file with a bad row": train(
        "",
        3,
        "local_training_1.json:1:",
        "'output' must be text",
        prepare=change(
            "data/3/local_training_1.json", lambda b: b.replace(b'"output": "south', b'"output": 7, "x": "south', 1)
        ),
    ),
    "a client's file that is gone": train(
        "",
        2,
        "local_training_1.json: no such file",
        prepare=lambda world: (world / "data/3/local_training_1.json").unlink(),
    ),
    "no base model": train("--base_model none", 2, "none"),
    "a layer nobody has": train("--lora_target_modules q_prj", 2, "q_prj"),
    "no room for a response": train("--cutoff_len 8", 2, "cutoff_len=8 leaves no room"),
    "C10 a quorum nobody can reach": train("--min_clients 4", 2, "min_clients=4, but a cohort has 3"),
    "C15 everybody diverges": train(
        "--local_learning_rate 1e39", 4, "round 1: no client gave a usable update", "the loss is not a number", "lower"
    ),
    # runs that are there already
    "F14 another configuration": train(
        "--exp_name done --seed 7", 2, "another configuration (seed: 42 -> 7)", "--overwrite"
    ),
    "F12 another library": train(
        "--exp_name done --num_communication_rounds 3",
        2,
        "another environment",
        "--allow_drift",
        prepare=other_library,
    ),
    "a client's rows that changed": train(
        "--exp_name done --num_communication_rounds 3",
        3,
        "local_training_0.json: not the file that this run was started with",
        prepare=change("data/3/local_training_0.json", lambda b: b.replace(b"say", b"tell")),
    ),
    "F3 a damaged record of the run": train(
        "--exp_name done", 2, "models/done/run.json", prepare=put("models/done/run.json", "{")
    ),
    "a folder of somebody else": train(
        "--exp_name other",
        2,
        "holds files that no run writes (letters.txt)",
        prepare=put("models/other/letters.txt", "dear"),
    ),
    # adapters
    "a run that is not there": generate("--exp_name none", 2, "models/none: no run of this name"),
    "a round that is not there": generate("--communication_rounds 9", 2, "rounds 1-2 have one"),
    "a client that is not there": generate("--is_global_model false --client_id 9", 2, "run done has no client 9"),
    "F3 a flipped bit": generate(OWN, 2, f"{ADAPTER} does not match its hash", prepare=change(ADAPTER, flip)),
    "F2 a cut adapter": generate(OWN, 2, ADAPTER, prepare=vouched(change(ADAPTER, lambda content: content[:-100]))),
    "F2 an empty adapter": generate(OWN, 2, ADAPTER, prepare=vouched(change(ADAPTER, lambda content: b""))),
    "F7 a hostile pickle": generate(
        OWN, 2, ADAPTER, prepare=vouched(change(ADAPTER, lambda content: pickle.dumps(Hostile())))
    ),
    "F7 a hostile archive": generate(OWN, 2, ADAPTER, prepare=replace_adapter(lambda state: {"a": Hostile()})),
    "F8 a header that lies": generate(
        "",
        2,
        "adapter_model.safetensors",
        prepare=vouched(
            change("models/done/2/adapter_model.safetensors", lambda content: b"\xff" * 7 + b"\x00" + content[8:])
        ),
    ),
    "C2 a missing factor": generate(
        OWN,
        2,
        ADAPTER,
        "missing",
        prepare=replace_adapter(lambda state: {key: state[key] for key in sorted(state)[1:]}),
    ),
    "C3 a transposed factor": generate(
        OWN, 2, ADAPTER, "shape", prepare=replace_adapter(lambda state: first(state, lambda x: x.T.contiguous()))
    ),
    "C1 a factor that is not finite": generate(
        OWN, 2, ADAPTER, "finite", prepare=replace_adapter(lambda state: first(state, lambda x: x / 0))
    ),
    "C4 a factor of whole numbers": generate(
        OWN, 2, ADAPTER, prepare=replace_adapter(lambda state: first(state, torch.Tensor.int))
    ),
    "C4 a factor of a trillion zeros": generate(
        OWN, 2, ADAPTER, prepare=replace_adapter(lambda state: first(state, lambda x: torch.zeros(1).expand(10**12)))
    ),
    "F9 a rank of a billion": generate(OWN, 2, CONFIG, "r", prepare=edit_config(r=10**9)),
    "F9 layers by a pattern": generate(OWN, 2, CONFIG, "target_modules", prepare=edit_config(target_modules="(a+)+$")),
    "F9 a module to import": generate(
        OWN, 2, CONFIG, "auto_mapping", prepare=edit_config(auto_mapping={"parent_library": "os"})
    ),
    # answers and scores
    "a test file with a bad row": generate(
        "", 3, "test.jsonl:7:1:", prepare=change("test.jsonl", lambda b: b + b'{"output": 1}\n')
    ),
    "J12 answers that do not fit": Case(
        "evaluate_rouge --exp_name done --communication_rounds 2 --target_file test.jsonl "
        "--prediction_dir p --evaluation_dir new",
        3,
        ("test.jsonl",),
        put("p/done/2/global_output.jsonl", '{"instruction": "x", "input": "", "answer": "y", "category": "c0"}\n'),
    ),
    "no answers": Case(
        "evaluate_rouge --exp_name none --target_file test.jsonl",
        2,
        ("no round has predictions of global", "fedlora generate"),
    ),
    "S2 a judge without encryption": Case("evaluate_llm --base_url http://example.com/v1", 2, ("base_url", "https")),
    "a report about nothing": Case("report --exp_names none --model_dir models", 2, ("no run under", "none")),
    # the store
    "F3 verify finds a flipped bit": Case(
        "verify done --model_dir models",
        5,
        ("models/done/1/global_adapter_model.bin",),
        change("models/done/1/global_adapter_model.bin", flip),
    ),
    "verify without a run": Case("verify none --model_dir models", 2, ("models/none: no run of this name",)),
    "a share of the weights that nobody can have": train("--max_client_weight 0.1", 2, "max_client_weight=0.1", "1/3"),
    "a plan in the place of another file": Case(
        TRAIN.replace("train", "plan", 1) + " --probe false --plan_file test.jsonl",
        2,
        ("test.jsonl: a file of this name",),
    ),
    "a plan where only runs write": Case(
        TRAIN.replace("train", "plan", 1) + " --probe false --plan_file models/plan.json", 2, ("lies under model_dir",)
    ),
    # plan refuses what train would refuse
    "plan without data": Case(TRAIN.replace("train", "plan", 1) + " --data_path none", 2, ("none: no such folder",)),
    "plan with a quorum nobody can reach": Case(
        TRAIN.replace("train", "plan", 1) + " --min_clients 4", 2, ("min_clients=4, but a cohort has 3",)
    ),
}


@pytest.fixture(scope="module")
def pristine(tiny_model, tmp_path_factory):
    """A finished run of two rounds with its data, its model and a test file."""
    world = tmp_path_factory.mktemp("pristine")
    shutil.copytree(tiny_model, world / "model")
    words = ("north", "south", "east")
    for client, word in enumerate(words):
        rows = [
            {"instruction": f"say {word} {n}", "input": "", "output": word * (1 + n), "category": f"c{client}"}
            for n in range(3)
        ]
        put(f"data/3/local_training_{client}.json", json.dumps(rows))(world)
    tests = [{"instruction": f"say {n}", "input": "", "output": "x", "category": f"c{n % 2}"} for n in range(6)]
    put("test.jsonl", "".join(json.dumps(one) + "\n" for one in tests))(world)
    here = Path.cwd()
    os.chdir(world)
    try:
        assert cli.main([*TRAIN.split(), "--exp_name", "done"]) == 0
    finally:
        os.chdir(here)
    return world


def hashes(world: Path) -> dict[str, str]:
    return {path.relative_to(world).as_posix(): sha256_of(path) for path in sorted(world.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_has_its_exit_code_says_where_and_what_to_do_and_loses_nothing(
    pristine, name, tmp_path, capsys, monkeypatch
):
    case = CASES[name]
    world = tmp_path / "world"
    shutil.copytree(pristine, world)
    case.prepare(world)
    before = hashes(world)
    monkeypatch.chdir(world)
    code = cli.main(case.arguments.split())
    told = capsys.readouterr().err
    assert code == case.code, told
    for part in case.parts:
        assert part in told
    assert told.count("error: ") == 1
    assert "\n  hint: " in told
    assert "Traceback" not in told
    assert "Config=" not in told
    after = hashes(world)
    assert {name: after.get(name) for name in before} == before
    assert not (world / "canary").exists()


def test_the_table_has_its_sixty_rows_and_every_exit_code_of_the_user():
    assert len(CASES) >= 60
    assert {case.code for case in CASES.values()} >= {2, 3, 4, 5}


def test_the_hostile_pickle_of_the_table_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "canary").exists()
