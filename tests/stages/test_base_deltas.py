"""Runs that add to their base: what lies in the rounds, what PEFT makes of it, who stands on what, what is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedlora.config.generate import GenerateConfig
from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.engines.answering import Answering
from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import shapes_of
from fedlora.federated.base_delta import dense_key
from fedlora.files import json_text, sha256_of
from fedlora.llm.adapter_config import load_spec
from fedlora.llm.base_model import load_base_model
from fedlora.llm.lora import LoraModel
from fedlora.methods.choosing import choose_method
from fedlora.paths import RunPaths
from fedlora.planning.forecast import draw_waves
from fedlora.planning.growth import forecast_growth
from fedlora.runs.base_chain import BASE_NAME, load_base
from fedlora.runs.checking import describe_files, seal
from fedlora.runs.server_state import load_groups
from fedlora.stages import generate, train, verify

MODES = ("fedex", "flora")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def start(tiny_model, tmp_path_factory):
    """Train three of four clients in each of three rounds."""
    from tiny_run import make_client_files

    root = tmp_path_factory.mktemp("base_deltas")
    make_client_files(root / "data", [3, 2, 4, 3])
    shutil.copyfile(root / "data/4/local_training_0.json", root / "held_out.json")

    def run(name: str, mode: str, **changes) -> Path:
        return train.run(config_of(name, mode, **changes)).root

    def config_of(name: str, mode: str, **changes) -> TrainConfig:
        options = {
            "exp_name": name,
            "federation_mode": mode,
            "base_model": str(tiny_model),
            "base_dtype": "float32",
            "data_path": root / "data",
            "val_data_path": str(root / "held_out.json"),
            "model_dir": root / "models",
            "client_selection_strategy": "round_robin",
            "client_selection_frac": 0.75,
            "num_communication_rounds": 3,
            "num_clients": 4,
            "lora_r": 2,
            "local_batch_size": 2,
            "local_num_epochs": 2,
            "local_learning_rate": 3e-2,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }
        return TrainConfig.of(**options)

    run.config_of = config_of
    run.root = root
    return run


@pytest.fixture(scope="module")
def trained(start):
    return {mode: start(mode, mode) for mode in MODES}


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of a run that may be damaged."""

    def copy(mode: str) -> Path:
        shutil.copytree(trained[mode], tmp_path / "models" / mode)
        return tmp_path / "models" / mode

    return copy


def check(run: Path) -> None:
    verify.run(VerifyConfig.of(exp_name=run.name, model_dir=run.parent))


def manifest(run: Path, number: int) -> dict:
    return json.loads((run / f"{number}/manifest.json").read_text())


def hashes(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent != run and ".damaged" not in str(path)
    }


def rounds_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "round" and row["round"] > 0]


def logits_of(run: Path, number: int, model: str) -> torch.Tensor:
    """With the additions beside the base, and the server's adapter on top of them."""
    adapter = load_groups(run / f"{number}/state.safetensors")["adapter"]
    base = load_base(RunPaths(run.parent, run.name), number)
    lora = LoraModel(
        load_base_model(model, device="cpu", dtype="float32").model, load_spec(run / f"{number}/adapter_config.json")
    )
    lora.set_background(base.background)
    lora.set_adapter(adapter)
    with torch.no_grad():
        return lora.model(IDS).logits


def peft_logits(folder: Path, model: str) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder).eval()
    with torch.no_grad():
        return theirs(IDS).logits


@pytest.mark.parametrize("mode", MODES)
def test_every_round_is_one_peft_adapter_that_answers_as_base_additions_and_adapter_do(trained, mode, tiny_model):
    run, scaling = trained[mode], 16 / 2
    for number in (1, 3):
        spec = load_spec(run / f"{number}/adapter_config.json")
        facts = manifest(run, number)["export"]
        assert (spec.r, spec.scaling) == (facts["rank"], pytest.approx(scaling))
        assert spec.r > 2
        assert facts["relative_error"] == 0.0
        found = peft_logits(run / str(number), str(tiny_model))
        torch.testing.assert_close(logits_of(run, number, str(tiny_model)), found, rtol=1e-4, atol=1e-4)
    binary = torch.load(run / "3/global_adapter_model.bin", weights_only=True)
    assert all(spec.r in value.shape for value in binary.values())


