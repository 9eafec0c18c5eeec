"""`fedlora.chat`: a conversation with several models."""

from __future__ import annotations

from typing import Any

from fedlora.api.entrance import PathLike, entered, make_config
from fedlora.api.signatures import takes
from fedlora.chatting.session import ChatSession
from fedlora.config.chat import ChatConfig
from fedlora.errors import UsageError


@takes(ChatConfig)
def chat(config: PathLike | None = None, *, progress: bool = True, **keywords: Any) -> ChatSession:
    """Open a conversation with the models that `of` names: `ask` gives every model's reply, side by side in one batch.

    Every model has its own history. `set`, `set_system`, `set_template`, `reset` and `save` change and keep it; the
    base is loaded with the first question. Raises UsageError (a run, a round, a client), StorageError.

    >>> session = fl.chat(name="pair", of=["base", "global"], max_new_tokens=4, progress=False)
    >>> list(session.ask("Capital of France?"))
    ['base', 'global']
    """
    with entered("chat", ChatConfig, keywords, progress=progress):
        made = make_config(ChatConfig, config, keywords)
        if made.web:
            raise UsageError("web=True: the page is served by the command line", hint="`fedlora chat NAME --web`")
        return ChatSession(made)
