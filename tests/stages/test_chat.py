"""A chat with several models: what they say is what `answer` gives, each has its history, and text drives nothing."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.console import Console
from tiny_run import make_client_files

import fedlora as fl
from fedlora.chatting.columns import draw_texts, plain_texts
from fedlora.chatting.commands import COMMANDS, run_command
from fedlora.chatting.session import ChatSession
from fedlora.cli import main
from fedlora.config.chat import ChatConfig
from fedlora.config.train import TrainConfig
from fedlora.data.records import read_rows
from fedlora.engines.streamed_answers import Reply
from fedlora.errors import UsageError
from fedlora.stages import train


@pytest.fixture(scope="module")
def model_dir(tiny_model, tmp_path_factory):
    """Runs `run` and `other` by the model's own template, and `plain` by alpaca's."""
    folder = tmp_path_factory.mktemp("chat")
    options: dict[str, Any] = {
        "base_model": str(tiny_model),
        "base_dtype": "float32",
        "data_path": make_client_files(folder / "data", [4, 4]),
        "model_dir": folder / "models",
        "client_selection_frac": 1.0,
        "num_communication_rounds": 1,
        "num_clients": 2,
        "local_batch_size": 2,
        "local_num_epochs": 1,
        "local_learning_rate": 0.05,
        "prompt_template": "chat",
        "device": "cpu",
    }
    for name, changes in {"run": {}, "other": {"seed": 7}, "plain": {"prompt_template": "alpaca"}}.items():
        train.run(TrainConfig.of(**{**options, "exp_name": name, **changes}))
    return folder / "models"


@pytest.fixture
def talk(model_dir):
    def start(name="run", of=("base", "global", "1"), **changes) -> ChatSession:
        changes = {"max_new_tokens": 6, "device": "cpu", "base_dtype": "float32", **changes}
        return ChatSession(ChatConfig.of(exp_name=name, model_dir=model_dir, of_subjects=of, **changes))

    return start


def test_the_first_replies_are_the_answers_that_the_run_gives(talk, model_dir):
    session = talk()
    replies = session.ask("say gold 3")
    run = fl.open(model_dir / "run")
    keywords = {"max_new_tokens": 6, "device": "cpu", "base_dtype": "float32", "progress": False}
    answers = run.answer("say gold 3", of=["base", "global", 1], **keywords)
    assert [reply.text for reply in replies.values()] == list(answers.values())
    assert session.names == ("base", "global", "client 1")
    assert all(reply.num_tokens <= 6 for reply in replies.values())


def test_texts_are_heard_while_they_grow_and_the_last_is_the_reply(talk, monkeypatch):
    monkeypatch.setattr("fedlora.engines.streamed_answers.HEARD_SECONDS", 0.0)
    session, heard = talk(), []
    replies = session.ask("say gold 3", lambda name, text: heard.append((name, text)))
    for name, reply in replies.items():
        own = [text for who, text in heard if who == name]
        assert own[-1] == reply.text
        assert len(own) > min(reply.num_tokens, 2)
    # side by side, not one after the other
    assert len({name for name, _ in heard[:3]}) > 1


def test_every_model_has_its_own_history_and_the_next_prompt_holds_it(talk):
    session = talk(system="be brief")
    first = session.ask("one?")
    session.ask("two?")
    for name, prompt in session.prompts.items():
        assert prompt.index("be brief") < prompt.index("one?") < prompt.index("two?")
        assert first[name].text in prompt
        assert [turn.role for turn in session.history(name)] == ["user", "assistant"] * 2
    session.reset()
    assert not session.history("base")
    session.set_system("")
    session.ask("three?")
    assert "be brief" not in session.prompts["base"]


def test_settings_change_the_replies_and_the_seed_repeats_them(talk):
    session = talk()
    session.set("temperature", "1.5")
    sampled = {name: reply.text for name, reply in session.ask("say gold").items()}
    session.reset()
    assert {name: reply.text for name, reply in session.ask("say gold").items()} == sampled
    session.reset()
    session.set("seed", 8)
    assert {name: reply.text for name, reply in session.ask("say gold").items()} != sampled
    session.set("max_new_tokens", 2)
    assert max(reply.num_tokens for reply in session.ask("again").values()) == 2
    for name, value in (("temperature", "hot"), ("top_p", 2), ("colour", 1), ("max_new_tokens", 0)):
        with pytest.raises(UsageError, match=name):
            session.set(name, value)


def test_other_runs_answer_beside_and_are_called_by_their_run(talk):
    session = talk(of=("base", "global", "other/1/global"))
    assert session.names == ("run/1/base", "run/1/global", "other/1/global")
    replies = session.ask("say gold 3")
    alone = talk("other", of=("global",)).ask("say gold 3")
    assert replies["other/1/global"].text == alone["global"].text
    assert session.ask("and now?")["other/1/global"].text


def test_where_the_template_has_no_place_for_turns_each_question_stands_alone(talk):
    session = talk("plain", of=("global",))
    assert session.forgetful == ("global",)
    first = session.ask("say gold")["global"].text
    session.ask("say red")
    assert session.ask("say gold")["global"].text == first
    assert len(session.rows()) == 3
    session.set_system("be brief")
    with pytest.raises(UsageError, match="no place for a system prompt"):
        session.ask("say gold")
    session.set_template("chat")
    session.ask("say gold")
    assert "be brief" in session.prompts["global"]


def test_conversations_are_rows_that_our_reader_reads(talk, tmp_path):
    session = talk(system="be brief", of=("global", "1"))
    session.ask("one?")
    session.ask("two?")
    file = session.save(tmp_path / "silos" / "talk.jsonl")
    rows = read_rows(file)
    assert [row.category for row in rows] == ["global", "client 1"]
    assert rows[0].before[0].content == "be brief"
    assert rows[0].turns == session.rows()[0].turns
    with pytest.raises(UsageError, match="already"):
        session.save(file)
    with pytest.raises(UsageError, match="jsonl"):
        session.save(tmp_path / "talk.txt")


def test_a_question_that_fails_is_no_part_of_the_history(talk):
    session = talk(cutoff_len=8)
    with pytest.raises(UsageError):
        session.ask("say gold " * 20)
    with pytest.raises(UsageError, match="empty"):
        session.ask("  ")
    assert not session.history("base")


def test_slash_commands_do_what_help_says(talk, tmp_path):
    session = talk()
    assert all(f"/{name}" in run_command(session, "/help") for name in COMMANDS)
    assert "temperature=0.5" in run_command(session, "/set temperature=0.5 top_p=0.9")
    assert session.settings["top_p"] == 0.9
    assert "be brief" in run_command(session, "/system be brief")
    assert "template alpaca" in run_command(session, "/template alpaca")
    assert "template chat" in run_command(session, "/template auto")
    assert run_command(session, "/prompt") == "nothing was asked yet"
    session.ask("hello")
    assert "hello" in run_command(session, "/prompt")
    assert run_command(session, f"/save {tmp_path / 'talk.jsonl'}").startswith("3 conversations in")
    assert run_command(session, "/reset")
    with pytest.raises(EOFError):
        run_command(session, "/quit")
    for line, told in (("/hlep", "help"), ("/set temperature", "name=value"), ("/save", "file"), ("/template x", "x")):
        with pytest.raises(UsageError) as caught:
            run_command(session, line)
        assert told in f"{caught.value} {caught.value.hint}"


HOSTILE = "a\x1b]0;title\x07b\x1b[2J\u202ec [bold]d[/bold]\r\ne"


def test_what_a_model_says_cannot_drive_a_terminal():
    drawn = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    drawn.print(draw_texts({"base": HOSTILE, "evil \x1b[31m": HOSTILE}, 100))
    shown = drawn.file.getvalue() + plain_texts({"base": Reply(HOSTILE, 1, 1.0, False, "")})
    for sign in ("\x1b]", "\x1b[2J", "\x07", "\u202e", "\x1b[31m"):
        assert sign not in shown
    assert "[bold]d[/bold]" in shown


def test_columns_stand_side_by_side_where_there_is_room():
    wide, narrow = (Console(file=io.StringIO(), width=width) for width in (120, 60))
    for console in (wide, narrow):
        console.print(draw_texts({"base": "one", "global": "two"}, console.width))
    assert any("one" in line and "two" in line for line in wide.file.getvalue().splitlines())
    assert not any("one" in line and "two" in line for line in narrow.file.getvalue().splitlines())


def test_without_a_terminal_a_line_is_a_question(model_dir, monkeypatch, capsys):
    arguments = ["chat", "run", "--model_dir", str(model_dir), "--of", "base,global", "--max_new_tokens", "4"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("say gold 3\n\n/models\n/quit\nnever asked\n"))
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("global: ") == 2
    assert "max_new_tokens=4" in shown
    monkeypatch.setattr(sys, "stdin", io.StringIO("/nothing\n"))
    assert main(arguments) == 2
    assert main([*arguments, "--host", "0.0.0.0"]) == 2


@pytest.mark.thorough
def test_a_terminal_shows_columns_and_an_end_of_file_ends_it(model_dir):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "fedlora", "chat", "run", "--model_dir", str(model_dir), "--max_new_tokens", "6"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as one:
        os.close(slave)
        os.write(master, b"say gold 3\n")
        seen, end = b"", time.monotonic() + 60
        while b"tokens/s" not in seen and time.monotonic() < end:
            seen += os.read(master, 4096)
        # what is typed before the prompt is there may be thrown away by readline
        while one.poll() is None and time.monotonic() < end:
            os.write(master, b"\x04")
            time.sleep(0.2)
        ended = one.poll()
        one.kill()
        assert ended == 0
    os.close(master)
    text = seen.decode("utf-8", "replace")
    assert "╭" in text
    assert "/help lists commands" in text
    assert "Traceback" not in text


def test_a_page_beyond_this_machine_needs_a_password(model_dir, monkeypatch, tmp_path):
    from fedlora.chatting.web import find_password

    def config(**changes):
        return ChatConfig.of(exp_name="run", model_dir=model_dir, web=True, **changes)

    monkeypatch.delenv("FEDLORA_CHAT_PASSWORD", raising=False)
    assert find_password(config()) == ""
    for host in ("0.0.0.0", "192.168.1.2", "::", "example.org", ""):
        with pytest.raises(UsageError, match="needs a password"):
            find_password(config(host=host))
    monkeypatch.setenv("FEDLORA_CHAT_PASSWORD", "short")
    with pytest.raises(UsageError, match="shorter"):
        find_password(config(host="0.0.0.0"))
    monkeypatch.setenv("FEDLORA_CHAT_PASSWORD", "long enough for us")
    assert find_password(config(host="0.0.0.0")) == "long enough for us"
    file = tmp_path / "password"
    file.write_text("another long password\n")
    assert find_password(config(password_file=str(file))) == "another long password"
    file.write_text("\n")
    with pytest.raises(UsageError, match="needs a password"):
        find_password(config(password_file=str(file)))
