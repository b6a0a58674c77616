"""Self-contained HTML files: one template with its style, script and data, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from typing import Any


def read_template(name: str) -> str:
    """Read a template file of this folder, e.g. ``page.css``."""
    return importlib.resources.files("jaxrm.reports").joinpath(name).read_text(encoding="utf-8")


def fill_template(template: str, *, title: str, style: str, script: str, content: Any, **markup: str) -> str:
    """Return `template` with its ``{{name}}`` placeholders filled.

    The placeholders are ``title`` (escaped here), ``style``, ``script``, ``records`` (`content` as JSON), ``policy`` (a
    Content-Security-Policy that runs this script, applies this style and loads nothing) and those named in `markup`,
    which must be safe HTML already.

    Raises:
      ValueError: `content` holds NaN or an infinity, which JSON cannot.
    """
    values = {
        "title": html.escape(title),
        "policy": (
            f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        "style": style,
        "script": script,
        "records": _inert_json(content),
        **markup,
    }
    # In one pass, so that a placeholder in the data stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def rounded(reward: float) -> float:
    """A reward to the digits that a page shows of it."""
    return float(f"{reward:.4g}")


def _inert_json(content: Any) -> str:
    """JSON that holds no character with a meaning in HTML, and none that an encoding could lose."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
