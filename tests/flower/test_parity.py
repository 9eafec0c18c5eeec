"""Nodes of a Grid give the bytes of a simulation, and only what may travel does."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from kinds_of_memory import one_of_each_kind
from small_federation import SIZES, Federation, adapters

from fedlora.config.runs import VerifyConfig
from fedlora.engines.messages import unpack
from fedlora.errors import UsageError
from fedlora.federated.adapters import fingerprint, shapes_of
from fedlora.llm.adapter_files import BIN_NAME, load_adapter
from fedlora.methods.choosing import load_method
from fedlora.methods.table import METHODS
from fedlora.paths import OutputName, RunPaths
from fedlora.runs.saved_adapters import adapter_file
from fedlora.stages import verify


@pytest.fixture
def federation(tiny_model, make_clients, tmp_path):
    return Federation(tmp_path, make_clients(SIZES), tiny_model)


def shared(files: dict[str, str]) -> dict[str, str]:
    """What the server has in both: global adapters and its state."""
    return {name: digest for name, digest in files.items() if name.count("/") == 1}


ALL = {"client_selection_strategy": "all"}
OPTIONS = {
    "zeropad": {"client_ranks": "4,2,1"},
    "hetlora": {"client_ranks": "4,2,3", "prune_to": 0.5},
    "flexlora": {"client_ranks": "4,2,1"},
    "fedex": {"residual_rank": 2},
    "krum": {**ALL, "num_hostile": 0},
    "multi_krum": {**ALL, "krum_selected": 2, "num_hostile": 0},
    **dict.fromkeys(("median", "trimmed_mean", "geometric_median"), ALL),
}
"""What makes a method do what it is there for."""


@pytest.mark.parametrize("mode", one_of_each_kind(name for name in METHODS if name != "pooled"))
def test_every_method_gives_the_bytes_of_a_simulation_and_what_is_a_client_s_own_stays_with_it(federation, mode):
    options = {"num_communication_rounds": 3, "client_selection_strategy": "random", "client_selection_frac": 0.5}
    options |= OPTIONS.get(mode, {})
    here = federation.simulate("here", mode, **options)
    there = federation.serve("there", mode, **options)
    assert shared(adapters(there)) == shared(adapters(here))
    assert len(shared(adapters(here))) >= (0 if mode == "none" else 3)
    assert not list(there.rglob("private"))
    own = [place for place in here.rglob("client_*") if is_own(place)]
    assert bool(own) == (load_method(mode).client.own_ranks > 0)
    for place in here.rglob("client_*"):
        name, number = place.relative_to(here), int(place.parent.name)
        file = there / name / BIN_NAME
        if place not in own:
            assert file.read_bytes() == (place / BIN_NAME).read_bytes()
            continue
        assert not file.exists()
        client = int(place.name.removeprefix("client_"))
        kept = federation.nodes[client]._run.store.read_memory(client, last_trained(here, client, number)).adapter
        assert fingerprint(kept) == fingerprint(load_adapter(place / BIN_NAME, shapes_of(kept)))
    verify.run(VerifyConfig.of(exp_name="there", model_dir=there.parent))


def is_own(place: Path) -> bool:
    """Whether a client's folder of a round holds a model of its own: carried there, or kept with its update."""
    file = place / "update.json"
    return not file.is_file() or json.loads(file.read_text())["keeps_adapter"]


def last_trained(run: Path, client: int, number: int) -> int:
    return max(n for n in range(1, number + 1) if (run / str(n) / f"client_{client}" / "update.json").is_file())


@pytest.mark.parametrize("mode", ["none", "ditto", "finetune"])
def test_a_model_that_is_not_here_is_not_taken_for_another(federation, mode):
    run = federation.serve("there", mode)
    paths = RunPaths(run.parent, "there")
    with pytest.raises(UsageError, match="the model of client 1 is personal and stays on its node"):
        adapter_file(paths, 2, OutputName("client", 1))


@pytest.mark.parametrize("mode", ["none", pytest.param("fedsa", marks=pytest.mark.thorough)])
def test_an_owner_may_let_its_adapter_out(federation, mode):
    here = federation.simulate("here", mode)
    there = federation.serve("there", mode, federation.grid(share_own_adapter=True))
    assert adapters(there) == adapters(here)
    verify.run(VerifyConfig.of(exp_name="there", model_dir=there.parent))


def test_a_run_may_grow_and_another_of_the_same_settings_begins_anew(federation):
    options = {"num_communication_rounds": 3}
    here = federation.simulate("here", "none", **options)
    grid = federation.grid(share_own_adapter=True)
    assert federation.serve("there", "none", grid) == federation.serve("there", "none", grid, **options)
    other = federation.serve("other", "none", grid, **options)
    assert adapters(here.parent / "there") == adapters(other) == adapters(here)
    assert len({path.parent for path in (federation.root / "nodes" / "0").rglob("*.update")}) == 2


