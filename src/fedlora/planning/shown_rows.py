"""Rows of every client as training sees them: the text with its template, and what of it is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.console import printable
from fedlora.data.client_names import name_of_file
from fedlora.data.doctor import Silo
from fedlora.llm.examples import Encoder
from fedlora.plain_text import one_line

ROWS = 2
"""Rows that are shown of each client: its first with a response."""

LONGEST, MOST_PARTS = 120, 8
"""Characters of a part, and parts of a row, beyond which the middle is left out in the text; a record has them all."""

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show_rows(silo: Silo, encoder: Encoder, train: TrainConfig) -> list[dict[str, Any]]:
    """Per row its number in the file, from 1, and its text in parts (text, whether its tokens are trained on)."""
    labelled = ((number, row) for number, row in enumerate(silo.rows, start=1) if row.output.strip())
    shown = [place for place, _ in zip(labelled, range(ROWS), strict=False)]
    how = {"cutoff": train.cutoff_len, "train_on": train.trained_tokens}
    return [{"row": number, "parts": [list(part) for part in encoder.show(row, **how)]} for number, row in shown]


def describe_template(encoder: Encoder) -> dict[str, Any]:
    """The template's name, and what it writes besides the rows: the date it inserts, its default system prompt."""
    chat = encoder.chat
    return {
        "name": encoder.template,
        "date": chat.date if chat is not None and chat.inserts_date else None,
        "default_system": (chat.default_system or None) if chat is not None else None,
    }


def template_text(template: Mapping[str, Any]) -> str:
    """The template in one line."""
    text = one_line(template["name"])
    if template["date"] is not None:
        text += f"; it inserts the date {template['date']} (--template_date)"
    if template["default_system"] is not None:
        text += f"; where a row has no system turn it writes: {_escape(template['default_system'])}"
    return text


def row_lines(clients: Sequence[Mapping[str, Any]], *, coloured: bool) -> Iterator[str]:
    """One line a row; what is trained on is green where there are colours, else in double brackets."""
    before, after = (GREEN, PLAIN) if coloured else ("[[", "]]")
    yield f"rows as training sees them; trained tokens are {before}{'green' if coloured else 'in brackets'}{after}"
    for client in clients:
        for row in client["rows_shown"]:
            texts = [f"{before}{_escape(text)}{after}" if trained else _escape(text) for text, trained in row["parts"]]
            if len(texts) > MOST_PARTS:
                half = MOST_PARTS // 2
                texts = [*texts[:half], " ... ", *texts[-half:]]
            yield f"  {one_line(name_of_file(client['file']))}, row {row['row']}: {''.join(texts)}"


def _escape(text: str) -> str:
    """Text from a row in one line, its line breaks visible, without the middle where it is long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return printable(text).replace("\n", "\\n")