def test_layers_become_dense_in_these_runs(trained):
    """So that what these tests say holds for both forms: v first, for it is the smaller layer."""
    keys = {mode: sorted(load_base(RunPaths(trained[mode].parent, mode), 3).background) for mode in MODES}
    assert all(key.endswith(dense_key("")) for key in keys["flora"])
    assert {".delta." in key for key in keys["fedex"] if "v_proj" in key} == {True}
    assert {".delta." in key for key in keys["fedex"] if "q_proj" in key} == {False}


def test_conv1d_layers_take_the_same_additions(start, tiny_model, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "gpt2")
    run = start("gpt2", "fedex", base_model=str(tmp_path / "gpt2"), lora_target_modules=("c_attn", "c_fc"))
    assert json.loads((run / "3/adapter_config.json").read_text())["fan_in_fan_out"]
    found = peft_logits(run / "3", str(tmp_path / "gpt2"))
    torch.testing.assert_close(logits_of(run, 3, str(tmp_path / "gpt2")), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_each_round_holds_what_it_added_and_its_place_in_the_chain(trained, mode):
    run, tip = trained[mode], None
    for number in (1, 2, 3):
        facts = manifest(run, number)
        assert BASE_NAME in facts["files"]
        assert facts["base_delta"]["version"] == number
        assert facts["base_delta"]["parent_sha256"] == tip
        records = [json.loads(path.read_text()) for path in sorted((run / str(number)).glob("*/update.json"))]
        assert [record.get("base_sha256") for record in records] == [tip] * 3
        tip = facts["base_delta"]["sha256"]
        base = load_base(RunPaths(run.parent, run.name), number)
        assert base.sha256 == tip
    assert load_base(RunPaths(run.parent, run.name), 0).links == ()


def test_one_client_alone_adds_nothing_in_fedex(start):
    run = start("alone", "fedex", client_selection_frac=0.2, num_communication_rounds=1)
    assert not (run / f"1/{BASE_NAME}").exists()
    assert manifest(run, 1)["base_delta"]["sha256"] is None
    assert manifest(run, 1)["export"] == {"rank": 2, "relative_error": 0.0}
    check(run)


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_on_the_way_are_those_of_the_formula_and_of_the_plan(start, trained, mode):
    """q: 32x32, v: 16x32, two layers each; FedEx adds (K-1) r = 4 ranks, FLoRA K r = 6."""
    run = trained[mode]
    q, v = 64, 48
    per_adapter = 2 * 2 * (q + v)
    rank = {"fedex": 4, "flora": 6}[mode]
    own = {"fedex": per_adapter, "flora": 0}[mode]

    def since(done: int, missed: int) -> int:
        """Numbers that a client needs that has missed so many of `done` increments."""
        held = [min(done * rank * size, matrix) for size, matrix in ((q, 1024), (v, 512))]
        return 2 * sum(min(missed * rank * size, most) for size, most in zip((q, v), held, strict=True))

    # who takes part: 0 1 2, then 3 0 1, then 2 3 0
    base = [0, since(1, 1) * 3, since(2, 2) + since(2, 1) * 2]
    rows = rounds_of(run)
    assert [row["cohort"] for row in rows] == [[0, 1, 2], [0, 1, 3], [0, 2, 3]]
    assert [row["bytes_down"] for row in rows] == [4 * (3 * own + more) for more in base]
    assert {row["bytes_up"] for row in rows} == {4 * 3 * per_adapter}
    config = start.config_of("planned", mode)
    shapes = shapes_of(torch.load(run / "1/client_0/adapter_model.bin", weights_only=True))
    growth = forecast_growth(config, choose_method(config), draw_waves(config, choose_method(config), range(4)), shapes)
    assert list(growth.down) == [4 * more for more in base]
    held = load_base(RunPaths(run.parent, run.name), 3).background
    assert growth.held == sum(value.numel() for value in held.values())
    for number, size in enumerate(growth.disk, start=1):
        names = (BASE_NAME, "state.safetensors", "adapter_model.safetensors", "global_adapter_model.bin")
        taken = sum((run / f"{number}/{name}").stat().st_size for name in names)
        fedavg = (run / f"{number}/client_0/adapter_model.bin").stat().st_size
        assert taken - 2 * fedavg <= size <= 1.5 * taken


def test_methods_that_add_nothing_do_not_grow(start, trained):
    shapes = shapes_of(torch.load(trained["fedex"] / "1/client_0/adapter_model.bin", weights_only=True))
    for mode in ("homo", "none", "fedsvd"):
        config = start.config_of("planned", mode)
        assert (
            forecast_growth(
                config, choose_method(config), draw_waves(config, choose_method(config), range(4)), shapes
            ).held
            == 0
        )


def test_a_limit_on_the_exported_rank_cuts_the_file_and_nothing_else(start, trained):
    run = start("cut", "fedex", export_rank=3)
    whole, cut = rounds_of(trained["fedex"]), rounds_of(run)
    assert [row["val_loss"] for row in cut] == [row["val_loss"] for row in whole]
    assert [row["loss"] for row in cut] == [row["loss"] for row in whole]
    assert all(row["export_error"] == 0.0 for row in whole)
    assert all(row["export_error"] > 0.0 and row["export_rank"] == 3 for row in cut)
    assert load_spec(run / "3/adapter_config.json").r == 3
    assert manifest(run, 3)["export"]["relative_error"] == cut[2]["export_error"]
    check(run)


def test_the_held_out_loss_is_that_of_the_whole_model(trained, tiny_model):
    from fedlora.llm.examples import encode_rows
    from fedlora.llm.layout import Layout, LayoutBook
    from fedlora.llm.local_training import Trainer
    from fedlora.llm.prompts import PromptEncoder
    from fedlora.rows import Row

    run = trained["flora"]
    facts = json.loads((run.parent.parent / "data/4/local_training_0.json").read_text())
    base = load_base_model(str(tiny_model), device="cpu", dtype="float32")
    rows = [Row(row["instruction"], row["input"], row["output"], row["category"]) for row in facts]
    examples = encode_rows(rows, PromptEncoder(base.tokenizer, "chat"), cutoff=512).examples
    lora = LoraModel(base.model, load_spec(run / "3/adapter_config.json"))
    trainer = Trainer(base, lora, TrainConfig(), LayoutBook(Layout(4096)))
    exported = torch.load(run / "3/global_adapter_model.bin", weights_only=True)
    loss = rounds_of(run)[2]["val_loss"]
    assert trainer.validate(exported, [examples]) == pytest.approx(loss, rel=1e-4)
    assert trainer.validate(None, [examples]) != pytest.approx(loss, rel=1e-2)


def test_a_cut_residual_is_told_and_is_verified(start):
    run = start("short", "fedex", residual_rank=1)
    assert all(0 < row["base_truncation_error"] < 1 for row in rounds_of(run))
    assert all(link.truncation_error > 0 for link in load_base(RunPaths(run.parent, run.name), 3).links)
    check(run)


@pytest.mark.parametrize("mode", MODES)
def test_limits_act_before_anything_is_made_of_an_update(start, trained, mode):
    run = start(f"limited-{mode}", mode, max_update_norm=0.01, norm_action="clip", num_communication_rounds=2)
    assert len(manifest(run, 1)["limited"]) == 3
    check(run)

    def size(root: Path) -> float:
        whole = load_base(RunPaths(root.parent, root.name), 1).background
        return float(sum(value.square().sum() for key, value in whole.items() if "lora_B" in key or "delta" in key))

    assert size(run) < 0.1 * size(trained[mode])


def reseal(run: Path, number: int, *changed: Path, **changes) -> None:
    """A manifest that names files as they are now."""
    facts = manifest(run, number)
    files = {**facts["files"], **describe_files(run / str(number), list(changed))}
    (run / f"{number}/manifest.json").write_text(json_text(seal({**facts, **changes, "files": files})))


@pytest.mark.parametrize("damage", ["changed", "gone", "resealed", "round"])
def test_a_broken_chain_is_found_by_all_who_read_it(copied, start, damage, capsys):
    run = copied("fedex")
    expected = hashes(run)
    file, other = run / f"1/{BASE_NAME}", run / f"2/{BASE_NAME}"
    if damage == "round":
        shutil.rmtree(run / "1")
    elif damage == "gone":
        file.unlink()
    elif damage == "changed":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        # another increment, and a manifest that names it
        shutil.copy(other, file)
        reseal(run, 1, file)
    with pytest.raises(StorageError):
        check(run)
    with pytest.raises(StorageError, match="what round 1 added to the base cannot be used"):
        load_base(RunPaths(run.parent, run.name), 3)
    capsys.readouterr()
    # as from an interruption: everything stands on round 1, so everything is trained again, to the same bytes
    again = start("fedex", "fedex", model_dir=run.parent)
    assert "round 3 is not used and trained again" in capsys.readouterr().err
    assert hashes(again) == expected


def test_a_round_that_stands_on_another_chain_is_found(copied):
    run = copied("flora")
    reseal(run, 2, base_delta={**manifest(run, 2)["base_delta"], "parent_sha256": "0" * 64})
    with pytest.raises(StorageError, match=r"round 2 added .* does not continue the chain of the rounds before it"):
        load_base(RunPaths(run.parent, run.name), 3)


def test_an_increment_or_a_base_that_is_not_what_the_run_computes_is_found_by_verify(copied):
    run = copied("fedex")
    increment, record = run / f"3/{BASE_NAME}", run / "3/client_0/update.json"
    shutil.copy(run / f"2/{BASE_NAME}", increment)
    record.write_text(json_text(seal({**json.loads(record.read_text()), "base_sha256": "0" * 64})))
    reseal(run, 3, increment, record)
    with pytest.raises(StorageError) as raised:
        check(run)
    told = raised.value.result.text()
    assert f"{increment} is not the aggregate of the clients' files" in told
    assert f"{record}: the client trained on another base than it was given" in told


def answer(run: Path, out: Path, **options) -> tuple[Path, ...]:
    rows = [{"instruction": f"say red {row}", "input": "", "output": "x", "category": "c"} for row in range(4)]
    out.mkdir(exist_ok=True)
    (out / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return generate.run(
        GenerateConfig.of(
            exp_name=run.name,
            model_dir=run.parent,
            prediction_dir=out,
            test_file_path=out / "test.jsonl",
            communication_rounds=3,
            max_new_tokens=6,
            base_dtype="float32",
            device="cpu",
            **options,
        )
    ).files


def test_a_client_answers_on_the_base_of_its_round_alone_and_among_others(trained, tmp_path, monkeypatch):
    run = trained["flora"]
    stands_on = []
    answering = Answering.answer

    def watch(self, names, states, background):
        stands_on.append((list(map(str, names)), background))
        return answering(self, names, states, background)

    monkeypatch.setattr(Answering, "answer", watch)
    together = answer(run, tmp_path / "all", all=True)
    assert [names for names, _ in stands_on] == [["base"], ["global"], ["client_0", "client_2", "client_3"]]
    assert [background is not None for _, background in stands_on] == [False, False, True]
    expected = load_base(RunPaths(run.parent, run.name), 2).background
    assert all(torch.equal(value, stands_on[2][1][key]) for key, value in expected.items())
    (alone,) = answer(run, tmp_path / "one", client_id=2, is_global_model=False)
    (found,) = [file for file in together if file.name == alone.name]
    assert alone.read_text() == found.read_text()
    facts = json.loads(alone.with_name("client_2_output.meta.json").read_text())
    assert facts["base_delta_sha256"] == load_base(RunPaths(run.parent, run.name), 2).sha256
    # on the bare base the same adapter says something else
    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "set_background", lambda self, state: None)
        (bare,) = answer(run, tmp_path / "bare", client_id=2, is_global_model=False)
    assert bare.read_text() != alone.read_text()
    (everybody,) = answer(run, tmp_path / "global", is_global_model=True)
    assert "base_delta_sha256" not in json.loads(everybody.with_name("global_output.meta.json").read_text())


def test_a_client_s_answers_are_refused_where_the_chain_is_broken(copied, tmp_path):
    run = copied("flora")
    (run / f"1/{BASE_NAME}").unlink()
    with pytest.raises(StorageError, match="what round 1 added"):
        answer(run, tmp_path / "one", client_id=2, is_global_model=False)
    # the global adapter holds all of it
    assert answer(run, tmp_path / "two", is_global_model=True)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"federation_mode": "flora", "optimizer_state": "keep"}, "other factors than a client left"),
        ({"federation_mode": "flora", "residual_rank": 4}, "has no residual_rank"),
        ({"federation_mode": "homo", "export_rank": 64}, "has no export_rank"),
        ({"federation_mode": "fedex", "export_rank": 4, "lora_r": 8}, "not even the clients' rank would fit"),
        ({"federation_mode": "flora", "lora_r": 512}, "export_rank=256 is below lora_r=512"),
    ],
)
def test_combinations_that_cannot_be_right_are_refused(changes, what):
    with pytest.raises(UsageError, match=what):
        choose_method(TrainConfig.of(**changes))
