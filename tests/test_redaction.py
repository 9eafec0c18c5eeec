"""The judge's key is found in no file, no output and no process list, whichever way the commands end."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_server import Answer, Request, completion, error, serve

from fedlora import redaction
from fedlora.console import say
from fedlora.redaction import hold_secret, redact, redacted_logs

KEY = 'sk-CANARY-0123"456\\789%abc'
DRIVER = """
import json, sys
from fedlora import cli
for number, (patched, arguments) in enumerate(json.loads(sys.argv[1])):
    if patched:
        import fedlora.evaluation.judge.client as client
        read = client.read_completion

        def fail(content, redactor):
            try:
                raise ValueError({"headers": redactor._key.get_secret_value()})
            except ValueError as error:
                raise RuntimeError("a bug near " + redactor._key.get_secret_value()) from error

        client.read_completion = fail
    print("EXIT", number, cli.main(arguments), flush=True)
    if patched:
        client.read_completion = read
"""


@pytest.fixture(autouse=True)
def _no_secret_stays(monkeypatch):
    monkeypatch.setattr(redaction, "_held", set())


def command_lines(process: int) -> bytes:
    """The arguments of a process and of everything it started."""
    found = b""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            if folder.name == str(process) or f"PPid:\t{process}\n" in status:
                found += (folder / "cmdline").read_bytes()
        except OSError:
            continue
    return found


def echo(request: Request) -> Answer:
    """A tie, or what the address asks for, and the key wherever there is room for text."""
    sent = request.headers["authorization"]
    if "/401/" in request.path:
        return error(401, f"Incorrect API key provided: {sent}", code=sent)
    entries = [{"id": name, "score_a": 5, "score_b": 5, "verdict": "tie"} for name in request.samples]
    lie = {"id": sent, "score_a": 1, "score_b": 1, "verdict": "A"}
    return completion(json.dumps({"results": [lie, *entries]}), model=f"m {sent}", system_fingerprint=sent)


def judge(place: Path, url: str, folder: str, *more: str) -> list[str]:
    names = ["--exp_name", "homo", "--is_base_model", "--communication_rounds", "1", "--max_retries", "0"]
    files = ["--proposed_file", "homo/1/global_output.jsonl", "--prediction_dir", f"{place}/predictions"]
    return ["evaluate_llm", *names, *files, "--evaluation_dir", f"{place}/{folder}", "--base_url", url, *more]


def commands(place: Path, model: Path, port: int, key: list[str]) -> list[tuple[bool, list[str], int]]:
    """(with a bug planted?, arguments, expected exit code) of the whole pipeline, and of each way a judge can fail."""
    address = f"http://127.0.0.1:{port}"
    run = ["--exp_name", "homo", "--model_dir", f"{place}/models"]
    allocation = ["--input_file", f"{place}/rows.json", "--output_root", f"{place}/data", "--dataset_name", "d"]
    training = ["--base_model", str(model), "--data_path", f"{place}/data/d", "--num_clients", "2", "--device", "cpu"]
    steps = ["--num_communication_rounds", "1", "--local_num_epochs", "1", "--client_selection_frac", "1"]
    test_file = f"{place}/data/d/dolly_test_2.jsonl"
    answering = ["--communication_rounds", "1", "--test_file_path", test_file, "--max_new_tokens", "3"]
    predictions = ["--prediction_dir", f"{place}/predictions"]
    scored = [*predictions, "--exp_name", "homo", "--communication_rounds", "1", "--target_file", test_file]
    trees = ["--model_dir", f"{place}/models", "--rouge_dir", f"{place}/rouge", "--llm_dir", f"{place}/judged"]
    return [
        (False, ["allocate", *allocation, "--train_per_cat", "3", "--test_per_cat", "2"], 0),
        (False, ["train", *run, *training, *steps], 0),
        (False, ["generate", *run, *answering, *predictions, "--all", "--device", "cpu"], 0),
        (False, ["evaluate_rouge", *scored, "--evaluation_dir", f"{place}/rouge"], 0),
        (False, judge(place, f"{address}/echo", "judged", *key), 0),
        (False, judge(place, f"{address}/401", "refused", *key), 7),
        (False, judge(place, "http://127.0.0.1:9/v1", "nobody", *key), 7),
        (True, judge(place, f"{address}/echo", "bug", *key), 1),
        (False, ["report", *trees, *predictions, "--exp_names", "homo", "--communication_rounds", "1",
                 "--report_dir", f"{place}/reports"], 0),
    ]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["environment", "key file"])
def test_the_key_is_nowhere_after_all_commands(tmp_path, tiny_model, way):
    rows = [
        {"instruction": f"quality {n}", "context": "", "response": f"quality {n}", "category": f"c{n % 2}"}
        for n in range(1, 15)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    secret = tmp_path.parent / f"{tmp_path.name}.key"
    secret.write_text(KEY + "\n")
    environment = {**os.environ, "PYTHONASYNCIODEBUG": "1", "OPENAI_LOG": "debug", "api_key": KEY}
    key: list[str] = []
    if way == "key file":
        del environment["api_key"]
        key = ["--api_key_file", str(secret)]
    with serve(echo) as server:
        planned = commands(tmp_path, tiny_model, server.port, key)
        listed = b""
        with (tmp_path / "stdout").open("wb") as out, (tmp_path / "stderr").open("wb") as err:
            driver = [sys.executable, "-c", DRIVER, json.dumps([each[:2] for each in planned])]
            process = subprocess.Popen(driver, stdout=out, stderr=err, env=environment)
            while process.poll() is None:
                listed += command_lines(process.pid)
                time.sleep(0.1)
    output, shown = (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text()
    ends = [line.split()[1:] for line in output.splitlines() if line.startswith("EXIT")]
    assert ends == [[str(number), str(code)] for number, (_, _, code) in enumerate(planned)], shown
    # the key was sent, the bug was shown, and what held the key was not left out but cleaned
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert shown.count("Traceback") >= 2
    assert "a bug near [redacted]" in shown
    assert f"{tmp_path}/judged".encode() in listed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 25
    for part in (KEY, json.dumps(KEY)[1:-1], "CANARY"):
        assert part.encode() not in listed
        assert not [path for path in files if part.encode() in path.read_bytes()]


def test_every_spelling_of_a_secret_is_taken_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("api_key", "none")
    hold_secret(KEY)
    assert redact(f"a {KEY} b {json.dumps(KEY)} c {KEY!r} hf_abcdefghijkl none") == (
        "a [redacted] b \"[redacted]\" c '[redacted]' [redacted] none"
    )
    assert redact("https://h/?k=sk-CANARY-0123%22456%5C789%25abc") == "https://h/?k=[redacted]"


def test_what_is_said_holds_no_secret(capsys):
    hold_secret("sk-0123456789")
    say("using sk-0123456789")
    assert capsys.readouterr().err == "using [redacted]\n"


def test_logs_of_libraries_hold_no_secret(caplog):
    hold_secret("sk-0123456789")
    log = logging.getLogger("some.library")
    make = logging.getLogRecordFactory()
    with redacted_logs():
        log.warning("sent %s", {"Authorization": "Bearer sk-0123456789"})
        try:
            raise ValueError("sk-0123456789")
        except ValueError:
            log.exception("failed with %r", "sk-0123456789")
    assert "sk-0123456789" not in caplog.text
    assert caplog.text.count("[redacted]") >= 3
    assert "Traceback" in caplog.text
    assert logging.getLogRecordFactory() is make
