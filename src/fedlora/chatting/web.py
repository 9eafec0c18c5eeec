"""The chat as a page for a browser: the same session, its replies streamed into columns.

The page listens on this machine alone unless a password protects it, is never shared, and asks no other machine for
anything. What models and users say is shown as text: no markup of theirs is rendered.
"""

from __future__ import annotations

import html
import os
import queue
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

from fedlora.chatting.columns import note_of
from fedlora.chatting.commands import describe
from fedlora.chatting.session import SETTINGS, ChatSession
from fedlora.config.chat import LOOPBACK, ChatConfig
from fedlora.console import printable, say
from fedlora.errors import FedloraError, UsageError
from fedlora.files import json_lines, read_text
from fedlora.redaction import hold_secret

USER = "fedlora"
SHORTEST_PASSWORD = 12


def serve(config: ChatConfig) -> None:
    """Serve the page until the process is asked to stop. Raises UsageError (no gradio, no password, a port in use)."""
    gradio = _import_gradio()
    password = find_password(config)
    page = make_page(gradio, ChatSession(config))
    launch(gradio, page, config, password)
    say(f"http://{config.host}:{config.port}" + (f" for the user {USER}" if password else "") + "; Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def find_password(config: ChatConfig) -> str:
    """The page's password, from a file or the environment; empty where there is none. UsageError where the address
    needs one, or it is short."""
    if config.password_file:
        found, place = read_text(Path(config.password_file)).strip(), config.password_file
    else:
        found, place = os.environ.get("FEDLORA_CHAT_PASSWORD", "").strip(), "FEDLORA_CHAT_PASSWORD"
    if not found and not config.password_file and config.host in LOOPBACK:
        return ""
    if not found:
        raise UsageError(
            f"host={config.host}: a page that others reach needs a password",
            hint="put it into the variable FEDLORA_CHAT_PASSWORD, or into a file that --password_file names",
        )
    if len(found) < SHORTEST_PASSWORD:
        raise UsageError(
            f"{place}: the password is shorter than {SHORTEST_PASSWORD} characters", hint="choose a longer one"
        )
    hold_secret(found)
    return found


def launch(gradio: Any, page: Any, config: ChatConfig, password: str) -> None:
    """Start to listen. Raises UsageError where the port is in use."""
    # fonts of the system: the default theme asks Google for its own
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            auth=(USER, password) if password else None,
            theme=theme,
            share=False,
            quiet=True,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UsageError(f"port={config.port}: {error}", hint="choose another --port") from error


def make_page(gradio: Any, first: ChatSession) -> Any:
    """The page; every browser has conversations of its own, and one question is answered at a time."""
    with gradio.Blocks(title="fedlora chat", analytics_enabled=False) as page:
        state = gradio.State(None)
        with gradio.Row():
            bots = [
                gradio.Chatbot(
                    label=name,
                    render_markdown=False,
                    sanitize_html=True,
                    latex_delimiters=[],
                    # its own ones share with another site, and copy the escaped text
                    buttons=[],
                    height=420,
                    min_width=280,
                )
                for name in first.names
            ]
        question = gradio.Textbox(label="Question", lines=1, autofocus=True)
        with gradio.Row():
            send, new = gradio.Button("Ask", variant="primary"), gradio.Button("New conversation")
            prompts, rows = gradio.Button("Show the prompts"), gradio.Button("Show the conversations as rows")
        status = gradio.Textbox(label="Status", value=describe(first), interactive=False, lines=4, max_lines=20)
        with gradio.Accordion("Settings", open=False):
            system = gradio.Textbox(label="System prompt", value=first.system)
            template = gradio.Textbox(label="Template: alpaca or chat; auto is that of each run", value="auto")
            settings = [gradio.Number(label=name, value=first.settings[name]) for name in SETTINGS]

        def ask(*given: Any) -> Iterator[tuple[Any, ...]]:
            yield from _ask(first, *given)

        asking = {
            "fn": ask,
            "inputs": [state, question, system, template, *settings],
            "outputs": [state, question, status, *bots],
            "concurrency_limit": 1,
        }
        for event in (send.click, question.submit):
            event(**asking)
        for event in (new.click, *(bot.clear for bot in bots)):
            event(lambda: (None, describe(first), *([] for _ in bots)), outputs=[state, status, *bots])
        prompts.click(_show_prompts, inputs=[state], outputs=[status])
        rows.click(_show_rows, inputs=[state], outputs=[status])
    return page


def _ask(
    first: ChatSession, session: ChatSession | None, question: str, system: str, template: str, *settings: Any
) -> Iterator[tuple[Any, ...]]:
    """State, question, status and every column, again and again while the replies grow."""
    session = session or first.fresh()
    try:
        _change(session, system, template, dict(zip(SETTINGS, settings, strict=True)))
        before = {name: _messages(session, name) for name in session.names}
        asked = _message("user", question)
        replies: dict[str, Any] = {}
        for texts in _stream(session, question, replies):
            columns = [[*before[name], asked, _message("assistant", texts[name])] for name in session.names]
            yield session, "", "answering ...", *columns
        notes = "\n".join(f"{name}: {note_of(reply)}" for name, reply in replies.items())
        yield session, "", f"{notes}\n{describe(session)}", *(_messages(session, name) for name in session.names)
    except FedloraError as error:
        text = f"{error}" + (f"\n{error.hint}" if error.hint else "")
        yield session, question, text, *(_messages(session, name) for name in session.names)


def _stream(session: ChatSession, question: str, replies: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The texts so far, whenever one has grown; `replies` holds the replies at the end."""
    heard: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
    faults: list[Exception] = []

    def work() -> None:
        try:
            replies.update(session.ask(question, lambda name, text: heard.put((name, text))))
        except Exception as error:  # raised where the texts are read
            faults.append(error)
        finally:
            heard.put(None)

    worker = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
    worker.start()
    texts = dict.fromkeys(session.names, "")
    yield dict(texts)
    while (news := heard.get()) is not None:
        texts[news[0]] = news[1]
        if heard.empty():
            yield dict(texts)
    worker.join()
    if faults:
        raise faults[0]


def _change(session: ChatSession, system: str, template: str, settings: dict[str, Any]) -> None:
    """Take over what the page's fields say; another system prompt or template starts the conversations again."""
    for name, value in settings.items():
        if value is not None and value != session.settings[name]:
            # a field of numbers gives 64.0 for 64
            session.set(name, int(value) if float(value).is_integer() else value)
    if system.strip() != session.system:
        session.set_system(system)
    if template.strip() in ("auto", "alpaca", "chat"):
        if template.strip() != session.template:
            session.set_template(template.strip())
    else:
        # a name would be a file of this machine, and the page may be others'
        raise UsageError(f"template={template!r}: the page takes alpaca, chat and auto", hint="give --template FILE")


def _messages(session: ChatSession, name: str) -> list[dict[str, str]]:
    return [_message(*turn) for turn in session.history(name)]


def _message(role: str, text: str) -> dict[str, str]:
    """A turn for a column. gradio renders markup also where it renders no Markdown, and an image would be fetched."""
    return {"role": role, "content": html.escape(printable(text))}


def _show_prompts(session: ChatSession | None) -> str:
    prompts = session.prompts if session else {}
    return "\n\n".join(f"{name}:\n{text}" for name, text in prompts.items()) or "nothing was asked yet"


def _show_rows(session: ChatSession | None) -> str:
    return json_lines(row.as_dict() for row in session.rows()) if session and session.rows() else "nothing was said yet"


def _import_gradio() -> Any:
    """gradio, with its analytics off. Raises UsageError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"gradio cannot be imported ({error})", hint="pip install 'fedlora[ui]'") from None
    return gradio
