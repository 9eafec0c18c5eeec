"""A page as HTML: one file with its style, its script and its data inside.

Nothing that a page holds can run but our own script: the template escapes every text, JSON is written so that it cannot
end its element, and the Content-Security-Policy names the script and the styles by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from fedlora.console import printable
from fedlora.reporting.page.blocks import Page
from fedlora.reporting.page.colours import colour_rules

_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def render_page(page: Page) -> str:
    """The page; equal pages give equal text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("fedlora.reporting.page"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = lambda value: Markup(script_json(value))  # noqa: S704
    source = environment.loader
    assert source is not None
    parts = {name: source.get_source(environment, f"page.{name}")[0].strip() for name in ("css", "js")}
    parts["colours"] = colour_rules(page.styles)
    styles = " ".join(f"'{hash_of(parts[name])}'" for name in ("css", "colours"))
    policy = (
        f"default-src 'none'; script-src '{hash_of(parts['js'])}'; style-src {styles}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # our own files and computed colours, of which the policy has the hashes
    own = {name: Markup(text) for name, text in parts.items()}  # noqa: S704
    return environment.get_template("page.html.jinja").render(page=page, policy=policy, **own) + "\n"


def hash_of(text: str) -> str:
    """A source expression of Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or a line, or is no UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _IN_SCRIPT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
