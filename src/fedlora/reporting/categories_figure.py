"""clients.png: exact match of every model (rows) on every test category (columns).

The framed cells of `none` are what its clients learned, the rest of their rows what they never saw or forgot.
"""

from __future__ import annotations

from fedlora.reporting.drawing import clip
from fedlora.reporting.findings import Findings
from fedlora.reporting.matrix import Matrix, draw_matrix
from fedlora.reporting.model_labels import scored_rows, visible_labels

_LABELLED_CLIENTS = 250


def draw_categories(findings: Findings) -> bytes:
    """Exact match of every scored model per test category; a frame marks what a client trained on."""
    rows, categories = scored_rows(findings), findings.categories
    labels = visible_labels(rows, _LABELLED_CLIENTS)
    return draw_matrix(
        Matrix(
            title="Exact match of each model in each category",
            unit="share that is right",
            rows=[labels.get(id(row), "") for row in rows],
            columns=[clip(category or "(no category)") for category in categories],
            values=[[row.categories.get(category, float("nan")) for category in categories] for row in rows],
            limits=(0.0, 1.0),
            colours="Blues",
            form=".2f",
            frames={
                (place, column)
                for place, row in enumerate(rows)
                for column, category in enumerate(categories)
                if category in row.own_categories
            },
            frame_meaning="framed: what that client was trained on",
        )
    )
