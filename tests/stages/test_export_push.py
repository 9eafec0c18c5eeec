"""What `--push` sends to a hub, on the loopback: the folder and no more, never unasked, and the token in no message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve_hub
from tiny_run import make_client_files, options_of

from fedlora.config.export import ExportConfig
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.stages import export, train

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serve_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pushed")
    data = make_client_files(root / "data", [3, 3])
    options = options_of("homo", tiny_model, data, root / "models") | {"num_clients": 2, "num_communication_rounds": 1}
    train.run(TrainConfig.of(**options))
    return root / "models"


def exported(models: Path, to: Path, **settings: Any) -> export.Export:
    return export.run(ExportConfig.of(exp_name="run", model_dir=models, to=to, format="merged", **settings))


def test_a_pushed_folder_arrives_whole_in_a_private_repository(models, tiny_model, hub, tmp_path, capfd):
    found = exported(models, tmp_path / "out", push="me/model")
    sent = {file.relative_to(found.folder).as_posix(): file.read_bytes() for file in found.folder.rglob("*")}
    assert hub.files == sent
    assert {"README.md", "model.safetensors", "export.json"} <= sent.keys()
    assert found.url == f"{hub.url}/me/model"
    create = hub.requests[0]
    assert b'"visibility":"private"' in create[2]
    assert create[1]["authorization" if "authorization" in create[1] else "Authorization"] == f"Bearer {TOKEN}"
    shown = capfd.readouterr()
    assert TOKEN not in shown.out + shown.err + found.text() + str(found.as_dict())
    assert all(str(models) not in content.decode(errors="ignore") for content in sent.values()), (
        "a path of this machine"
    )


def test_nothing_is_sent_without_the_flag(models, hub, tmp_path):
    exported(models, tmp_path / "out")
    assert not hub.requests


def test_a_hub_that_refuses_is_one_error_without_the_token_and_the_folder_stays(models, hub, tmp_path, capfd):
    hub.refusal = (403, f"token {TOKEN} may not write")
    with pytest.raises(UsageError, match="me/model: the hub did not take the files") as caught:
        exported(models, tmp_path / "out", push="me/model")
    assert "hf upload me/model" in caught.value.hint
    assert (tmp_path / "out" / "model.safetensors").is_file()
    shown = capfd.readouterr()
    assert TOKEN not in str(caught.value) + caught.value.hint + shown.out + shown.err


def test_an_adapter_on_a_base_of_this_machine_is_not_pushed(models, hub, tmp_path):
    with pytest.raises(UsageError, match="lies on this machine alone"):
        export.run(ExportConfig.of(exp_name="run", model_dir=models, to=tmp_path / "out", push="me/model"))
    assert not hub.requests
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="give USER/NAME"):
        ExportConfig.of(push="model")