def test_kept_moments_stay_with_the_client(federation):
    here = federation.simulate("here", optimizer_state="keep")
    there = federation.serve("there", optimizer_state="keep")
    assert shared(adapters(there)) == shared(adapters(here))
    assert not list(there.rglob("private"))


def test_rows_held_back_are_validated_where_they_lie(federation):
    here = federation.simulate("here", local_val_set_size=1)
    there = federation.serve("there", local_val_set_size=1)
    assert shared(adapters(there)) == shared(adapters(here))
    rows = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["kind"] == "client"]
    assert len(told) == 6
    assert all(row["val_loss_before"] != row["val_loss_after"] for row in told)


@pytest.mark.thorough
def test_a_share_of_the_rows_is_held_out_on_the_nodes_as_in_a_simulation(federation):
    here, there = federation.simulate("here", test_share=0.4), federation.serve("there", test_share=0.4)
    assert shared(adapters(there)) == shared(adapters(here))
    counts = [
        [(client["num_examples"], client.get("num_test", 0)) for client in json.loads(file.read_text())["clients"]]
        for file in (here / "run.json", there / "run.json")
    ]
    assert counts[0] == counts[1] == [(2, 1), (1, 1), (2, 2)]


@pytest.fixture
def heard(federation):
    """Client -> what its training requests brought of the additions to the base: versions, or "all"."""

    def read() -> dict[int, list[object]]:
        found: dict[int, list[object]] = {}
        for client, request in federation.asked:
            header, groups = unpack(request)
            if header["more"]["kind"] == "train":
                versions = [int(name.removeprefix("increment:")) for name in groups if name.startswith("increment:")]
                found.setdefault(client, []).append("all" if groups["base"] is not None else versions)
        return found

    return read


COHORTS = {1: (0, 1), 2: (0, 1), 3: (0, 2), 4: (0, 1), 5: (0, 1)}


@pytest.mark.parametrize("mode", ["fedex", pytest.param("flora", marks=pytest.mark.thorough)])
def test_a_node_is_sent_the_additions_to_the_base_that_it_misses(federation, heard, mode, monkeypatch):
    monkeypatch.setattr("fedlora.engines.rounds.choose_cohort", lambda config, method, clients, number: COHORTS[number])
    options = {"num_communication_rounds": 5, "lora_r": 1}
    here = federation.simulate("here", mode, **options)
    there = federation.serve("there", mode, **options)
    assert adapters(there) == adapters(here)
    assert heard() == {0: ["all", [1], [2], [3], [4]], 1: ["all", [1], [2, 3], [4]], 2: ["all"]}
    assert bytes_down(there) == bytes_down(here)


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.thorough), "feddpa"])
def test_an_owner_finds_its_own_model_where_peft_reads_it(federation, mode, tiny_model):
    import peft
    import transformers

    here = federation.simulate("here", mode)
    federation.serve("there", mode)
    (folder,) = (federation.root / "nodes" / "2").rglob("model")
    loaded = []
    for place in (folder, here / "2" / "client_2"):
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
        loaded.append(fingerprint(peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, place))))
    assert loaded[0] == loaded[1]
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def bytes_down(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["bytes_down"] for row in rows if row["kind"] == "client"]


def test_nodes_that_started_anew_have_the_additions_and_one_that_lost_them_is_sent_all(federation, heard):
    options = {"num_communication_rounds": 4}
    here = federation.simulate("here", "fedex", **options)
    there = federation.serve("there", "fedex", num_communication_rounds=2)
    federation.asked.clear()
    federation.nodes[1]._run.store.paths.base_file.unlink()
    content = bytearray((damaged := federation.nodes[2]._run.store.paths.base_file).read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert federation.serve("there", "fedex", **options) == there
    assert adapters(there) == adapters(here)
    assert heard() == {0: [[2], [3]], 1: [[2], "all", [3]], 2: [[2], "all", [3]]}


def test_an_answer_that_was_trained_on_another_base_is_refused(federation):
    import dataclasses

    from fedlora.engines.messages import pack_outcome, unpack_outcome
    from fedlora.flower.codec import from_content, to_content

    def lie(honest):
        def handle(message):
            answer = honest(message)
            if message.metadata.message_type != "train":
                return answer
            outcome, more = unpack_outcome(from_content(answer.content))
            other = dataclasses.replace(outcome, base_sha256="0" * 64)
            return type(answer)(to_content(pack_outcome(other, more)), reply_to=message)

        return handle

    run = federation.serve("lying", "fedex", grid=federation.grid({1: lie}), num_communication_rounds=1)
    (failure,) = json.loads((run / "1" / "manifest.json").read_text())["quarantined"]
    assert (failure["client_id"], failure["kind"]) == (1, "invalid")
