"""The page of the chat in a headless browser: nothing from another site, and no markup of users or models.

Needs gradio and playwright, and Chromium on this machine (`tools/test_chat_page.sh` installs the first two).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny_run import make_client_files

from fedlora.config.train import TrainConfig
from fedlora.stages import train

pytest.importorskip("gradio", reason="the extra ui is not installed")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
TOKENS, PROMPT = re.compile("tokens/s"), re.compile("im_start")
HOSTILE = """<img src="http://127.0.0.1:9/x" onerror="alert(1)"><script>alert(2)</script> **gold** $$x$$"""


@pytest.fixture(scope="module")
def model_dir(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    options = {
        "exp_name": "run",
        "base_model": str(tiny_model),
        "data_path": make_client_files(folder / "data", [3, 3]),
        "model_dir": folder / "models",
        "num_communication_rounds": 1,
        "num_clients": 2,
        "prompt_template": "chat",
        "device": "cpu",
    }
    train.run(TrainConfig.of(**options))
    return folder / "models"


@pytest.fixture
def page_of(model_dir):
    """Starts `fedlora chat --web` and returns its address."""
    started = []

    def start(*flags: str, **environment: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "fedlora", "chat", "run", "--model_dir", str(model_dir), "--web"]
        command += ["--port", str(port), "--max_new_tokens", "20", *flags]
        started.append(subprocess.Popen(command, env={**os.environ, **environment}))
        address = f"http://127.0.0.1:{port}/"
        for _ in range(120):
            try:
                with urllib.request.urlopen(address, timeout=2):
                    return address
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the page does not answer")

    yield start
    for process in started:
        process.terminate()
        assert process.wait(20) == 143


@pytest.fixture
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def test_replies_stand_in_columns_and_hostile_text_is_text(page_of, browser):
    address = page_of("--of", "base,global")
    page = browser.new_page()
    asked, dialogs = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    question = page.get_by_label("Question")
    question.fill(HOSTILE)
    question.press("Enter")
    sync_api.expect(page.get_by_label("Status")).to_have_value(TOKENS, timeout=60_000)
    assert not dialogs
    assert page.locator('img[src*="127.0.0.1:9"]').count() == 0
    assert page.locator(".katex").count() == 0
    assert page.get_by_text("<script>alert(2)</script> **gold** $$x$$").count() == 2
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    page.get_by_role("button", name="Show the prompts").click()
    sync_api.expect(page.get_by_label("Status")).to_have_value(PROMPT, timeout=20_000)
    # another browser has conversations of its own
    other = browser.new_context().new_page()
    other.goto(address)
    other.get_by_label("Question").wait_for()
    assert other.get_by_text("**gold**").count() == 0


def test_a_password_is_asked_for(page_of, browser):
    page = browser.new_page()
    page.goto(page_of(FEDLORA_CHAT_PASSWORD="a long password"))
    page.get_by_role("button", name="Login").wait_for()
    assert page.get_by_label("Question").count() == 0
